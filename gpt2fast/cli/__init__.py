"""The command lines: a file for each command, and what they share."""
