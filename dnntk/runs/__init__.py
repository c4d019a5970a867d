"""A run's configuration fields, and what it leaves on disk: folder, checkpoints, locks."""
