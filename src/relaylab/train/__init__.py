"""Training: the loop, checkpoints, metrics, and safe interruption and resumption."""
