"""Notices that other programs take the processors that a run on the CPU counts on."""

from __future__ import annotations

import time

import torch

from ..._system.openmp import is_busy, spins_briefly

ENOUGH = 0.5
"""Share of its threads' time below which a run counts as held up."""
SHORTEST = 2.0
"""Shortest stretch to measure over, in seconds."""


class Contention:
    """Measures the share of its threads' time that a run on the CPU gets."""

    def __init__(self) -> None:
        self._seen = time.monotonic(), time.process_time()
        self._said = False

    def warning(self) -> str | None:
        """Advice, once, after a stretch in which other programs had the processors; else None."""
        (wall, used), now = self._seen, (time.monotonic(), time.process_time())
        if self._said or now[0] - wall < SHORTEST:
            return None
        self._seen = now
        threads = torch.get_num_threads()
        got = (now[1] - used) / (now[0] - wall)
        if got >= ENOUGH * threads or not is_busy():
            return None
        self._said = True
        advice = (
            "set threads to 1, or wait for the others"
            if threads == 1 or spins_briefly()
            else "its threads spin while they wait for each other, which makes that worse: stop "
            "the run and resume it, and they sleep"
        )
        return (
            f"warning: this machine is busy, the run gets {got:.1f} of its {threads} threads; "
            f"{advice}"
        )
