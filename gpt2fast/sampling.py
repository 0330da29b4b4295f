"""How the next token is chosen: the options, and the seeds of the numbers drawn."""

from .inference.sampling import *  # noqa: F403
