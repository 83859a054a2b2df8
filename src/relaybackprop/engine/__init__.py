"""The engine: how gradients split, join and are freed. Not public."""
