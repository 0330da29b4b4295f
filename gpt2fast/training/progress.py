"""What a run shows while it goes: a live bar on a terminal, plain lines when piped."""

from __future__ import annotations

import sys
from typing import Any, Protocol

from ..output import say


class Display(Protocol):
    """Where a run reports to."""

    def message(self, text: str) -> None:
        """A line that stays."""

    def step(self, step: int, loss: float, tokens_per_second: float) -> None:
        """One optimizer step is done."""

    def close(self) -> None: ...


def open_display(steps: int, done: int) -> Display:
    """The display that suits standard output, for a run of `steps` steps, `done` already made."""
    # There is no sys.stdout where it was closed before the start.
    return _Bar(steps, done) if sys.stdout and sys.stdout.isatty() else _Lines()


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
        parts.append(f"{row['tokens_per_second']:,.0f} tok/s")
    return "  ".join(parts)


def format_val(loss: float, per_char: float | None) -> str:
    """A validation loss, per token and, where it is known, per character."""
    return f"{loss:.4f}" if per_char is None else f"{loss:.4f} ({per_char:.4f} per character)"


class _Lines:
    def message(self, text: str) -> None:
        say(text)

    def step(self, step: int, loss: float, tokens_per_second: float) -> None:
        pass

    def close(self) -> None:
        pass


class _Bar:
    def __init__(self, steps: int, done: int) -> None:
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )

        self._progress = Progress(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]}  {task.fields[speed]} tok/s"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
        )
        self._task = self._progress.add_task("", total=steps, completed=done, loss="-", speed="-")
        self._progress.start()

    def message(self, text: str) -> None:
        self._progress.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def step(self, step: int, loss: float, tokens_per_second: float) -> None:
        self._progress.update(
            self._task, completed=step, loss=f"{loss:.4f}", speed=f"{tokens_per_second:,.0f}"
        )

    def close(self) -> None:
        self._progress.stop()
