"""Tuning: which settings of a training run are searched, the study that searches, its report."""
