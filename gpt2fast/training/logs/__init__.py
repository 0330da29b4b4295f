"""What a run tells: its log, its progress, its samples of text."""
