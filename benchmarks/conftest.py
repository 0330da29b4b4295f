"""`versus`: time our code and a peer's in turns and report the ratio."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

_RATIOS = pytest.StashKey[list[tuple[str, float, float, float]]]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_RATIOS] = []


@pytest.fixture
def versus(
    benchmark: Any, request: pytest.FixtureRequest
) -> Iterator[Callable[[Callable[[], Any], Callable[[], Any], int], None]]:
    """Call `versus(ours, peer, rounds)`: peer, ours, peer, ours, ...

    Each round's ratio is formed from two neighbouring runs, so a machine that becomes slower
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
        request.config.stash[_RATIOS].append(
            (
                request.node.name,
                statistics.median(our_seconds),
                statistics.median(peer_seconds),
                ratio,
            )
        )

    yield run


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    if not config.stash[_RATIOS]:
        return
    terminalreporter.section("ours against the peer, in turns (ratio above 1: ours is faster)")
    for name, ours, peer, ratio in config.stash[_RATIOS]:
        terminalreporter.write_line(
            f"{name:<62} {ours * 1e3:10.2f} ms {peer * 1e3:10.2f} ms {ratio:7.2f} x"
        )
