"""log.csv: one row per logged step, continued in place when a run resumes."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

from ..files import atomic_write

COLUMNS = (
    "step",
    "tokens",
    "train_loss",
    "val_loss",
    "val_loss_per_char",
    "lr",
    "grad_norm",
    "tokens_per_second",
    "elapsed_seconds",
)


class RunLog:
    """Appends rows; each is on disk when `write` returns. Absent values are empty cells."""

    def __init__(self, path: Path, resume_step: int | None = None) -> None:
        """Start `path` afresh, or keep its rows up to and including `resume_step`."""
        rows: list[dict[str, Any]] = []
        if resume_step is not None and path.is_file():
            with path.open(newline="") as file:
                rows = [row for row in csv.DictReader(file) if _step(row) <= resume_step]
        with atomic_write(path, "w") as file:
            writer = csv.DictWriter(file, COLUMNS, extrasaction="ignore", lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
        self._file = path.open("a", newline="")
        self._writer = csv.DictWriter(self._file, COLUMNS, lineterminator="\n")

    def write(self, row: dict[str, Any]) -> None:
        self._writer.writerow({name: _cell(row.get(name)) for name in COLUMNS})
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def _step(row: dict[str, Any]) -> float:
    """A row's step; a row that a crash cut short counts as later than every step."""
    step = row.get("step") or ""
    return int(step) if step.isdigit() and None not in row.values() else float("inf")


def _cell(value: Any) -> Any:
    return f"{value:.6g}" if isinstance(value, float) else value
