"""The interface of what proposes tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from ...sampling import SamplingOptions


@dataclass(frozen=True)
class DraftRow:
    """A row that the next step continues."""

    id: int
    """Its name from the first `Drafter.propose` to `Drafter.forget`."""
    tokens: Sequence[int]
    """Its prompt and all tokens generated so far; not to be changed."""
    most: int
    """Most tokens that may be proposed for it."""
    options: SamplingOptions
    """How its tokens are chosen."""
    uniforms: Callable[[int], list[float]] | None = None
    """The row's next n random numbers, in [0, 1), the first of which chooses the next token; None
    where tokens are not drawn."""


class Drafter(Protocol):
    """Proposes tokens for rows, and hears what became of them.

    Each step of an engine calls `propose` once, with every row that decodes, then `observe` for
    each of these rows. Nothing that a drafter does changes a text.
    """

    def propose(self, rows: Sequence[DraftRow]) -> list[list[int]]:
        """The tokens that may follow each row, at most `most` of it; none is always right."""

    def observe(self, row_id: int, proposed: int, accepted: int, tokens: Sequence[int]) -> None:
        """Hear the outcome of a step for a row.

        Args:
            row_id: the row's.
            proposed: number of its proposed tokens that were verified.
            accepted: how many of them, from the first one on, were right.
            tokens: the tokens that the row has got.
        """

    def forget(self, row_id: int) -> None:
        """Free what is kept for a row, which has ended; an unknown one is passed over."""
