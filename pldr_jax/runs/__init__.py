"""A run folder and its checkpoints: written whole, read by everyone, below training."""
