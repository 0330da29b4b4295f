"""In which order the simulator runs threads: another one in each test, and on each day.

The variables of docs/simulator.md hold for all tests where they are set. A failure names them, and
they repeat it.
"""

from __future__ import annotations

import os
import zlib

VARIABLES = ("GPT2FAST_SIM_ORDER", "GPT2FAST_SIM_SEED", "GPT2FAST_SIM_ASYNC")
SEEDS = 10_000


def settings_of(name: str, today: int) -> dict[str, str]:
    """The simulator's variables for a test: a random order, and now and then early copies.

    Args:
        name: the test's node id.
        today: what `rotation.day` gives.
    """
    number = zlib.crc32(f"{today} {name}".encode())
    early = number // SEEDS % 4 == 0
    values = ("random", str(number % SEEDS), "immediate" if early else "deferred")
    return dict(zip(VARIABLES, values, strict=True))


class ThreadOrder:
    """Order of threads in the current test, and a flag that it used the simulator."""

    def __init__(self) -> None:
        self.simulated = False

    def begin(self, name: str, today: int) -> dict[str, str]:
        """The variables to set for a test: those that the user has not."""
        self.simulated = False
        if any(os.environ.get(variable) for variable in VARIABLES):
            return {}
        return settings_of(name, today)

    def explanation(self) -> str:
        """Settings that repeat the test under the same order; empty if nothing was simulated."""
        if not self.simulated:
            return ""
        chosen = [f"{name}={os.environ[name]}" for name in VARIABLES if os.environ.get(name)]
        return f"The same order of the simulator's threads once more: {' '.join(chosen)}"


THREAD_ORDER = ThreadOrder()
