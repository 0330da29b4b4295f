"""Inference: generation from token ids and from text, and the engines that decode."""
