"""GNU OpenMP's threads, which are torch's, on a busy machine and after a fork.

GNU OpenMP, which torch's builds for Linux bring along, lets a thread that has finished its part
spin for milliseconds. That gains some percent on an idle machine; on a busy one it spins away the
time that the other thread needs, and a training step takes many times as long with two threads as
with one. The limit is read from the environment when torch is loaded, and never again.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

VARIABLES = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
"""GNU OpenMP's own settings; if one of them is set, ours is not."""
SPINS = "1000"
"""Rounds of spinning, about ten microseconds."""


def spin_briefly_if_busy() -> None:
    """Let the threads of a torch that is not loaded yet sleep soon, if the machine is busy now."""
    if "torch" not in sys.modules and not spins_briefly() and is_busy():
        os.environ["GOMP_SPINCOUNT"] = SPINS


def survive_forks() -> None:
    """Let forked children of this process compute, with one thread.

    A child has none of its parent's threads, and GNU OpenMP waits for them forever at the first
    operation that it shares out.
    """
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=_go_on_alone)


def _go_on_alone() -> None:
    torch = sys.modules.get("torch")
    if torch is not None:
        torch.set_num_threads(1)


def spins_briefly() -> bool:
    """True if the environment says how long threads spin."""
    return any(name in os.environ for name in VARIABLES)


def is_busy() -> bool:
    """True if other processes want all processors, now and over the last minute."""
    try:
        average, _, _, runnable, _ = Path("/proc/loadavg").read_text().split()
        others = int(runnable.partition("/")[0]) - 1
    except (OSError, ValueError):  # not Linux
        return False
    processors = os.cpu_count() or 1
    return float(average) > processors and others >= processors
