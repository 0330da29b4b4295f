"""The machine under a run: its memory, processors, precision and peak speed."""
