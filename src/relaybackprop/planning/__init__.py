"""Planning before training: placement of windows and heads, and their cost."""
