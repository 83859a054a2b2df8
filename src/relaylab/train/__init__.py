"""Training a recipe: the loop, its checkpoints and records, and what makes it safe to stop and go on."""
