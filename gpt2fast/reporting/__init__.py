"""Reports on finished and unfinished runs: reading them, curves, tables, one HTML file."""
