"""A run's folder: checkpoints, metrics, status."""
