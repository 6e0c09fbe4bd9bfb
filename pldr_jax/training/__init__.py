"""Training: losses, the optimiser, the step, evaluation, checkpoints and the loop."""
