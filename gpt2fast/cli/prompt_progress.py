"""Progress through a file of prompts, on one line."""

from __future__ import annotations

import time
from collections.abc import Sequence

from .._system.output import StatusLine, clock
from ..inference.continuation import Generation
from ..inference.decoding import Timing


class PromptProgress(Timing):
    """Times of the steps, and a line on standard error about them.

    The time left is that of all tokens that may still come: less, where texts end early.

    Args:
        limits: for each continuation to come, the most tokens that it may have.
        elsewhere: show it where there is no terminal, too.
    """

    def __init__(self, limits: Sequence[int], elsewhere: bool = True) -> None:
        super().__init__()
        self.line = StatusLine(elsewhere)
        self._limits = limits
        self._most = sum(limits)
        self._done = self._tokens = self._ended_tokens = self._ended_most = 0
        self._began = time.monotonic()

    def add_prefill(self, seconds: float, prompts: Sequence[Sequence[int]]) -> None:
        super().add_prefill(seconds, prompts)
        self._show()

    def add_step(self, seconds: float, rows: int, step_bytes: int) -> None:
        super().add_step(seconds, rows, step_bytes)
        self._show()

    def add_result(self, result: Generation) -> None:
        """Count a continuation that has ended."""
        self._ended_tokens += result.new_tokens or result.prompt_tokens
        self._end_one()

    def add_failure(self, count: int) -> None:
        """Count continuations that have ended with an error."""
        for _ in range(count):
            self._end_one()

    def _end_one(self) -> None:
        self._ended_most += self._limits[self._done]
        self._done += 1
        self._show()

    def end(self) -> None:
        """Write the last line."""
        self.line.end(self._text())

    def _show(self) -> None:
        if self.line.is_due:
            self.line.show(self._text())

    def _text(self) -> str:
        elapsed = time.monotonic() - self._began
        # Tokens of continuations that still run are counted step by step.
        tokens = max(self._ended_tokens, self.decode_tokens)
        speed = tokens / elapsed if elapsed else 0.0
        left = None
        if self._done == len(self._limits):
            left = 0.0
        elif speed and self._most:
            running = tokens - self._ended_tokens
            left = max(0, self._most - self._ended_most - running) / speed
        elif self._done:
            left = elapsed / self._done * (len(self._limits) - self._done)
        shown = "?" if left is None else clock(left)
        return f"{self._done}/{len(self._limits)} done, {speed:,.1f} tok/s, {shown} left"
