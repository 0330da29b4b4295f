"""Files, locks, output and memory: what every room shares of the system below."""
