"""The trials of a study, ranked, as a table."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from .._system.tables import ABSENT, filled, setting

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial

DIGITS = 4
"""Significant digits of settings that a sampler chose."""


def ranked(trials: Sequence[FrozenTrial]) -> list[FrozenTrial]:
    """Completed trials by their loss, then pruned ones, then the others."""
    from optuna.trial import TrialState

    order = (TrialState.COMPLETE, TrialState.PRUNED)

    def key(trial: FrozenTrial) -> tuple[int, float, int]:
        group = order.index(trial.state) if trial.state in order else len(order)
        return group, math.inf if trial.value is None else trial.value, trial.number

    return sorted(trials, key=key)


def trial_table(
    trials: Sequence[FrozenTrial], names: Sequence[str]
) -> tuple[list[str], list[list[str]]]:
    """Column titles, and a row of cells for each trial; `names` are the settings to show.

    A column that no trial has a value for is left out; failures are explained in the last one.
    """
    from optuna.trial import TrialState

    columns: dict[str, list[str]] = {
        "trial": [str(trial.number) for trial in trials],
        "state": [_state(trial) for trial in trials],
        "loss": [ABSENT if t.value is None else f"{t.value:.4f}" for t in trials],
        "steps": [ABSENT if t.last_step is None else f"{t.last_step:,}" for t in trials],
        "seconds": [
            ABSENT if t.duration is None else f"{t.duration.total_seconds():,.0f}" for t in trials
        ],
    }
    for name in names:
        columns[name] = [
            setting(trial.params[name], DIGITS) if name in trial.params else ABSENT
            for trial in trials
        ]
    columns["reason"] = [
        str(trial.user_attrs.get("error", "its process died"))
        if trial.state == TrialState.FAIL
        else ABSENT
        for trial in trials
    ]
    return filled(columns)


def _state(trial: FrozenTrial) -> str:
    return "failed" if trial.state.name == "FAIL" else trial.state.name.lower()
