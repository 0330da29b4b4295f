"""Runs as their folders tell them: the rows of their logs, and their settings."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

from ..._system.parsing import read_yaml
from ...checkpoints.run_folder import JSON_LOG, LOG, MODEL, SETTINGS
from ...errors import DataError
from .log import read_json_lines, read_rows

_LARGEST = 1e300


@dataclass(frozen=True)
class LoggedRun:
    """A run as its files tell it; losses in nats per token."""

    name: str
    folder: Path
    rows: list[dict[str, Any]]
    """Rows of the log, by step; None where a column has no value."""
    settings: dict[str, Any]
    """Contents of config.yaml; empty where that cannot be read."""
    finished: bool
    """The finished model is in the folder."""

    def values(self, column: str) -> list[float]:
        """The finite values of a column."""
        return [row[column] for row in self.rows if is_number(row.get(column))]

    def last(self, column: str) -> float | None:
        """The last finite value of a column."""
        values = self.values(column)
        return values[-1] if values else None

    def best_validation(self) -> tuple[float, int] | None:
        """The lowest validation loss and its step."""
        found = [
            (row["val_loss"], row["step"]) for row in self.rows if is_number(row.get("val_loss"))
        ]
        return min(found, default=None)

    def median(self, column: str) -> float | None:
        """The median of a column's finite values."""
        values = self.values(column)
        return statistics.median(values) if values else None

    def broken_rows(self) -> list[int]:
        """The steps at which a loss or the gradient norm was not finite."""
        watched = ("train_loss", "val_loss", "grad_norm")
        return [
            row["step"]
            for row in self.rows
            if any(row.get(name) is not None and not is_number(row[name]) for name in watched)
        ]


def is_number(value: Any) -> TypeGuard[float]:
    """True for a finite number so small that a million of them can be added."""
    return isinstance(value, (int, float)) and abs(value) <= _LARGEST


def read_runs(folders: Sequence[str | Path]) -> list[LoggedRun]:
    """The runs in these folders; one that is named twice is read once.

    Raises:
        DataError: a folder is missing or holds no run, or no run has logged anything yet.
    """
    unique = {Path(folder).resolve(): Path(folder) for folder in folders}
    names = _names(list(unique))
    runs = [_read(folder, name) for folder, name in zip(unique.values(), names, strict=True)]
    if not any(run.rows for run in runs):
        listed = ", ".join(str(run.folder) for run in runs)
        raise DataError(f"no row has been logged yet in {listed}; wait for the first one")
    return runs


def _read(folder: Path, name: str) -> LoggedRun:
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "does not exist"
        raise DataError(f"{folder} {what}; name the folder of a run, which has a {LOG}")
    try:
        if (folder / LOG).is_file():
            rows = read_rows(folder / LOG)
        elif (folder / JSON_LOG).is_file():
            rows = read_json_lines(folder / JSON_LOG)
        else:
            inside = sorted(path.parent.name for path in folder.glob(f"*/{LOG}"))
            hint = f"; its folders {', '.join(inside[:5])} do" if inside else ""
            raise DataError(
                f"{folder} has neither {LOG} nor {JSON_LOG}{hint}; name the folder of a run"
            )
    except OSError as error:
        raise DataError(f"{error.filename}: {error.strerror}; the log cannot be read") from error
    return LoggedRun(
        name,
        folder,
        sorted(rows, key=lambda row: row["step"]),
        _settings(folder / SETTINGS),
        (folder / MODEL).is_file(),
    )


def _settings(path: Path) -> dict[str, Any]:
    """The settings of a run; none where they cannot be read, as a report can do without."""
    try:
        settings = read_yaml(path, DataError)
    except DataError:
        return {}
    if not isinstance(settings, dict):
        return {}
    return {str(name): value for name, value in settings.items()}


def _names(paths: list[Path]) -> list[str]:
    """The last parts of each path, as many as tell it from the others."""
    names = []
    for path in paths:
        others = [other for other in paths if other != path]
        count = 1
        while any(other.parts[-count:] == path.parts[-count:] for other in others):
            count += 1
        name = "/".join(path.parts[-count:]).replace("//", "/")
        names.append(name.encode(errors="replace").decode())  # a name may not be Unicode
    return names
