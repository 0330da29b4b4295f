"""Training beside other work: how long threads spin, and what a run says of it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from gpt2fast._system import openmp
from gpt2fast.training.machine import contention

BUSY, IDLE = "11.02 3.10 1.00 12/345 678\n", "0.10 3.10 1.00 1/345 678\n"


@pytest.fixture
def machine(monkeypatch):
    """Says what the system tells of its load."""

    def loaded(text: str, processors: int = 2) -> None:
        monkeypatch.setattr(openmp.Path, "read_text", lambda self: text)
        monkeypatch.setattr(os, "cpu_count", lambda: processors)

    return loaded


@pytest.mark.parametrize(
    ("load", "processors", "busy"),
    [
        (BUSY, 2, True),
        (BUSY, 64, False),
        (IDLE, 2, False),
        ("11.02 3.10 1.00 1/345 678\n", 2, False),  # what made the load has ended
        ("0.50 3.10 1.00 12/345 678\n", 2, False),  # something short
        ("nonsense", 2, False),
    ],
)
def test_a_machine_is_busy_where_others_want_all_its_processors(machine, load, processors, busy):
    machine(load, processors)
    assert openmp.is_busy() is busy


@pytest.mark.parametrize(
    "set_by_user", [{}, {"OMP_WAIT_POLICY": "active"}, {"GOMP_SPINCOUNT": "7"}]
)
@pytest.mark.parametrize("busy", [True, False])
@pytest.mark.parametrize("torch_first", [True, False])
def test_threads_of_a_busy_machine_sleep_soon(set_by_user, busy, torch_first):
    """In a process of its own: torch is loaded here."""
    code = f"""
import os, pathlib
real = pathlib.Path.read_text
text = {BUSY if busy else IDLE!r}
pathlib.Path.read_text = lambda self, *a, **k: (
    text if str(self) == "/proc/loadavg" else real(self, *a, **k))
os.cpu_count = lambda: 2
{"import sys; sys.modules['torch'] = os" if torch_first else ""}
import gpt2fast
print(os.environ.get("GOMP_SPINCOUNT"))
"""
    environment = {k: v for k, v in os.environ.items() if k not in openmp.VARIABLES}
    root = str(Path(__file__).parent.parent)
    done = subprocess.run(
        [sys.executable, "-c", code], env={**environment, "PYTHONPATH": root, **set_by_user},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    expected = set_by_user.get("GOMP_SPINCOUNT", "None")
    if busy and not torch_first and not set_by_user:
        expected = openmp.SPINS
    assert done.stdout.strip() == expected


class Clock:
    """Stands in for `time`."""

    wall = used = 0.0

    def monotonic(self) -> float:
        return self.wall

    def process_time(self) -> float:
        return self.used


@pytest.fixture
def clock(monkeypatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(contention, "time", clock)
    monkeypatch.setattr(contention.torch, "get_num_threads", lambda: 2)
    for name in openmp.VARIABLES:
        monkeypatch.delenv(name, raising=False)
    return clock


def test_a_run_that_is_held_up_says_so_once(machine, clock):
    watch = contention.Contention()
    machine(BUSY)
    clock.wall, clock.used = 10.0, 6.0
    said = watch.warning()
    assert said is not None and "gets 0.6 of its 2 threads" in said and "resume it" in said
    clock.wall, clock.used = 20.0, 7.0
    assert watch.warning() is None


@pytest.mark.parametrize(
    ("load", "wall", "used"),
    [(IDLE, 10.0, 1.0), (BUSY, 10.0, 19.0), (BUSY, 0.5, 0.0)],
    ids=["an idle machine: the run waits for something else", "it gets its share", "too short"],
)
def test_a_run_that_is_not_held_up_by_others_says_nothing(machine, clock, load, wall, used):
    watch = contention.Contention()
    machine(load)
    clock.wall, clock.used = wall, used
    assert watch.warning() is None
