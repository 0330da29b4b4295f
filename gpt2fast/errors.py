"""The errors that a user can cause, all derived from one class."""

from __future__ import annotations


class Error(ValueError):
    """A mistake in what gpt2fast was given; its text names the value, the limit and the way out."""


class ConfigError(Error):
    """A field of a model or training configuration has a wrong type or value."""


class ArgumentError(Error):
    """Arguments of an op, a module or the model do not fit together."""


class WeightsError(Error):
    """A checkpoint cannot be found, read, or fitted to the model."""


class TokenizerError(Error):
    """A tokenizer's files are broken, or a text or token id cannot be converted."""


class DataError(Error):
    """Training data is missing, malformed, too short, or belongs to another tokenizer."""


class GenerationError(Error):
    """A generation request cannot be carried out as asked."""


class BackendError(Error):
    """The backend that was asked for is unknown or cannot run this op here."""
