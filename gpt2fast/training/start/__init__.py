"""The beginning of a run: its data, its model, and the part of it that is trained."""
