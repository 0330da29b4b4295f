"""`versus`: time our code and a peer's in turns and report the ratio.

    python -m pytest benchmarks/test_ops.py --benchmark-only --table benchmarks/results/cpu_ops.json

keeps what the table at the end shows as JSON, as Markdown and, where matplotlib is installed, as a
picture.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))

import contest
import machine
from gpt2fast._system.files import atomic_write_text
from picture import CAN_DRAW, picture


@dataclass(frozen=True)
class Pair:
    """One comparison; seconds are medians, the ratio is that of neighboring runs."""

    name: str
    ours: float
    peer: float
    ratio: float


_PAIRS = pytest.StashKey[list[Pair]]()
_ROWS = pytest.StashKey[list[contest.Row]]()


_MISSING = 'pytest-benchmark is missing; install it with pip install -e ".[bench]"'
_OPTIONS = [
    "only",
    "skip",
    "disable",
    "enable",
    "disable-gc",
    "json",
    "save",
    "autosave",
    "compare",
    "columns",
    "sort",
]


class _Refuse(argparse.Action):
    """Refuses an option of pytest-benchmark where that is not installed."""

    def __call__(self, *arguments: Any, **named: Any) -> None:
        raise pytest.UsageError(f"{self.option_strings[0]}: {_MISSING}")


def pytest_addoption(parser: pytest.Parser, pluginmanager: pytest.PytestPluginManager) -> None:
    if not pluginmanager.hasplugin("benchmark"):
        for name in _OPTIONS:
            parser.addoption(f"--benchmark-{name}", action=_Refuse, nargs="?")
    parser.addoption(
        "--table", type=Path, metavar="FILE.json", help="keep the comparisons, also as .md and .png"
    )
    parser.addoption(
        "--gpu-table", type=Path, metavar="FILE.json", help="the same for what ran on a GPU"
    )


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_PAIRS] = []
    config.stash[_ROWS] = []


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Refuse tests that need pytest-benchmark where it is not installed; `compete` does not."""
    if config.pluginmanager.hasplugin("benchmark"):
        return
    for item in items:
        fixtures = getattr(item, "fixturenames", ())
        if "benchmark" in fixtures and "compete" not in fixtures:
            raise pytest.UsageError(f"{item.nodeid}: {_MISSING}")


@pytest.fixture
def versus(
    benchmark: Any, request: pytest.FixtureRequest
) -> Callable[[Callable[[], Any], Callable[[], Any], int], None]:
    """Call `versus(ours, peer, rounds)`: peer, ours, peer, ours, ...

    Each round's ratio is formed from two neighboring runs, so a machine that becomes slower
    half-way slows both sides. The table at the end gives both medians and the median ratio.
    """

    def run(ours: Callable[[], Any], peer: Callable[[], Any], rounds: int = 7) -> None:
        peer_seconds: list[float] = []

        def timed_peer() -> None:
            start = time.perf_counter()
            peer()
            peer_seconds.append(time.perf_counter() - start)

        ours()
        peer()
        benchmark.pedantic(ours, setup=timed_peer, rounds=rounds, iterations=1)
        our_seconds = benchmark.stats.stats.data
        ratio = statistics.median(
            theirs / mine for theirs, mine in zip(peer_seconds, our_seconds, strict=True)
        )
        benchmark.extra_info.update(peer_median=statistics.median(peer_seconds), ratio=ratio)
        request.config.stash[_PAIRS].append(
            Pair(
                request.node.name,
                statistics.median(our_seconds),
                statistics.median(peer_seconds),
                ratio,
            )
        )

    return run


@pytest.fixture
def record_pair(
    request: pytest.FixtureRequest,
) -> Callable[[str, list[float], list[float]], None]:
    """Call `record_pair(name, ours, theirs)` with the seconds of runs that were taken in turns."""

    def record(name: str, ours: list[float], theirs: list[float]) -> None:
        ratio = statistics.median(peer / mine for peer, mine in zip(theirs, ours, strict=True))
        pair = Pair(name, statistics.median(ours), statistics.median(theirs), ratio)
        request.config.stash[_PAIRS].append(pair)

    return record


@pytest.fixture
def against_floor(
    benchmark: Any, request: pytest.FixtureRequest
) -> Callable[[Callable[[], Any], int], None]:
    """Call `against_floor(step, step_bytes)`: memory's speed, some steps, memory's speed, ...

    The table at the end shows the floor as the peer: the ratio is the share of it.
    """

    def run(step: Callable[[], Any], step_bytes: int) -> None:
        rounds, steps = 5, 16
        speeds: list[float] = []
        seconds: list[list[float]] = []

        def measure_memory() -> None:
            speeds.append(machine.read_bandwidth(torch.get_num_threads()))
            step()  # its threads are awake
            seconds.append([])

        def timed_steps() -> None:
            for _ in range(steps):
                start = time.perf_counter()
                step()
                seconds[-1].append(time.perf_counter() - start)

        benchmark.pedantic(timed_steps, setup=measure_memory, rounds=rounds, iterations=1)
        ours = [statistics.median(round_) for round_ in seconds]
        floors = [step_bytes / speed for speed in speeds]
        share = statistics.median(floor / mine for floor, mine in zip(floors, ours, strict=True))
        benchmark.extra_info.update(bandwidth=statistics.median(speeds), share=share)
        request.config.stash[_PAIRS].append(
            Pair(request.node.name, statistics.median(ours), statistics.median(floors), share)
        )

    return run


if importlib.util.find_spec("pytest_benchmark") is None:

    class _Once:
        """The part of pytest-benchmark that `compete` needs, where that is not installed."""

        def __init__(self) -> None:
            self.extra_info: dict[str, Any] = {}

        def pedantic(self, function: Callable[[], Any], **options: Any) -> None:
            function()

    @pytest.fixture
    def benchmark() -> _Once:
        return _Once()


@pytest.fixture
def compete(benchmark: Any, request: pytest.FixtureRequest) -> Callable[..., None]:
    """Call `compete(ways, inputs, work)`: `contest.contest` under the test's name.

    What was found is written at once where `--gpu-table` says: a run that is cut off leaves what it
    has measured.
    """

    def run(*arguments: Any, **options: Any) -> None:
        rows: list[contest.Row] = []

        def timed() -> None:
            rows[:] = contest.contest(request.node.name, *arguments, **options)

        benchmark.pedantic(timed, rounds=1, iterations=1)
        benchmark.extra_info["ways"] = contest.as_json(rows)
        request.config.stash[_ROWS] += rows
        file = request.config.getoption("--gpu-table")
        if file:
            _keep_gpu(request.config.stash[_ROWS], file)

    return run


def _keep_gpu(rows: list[contest.Row], file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    content = {**contest.describe(), "rows": contest.as_json(rows)}
    atomic_write_text(file, json.dumps(content, indent=1) + "\n")
    atomic_write_text(file.with_suffix(".md"), contest.as_markdown(rows))


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    rows = config.stash[_ROWS]
    if rows:
        terminalreporter.section("on the GPU (theirs / ours above 1: ours is faster)")
        terminalreporter.write_line(contest.as_markdown(rows))
        if config.getoption("--gpu-table"):
            contest.plot(rows, config.getoption("--gpu-table").with_suffix(".png"))
    pairs = config.stash[_PAIRS]
    if not pairs:
        return
    terminalreporter.section("ours against the peer, in turns (ratio above 1: ours is faster)")
    for pair in pairs:
        terminalreporter.write_line(
            f"{pair.name:<62} {pair.ours * 1e3:10.2f} ms {pair.peer * 1e3:10.2f} ms "
            f"{pair.ratio:7.2f} x"
        )
    if config.getoption("--table"):
        _keep(pairs, config.getoption("--table"))


def _keep(pairs: list[Pair], file: Path) -> None:
    where = f"{machine.name()}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    lines = [
        f"{where}. Milliseconds, medians; the ratio is the median of neighboring runs, above 1 "
        "where ours is faster.",
        "",
        "| benchmark | ours | peer | ratio |",
        "|---|---|---|---|",
    ]
    for pair in pairs:
        lines.append(
            f"| {pair.name} | {pair.ours * 1e3:.2f} | {pair.peer * 1e3:.2f} | {pair.ratio:.2f} |"
        )
    file.parent.mkdir(parents=True, exist_ok=True)
    rows = [asdict(pair) for pair in pairs]
    atomic_write_text(file, json.dumps({"machine": where, "rows": rows}, indent=1) + "\n")
    atomic_write_text(file.with_suffix(".md"), "\n".join(lines) + "\n")
    if CAN_DRAW:
        _plot(pairs, file.with_suffix(".png"))


def _plot(pairs: list[Pair], file: Path) -> None:
    colors = ["tab:red" if pair.ratio >= 1 else "tab:gray" for pair in pairs]
    with picture(file, 9, 1 + 0.22 * len(pairs)) as (axis,):
        axis.barh([pair.name for pair in pairs], [pair.ratio for pair in pairs], color=colors)
        axis.axvline(1, color="black", linestyle=":")
        axis.invert_yaxis()
        axis.set_xscale("log", base=2)
        axis.set_xlabel("speed, ours over the peer's")
        axis.tick_params(labelsize=7)
