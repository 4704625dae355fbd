"""The loop, and what it needs: optimisers, checkpoints, metrics, loggers."""
