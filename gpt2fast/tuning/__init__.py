"""Tuning: spaces of settings of a training run, studies that search them, reports."""
