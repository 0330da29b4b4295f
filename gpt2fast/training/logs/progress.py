"""The progress of a run: a live panel on a terminal, plain lines when piped or logged."""

from __future__ import annotations

import functools
import itertools
import logging
import math
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Protocol

from ..._system.output import clock, is_shown, say

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult

_log = logging.getLogger(__name__)

_BLOCKS = "▁▂▃▄▅▆▇█"
_LOSSES = 240
"""Steps that the sparkline shows."""
_CONTROLS = {
    code: "\N{REPLACEMENT CHARACTER}" for code in (*range(32), 127) if chr(code) not in "\n\t"
}
"""Control characters that a sample of text may not send to a terminal."""


class Display(Protocol):
    """Shows the progress of a run."""

    def message(self, text: str) -> None:
        """A line that stays."""

    def step(self, step: int, loss: float, tokens_per_second: float) -> None:
        """One optimizer step is done."""

    def row(self, row: dict[str, Any]) -> None:
        """A row of the log was written."""

    def close(self) -> None: ...


def open_display(
    steps: int, done: int, elapsed: float = 0.0, max_hours: float | None = None
) -> Display:
    """The display that suits standard output; for a program that imports us, the log.

    Args:
        steps: length of the run.
        done: steps already made, when it is resumed.
        elapsed: seconds that those took.
        max_hours: when the run ends at the latest; `elapsed` counts.
    """
    if not is_shown():
        return _Lines(steps, functools.partial(_log.info, "%s"))
    if sys.stdout and sys.stdout.isatty():
        return _Bar(steps, done, elapsed, max_hours)
    return _Lines(steps, say)


def format_row(row: dict[str, Any], steps: int) -> str:
    """A row of log.csv as a line to read."""
    parts = [f"step {row['step']:>{len(str(steps))}}/{steps}"]
    if row.get("train_loss") is not None:
        parts.append(f"loss {row['train_loss']:.4f}")
    if row.get("val_loss") is not None:
        parts.append(f"val {format_val(row['val_loss'], row['val_loss_per_char'])}")
    if row.get("train_loss") is not None:
        parts.append(f"lr {row['lr']:.2e}")
        parts.append(f"grad {row['grad_norm']:.2f}")
        parts += _machine(row)
    return "  ".join(parts)


def format_val(loss: float, per_char: float | None) -> str:
    """A validation loss, per token and, where it is known, per character."""
    return f"{loss:.4f}" if per_char is None else f"{loss:.4f} ({per_char:.4f} per character)"


def sparkline(values: Sequence[float], width: int) -> str:
    """At most `width` blocks, each as high as the mean of its share of the finite `values`."""
    values = [value for value in values if math.isfinite(value)]
    width = min(width, len(values))
    bounds = [round(i * len(values) / width) for i in range(width + 1)] if width else []
    means = [sum(values[a:b]) / (b - a) for a, b in itertools.pairwise(bounds)]
    low, high = min(means, default=0.0), max(means, default=0.0)
    scale = (len(_BLOCKS) - 1) / (high - low) if high > low else 0.0
    return "".join(_BLOCKS[round((mean - low) * scale)] for mean in means)


def _machine(row: dict[str, Any]) -> list[str]:
    """Speed, MFU and memory, as far as they are known."""
    shown = (
        ("tokens_per_second", "{:,.0f} tok/s"),
        ("mfu", "{:.0%} of peak"),
        ("memory_gib", "{:.1f} GiB"),
    )
    return [form.format(row[name]) for name, form in shown if row.get(name) is not None]


class _Lines:
    """A line for each message and row."""

    def __init__(self, steps: int, write: Callable[[str], None]) -> None:
        self._steps = steps
        self.message = write

    def step(self, step: int, loss: float, tokens_per_second: float) -> None:
        pass

    def row(self, row: dict[str, Any]) -> None:
        self.message(format_row(row, self._steps))

    def close(self) -> None:
        pass


class _Quiet:
    """Standard output that ignores errors: its reader may have gone."""

    def __init__(self, file: Any) -> None:
        self._file = file

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def write(self, text: str) -> int:
        with suppress(OSError):
            self._file.write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(OSError):
            self._file.flush()


class _Bar:
    """Two lines at the bottom of the terminal, drawn four times a second; rows with a validation
    loss stay above them, the others are in the log."""

    def __init__(self, steps: int, done: int, elapsed: float, max_hours: float | None) -> None:
        from rich.console import Console
        from rich.live import Live

        self._panel = _Panel(steps, done, elapsed, max_hours)
        self._console = Console(file=_Quiet(sys.stdout))  # type: ignore[arg-type]
        self._live = Live(self._panel, console=self._console)
        self._live.start()

    def message(self, text: str) -> None:
        shown = text.translate(_CONTROLS)
        self._console.print(shown, highlight=False, markup=False, soft_wrap=True)

    def step(self, step: int, loss: float, tokens_per_second: float) -> None:
        self._panel.advance(step, loss, tokens_per_second)

    def row(self, row: dict[str, Any]) -> None:
        self._panel.row = {**self._panel.row, **{k: v for k, v in row.items() if v is not None}}
        if row.get("val_loss") is not None:
            self.message(format_row(row, self._panel.steps))

    def close(self) -> None:
        self._live.stop()


class _Panel:
    """The two lines, cut to the width of the terminal."""

    def __init__(self, steps: int, done: int, elapsed: float, max_hours: float | None) -> None:
        self.steps = steps
        self.row: dict[str, Any] = {}
        self._done = done
        self._limit = None if max_hours is None else 3600 * max_hours
        self._opened = time.perf_counter() - elapsed
        self._first: tuple[int, float] | None = None
        """Step and time at which the clock began: the first step may have compiled first."""
        self._losses: deque[float] = deque(maxlen=_LOSSES)

    def advance(self, step: int, loss: float, tokens_per_second: float) -> None:
        self._done = step
        self._losses.append(loss)
        self.row = {**self.row, "tokens_per_second": tokens_per_second}
        self._first = self._first or (step, time.perf_counter())

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        from rich.text import Text

        yield from self._first_line(options.max_width)
        line = self._second_line(options.max_width, options.ascii_only)
        yield Text(line, no_wrap=True, overflow="crop", end="")

    def _first_line(self, width: int) -> RenderResult:
        """Steps done, a bar, the time it took and the time left."""
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        elapsed = time.perf_counter() - self._opened
        left, by_time = self._time_left(elapsed)
        counted = f"step {self._done}/{self.steps}"
        times = f"{clock(elapsed)}, {'?' if left is None else clock(left)} left"
        room = width - len(counted) - len(times) - 2
        if room < 8:
            yield Text(f"{counted} {times}", no_wrap=True, overflow="crop")
            return
        total, completed = (self._limit, elapsed) if by_time else (self.steps, self._done)
        grid = Table.grid(padding=(0, 1))
        grid.add_row(counted, ProgressBar(total=total, completed=completed, width=room), times)
        yield grid

    def _time_left(self, elapsed: float) -> tuple[float | None, bool]:
        """Seconds until the run ends, if known, and True if it is the clock that ends it."""
        left = None
        if self._first is not None and self._done > self._first[0]:
            step, began = self._first
            seconds = (time.perf_counter() - began) / (self._done - step)
            left = seconds * (self.steps - self._done)
        if self._limit is not None and (left is None or self._limit - elapsed < left):
            return self._limit - elapsed, True
        return left, False

    def _second_line(self, width: int, ascii_only: bool) -> str:
        """Losses, rate and speed."""
        parts = []
        if self._losses:
            loss = f"loss {self._losses[-1]:.4f}"
            blocks = 0 if ascii_only else min(24, width // 4)
            parts.append(f"{loss} {sparkline(tuple(self._losses), blocks)}".rstrip())
        if "val_loss" in self.row:
            parts.append(f"val {self.row['val_loss']:.4f}")
        machine = _machine(self.row)
        parts += machine[:1]
        if "lr" in self.row:
            parts.append(f"lr {self.row['lr']:.2e}")
        parts += machine[1:]
        while len(parts) > 1 and len("  ".join(parts)) > width:
            parts.pop()
        return "  ".join(parts)
