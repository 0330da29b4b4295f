"""Checkpoints of every spelling: read into a model, and written."""
