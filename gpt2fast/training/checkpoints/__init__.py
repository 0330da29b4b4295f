"""A run on disk: its checkpoints, shards and position."""
