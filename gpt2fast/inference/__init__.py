"""Token ids in, token ids out: what decodes, what it decodes with, and text around it."""
