"""Planning before training: where to put windows and heads, and what they cost."""
