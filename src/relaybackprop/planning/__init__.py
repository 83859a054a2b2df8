"""Planning: places for windows and heads, and their cost, before training starts."""
