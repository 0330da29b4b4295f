"""Limits of time for tests and their waits for other processes, by the speed of the machine.

GPT2FAST_TEST_PATIENCE=3    three times as long as this machine seems to need
"""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

PATIENCE = float(os.environ.get("GPT2FAST_TEST_PATIENCE") or 1)
QUIET = 0.05
"""Seconds that `_work` takes on a quiet core of some years ago."""
LIMIT = 300.0
"""Seconds that a test may take on such a core; a hang is a failure."""
WAIT = 200.0
"""Seconds that it may wait for another process there."""


def _work() -> float:
    begin = time.perf_counter()
    total, matrix = 0, torch.ones(64, 64)
    for i in range(300_000):
        total += i & 7
        if i % 1000 == 0:
            matrix @ matrix
    return time.perf_counter() - begin


class Clock:
    """Measures once a minute by which factor this machine is slower than a quiet core."""

    def __init__(self) -> None:
        self._measured = -60.0
        self._slowness = 1.0

    def slowness(self) -> float:
        """At least 1; the load counts as well, since a test's processes share what there is."""
        if time.monotonic() - self._measured >= 60.0:
            cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
            load = os.getloadavg()[0] / cores if hasattr(os, "getloadavg") else 1.0
            self._slowness = max(1.0, _work() / QUIET, load) * PATIENCE
            self._measured = time.monotonic()
        return self._slowness

    def set_limit(self, item: pytest.Item) -> None:
        """Give a test its own limit, or the usual one, as many times longer."""
        marker = item.get_closest_marker("timeout")
        seconds = LIMIT if marker is None else marker.args[0] if marker.args else LIMIT
        if seconds:
            item.add_marker(pytest.mark.timeout(seconds * self.slowness()), append=False)


CLOCK = Clock()


def patience() -> float:
    """Seconds to wait for another process before the test fails."""
    return WAIT * CLOCK.slowness()


def deadline() -> float:
    """When, by `time.monotonic`, the wait that begins now has taken too long."""
    return time.monotonic() + patience()


def wait_until(happened: Callable[[], Any], process: subprocess.Popen[Any]) -> None:
    """Wait for something that a process does."""
    end = deadline()
    while not happened():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.002)
