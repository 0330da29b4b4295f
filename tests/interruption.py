"""Ends the preparation of data as a power cut does."""

from __future__ import annotations

from collections.abc import Callable


class Killed(BaseException):
    """Nothing of prepare's handles it."""


def interrupt_after(calls: int) -> Callable[[str, int, int], None]:
    """A `progress` that raises `Killed` after so many calls."""

    def progress(stage: str, done: int, total: int) -> None:
        nonlocal calls
        calls -= 1
        assert 0 <= done <= total
        if calls < 0:
            raise Killed

    return progress
