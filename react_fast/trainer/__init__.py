"""Training: configuration, rollouts, algorithms, checkpoints, progress. Needs the `train` extra."""
