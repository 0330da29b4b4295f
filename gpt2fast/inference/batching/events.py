"""What a job of the engine tells while it runs."""

from __future__ import annotations

from dataclasses import dataclass

from ..continuation import Generation
from ..scores import Scores


@dataclass(frozen=True)
class PromptRead:
    """The prompt has been read: the first token comes next, if any was asked for."""

    prompt_tokens: int
    """Its length."""
    cached_tokens: int
    """How many of its tokens were not read, since their keys and values were there."""
    scores: Scores | None
    """Log-probabilities of its tokens after the first one, if the job asks for them."""


@dataclass(frozen=True)
class Token:
    """A new token."""

    index: int
    """Its place in the continuation: 0, 1, …"""
    token: int
    """Its id."""
    piece: str
    """Text that is certain with it: what may become a stop string, or half a character, comes with
    a later token. The pieces, joined, are the text; but where a job ends without a token ("time",
    "cancelled"), what was held back comes with `Finished` alone."""
    scores: Scores | None
    """Its log-probability, if the job asks for it."""


@dataclass(frozen=True)
class Finished:
    """The job is done; nothing follows."""

    generation: Generation
    """Its result. The reason "cancelled" is added to those of `Generation`."""


@dataclass(frozen=True)
class Failed:
    """The job has ended with an error; nothing follows."""

    error: Exception
    """Why: a GenerationError if the model gave what is not a number, a MemoryError or torch's own
    where memory ran out, or what a function of the user's has raised."""


Event = PromptRead | Token | Finished | Failed
