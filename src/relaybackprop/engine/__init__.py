"""The engine, which splits, joins and frees gradients at the boundaries of windows. Not public."""
