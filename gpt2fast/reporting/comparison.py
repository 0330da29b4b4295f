"""Runs side by side: their results, and the settings in which they differ."""

from __future__ import annotations

from collections.abc import Sequence

from .._system.tables import ABSENT, filled, setting
from ..training.logs.runs import LoggedRun

_OWN = ("out",)
"""Settings that always differ, and say nothing about the runs."""


def results(runs: Sequence[LoggedRun]) -> tuple[list[str], list[list[str]]]:
    """Column titles, and a row of cells for each run. Columns without any value are left out."""
    columns = {
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
    return filled(columns)


def differences(runs: Sequence[LoggedRun]) -> list[tuple[str, list[str]]]:
    """Names of the settings that are not the same everywhere, with each run's value."""
    return [
        (name, cells)
        for name, cells in all_settings(runs)
        if name not in _OWN and len(set(cells)) > 1
    ]


def all_settings(runs: Sequence[LoggedRun]) -> list[tuple[str, list[str]]]:
    """Every setting with each run's value; one that a run's file does not have is a dash."""
    names = dict.fromkeys(name for run in runs for name in run.settings)
    return [
        (name, [setting(run.settings[name]) if name in run.settings else ABSENT for run in runs])
        for name in names
    ]


def _state(run: LoggedRun) -> str:
    if not run.rows:
        return "nothing logged yet"
    return "finished" if run.finished else "not finished"


def _best(run: LoggedRun) -> str:
    best = run.best_validation()
    return ABSENT if best is None else f"{best[0]:.4f} at {best[1]:,}"


def _broken(run: LoggedRun) -> str:
    steps = run.broken_rows()
    if not steps:
        return ABSENT
    rows = "1 row" if len(steps) == 1 else f"{len(steps)} rows"
    return f"{rows}, first at step {steps[0]:,}"


def _whole(value: float | None) -> str:
    return ABSENT if value is None else f"{value:,.0f}"


def _number(value: float | None, form: str) -> str:
    return ABSENT if value is None else form.format(value)


def _time(seconds: float | None) -> str:
    if seconds is None:
        return ABSENT
    minutes, left = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{left:02}"
