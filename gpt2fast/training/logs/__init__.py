"""The logs of a run, its progress on a terminal, its samples of text."""
