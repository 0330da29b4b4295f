"""What the runs came to, and what they were told differently."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .runs import Run

_ABSENT = "–"
_OWN = ("out",)
"""Settings that differ without meaning anything."""


def results(runs: Sequence[Run]) -> tuple[list[str], list[list[str]]]:
    """Column titles, and a row of cells for each run. Columns without any value are left out."""
    columns: dict[str, list[str]] = {
        "run": [run.name for run in runs],
        "state": [_state(run) for run in runs],
        "steps": [_whole(run.last("step")) for run in runs],
        "tokens": [_whole(run.last("tokens")) for run in runs],
        "epochs": [_number(run.last("epoch"), "{:.2f}") for run in runs],
        "training loss": [_number(run.last("train_loss"), "{:.4f}") for run in runs],
        "validation loss": [_number(run.last("val_loss"), "{:.4f}") for run in runs],
        "best validation": [_best(run) for run in runs],
        "per character": [_number(run.last("val_loss_per_char"), "{:.4f}") for run in runs],
        "time": [_time(run.last("elapsed_seconds")) for run in runs],
        "tok/s, median": [_whole(run.median("tokens_per_second")) for run in runs],
        "MFU": [_number(run.median("mfu"), "{:.1%}") for run in runs],
        "memory, GiB": [_number(run.last("memory_gib"), "{:.2f}") for run in runs],
        "not finite": [_broken(run) for run in runs],
    }
    kept = {
        title: cells for title, cells in columns.items() if any(cell != _ABSENT for cell in cells)
    }
    return list(kept), [list(row) for row in zip(*kept.values(), strict=True)]


def differences(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    """Names of the settings that are not the same everywhere, with each run's value."""
    return [
        (name, cells)
        for name, cells in all_settings(runs)
        if name not in _OWN and len(set(cells)) > 1
    ]


def all_settings(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    """Every setting with each run's value; one that a run's file does not have is a dash."""
    names = dict.fromkeys(name for run in runs for name in run.settings)
    return [(name, [_setting(run.settings, name) for run in runs]) for name in names]


def _setting(settings: dict[str, Any], name: str) -> str:
    if name not in settings:
        return _ABSENT
    value = settings[name]
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)


def _state(run: Run) -> str:
    if not run.rows:
        return "nothing logged yet"
    return "finished" if run.finished else "not finished"


def _best(run: Run) -> str:
    best = run.best_validation()
    return _ABSENT if best is None else f"{best[0]:.4f} at {best[1]:,}"


def _broken(run: Run) -> str:
    steps = run.broken_rows()
    if not steps:
        return _ABSENT
    rows = "1 row" if len(steps) == 1 else f"{len(steps)} rows"
    return f"{rows}, first at step {steps[0]:,}"


def _whole(value: float | None) -> str:
    return _ABSENT if value is None else f"{value:,.0f}"


def _number(value: float | None, form: str) -> str:
    return _ABSENT if value is None else form.format(value)


def _time(seconds: float | None) -> str:
    if seconds is None:
        return _ABSENT
    minutes, left = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{left:02}"
