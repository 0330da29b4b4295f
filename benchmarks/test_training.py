"""A training step beside those of nanoGPT (eager, compiled; torch's fused AdamW) and transformers.

    GPT2FAST_NANOGPT=CHECKOUT python -m pytest benchmarks/test_training.py --benchmark-only

Each contender is a process of its own that takes a step when asked, all of them in turns, so that
a machine that slows down slows all; its memory is the most that this process has held. The line
above them is what the machine's matrix products allow: 6 operations a weight and token. All start
from the same weights, and the test fails where a loss is not that of the others: equal work.
"""

from __future__ import annotations

import importlib.util
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
import torch

import machine
from contender import CONTENDERS, SHAPES, Shape, check_equal_work

ROUNDS = 5


class Contender:
    """A process that takes steps; see contender.py."""

    def __init__(self, process: subprocess.Popen[str], name: str):
        self.name = name
        self.seconds: list[float] = []
        self.memory = 0
        self.losses: list[float] = []
        self._process = process
        self._answer()  # it is ready

    def _answer(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.name} ended with exit code {self._process.wait()}")
        return line

    def step(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write("step\n")
        self._process.stdin.flush()
        answer = json.loads(self._answer())
        self.seconds.append(answer["seconds"])
        self.losses.append(answer["loss"])
        self.memory = answer["memory"]


@contextmanager
def contender(name: str, shape: str, dtype: str) -> Iterator[Contender]:
    """A contender that ends with the block."""
    script = Path(__file__).with_name("contender.py")
    with subprocess.Popen(
        [sys.executable, str(script), name, shape, dtype],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            yield Contender(process, name)
        finally:
            process.kill()


def _missing(name: str) -> str | None:
    if name.startswith("nanogpt"):
        folder = os.environ.get("GPT2FAST_NANOGPT")
        if folder is None or not Path(folder, "model.py").is_file():
            return "GPT2FAST_NANOGPT does not name a checkout of nanoGPT"
    if name == "transformers" and importlib.util.find_spec("transformers") is None:
        return "transformers is not installed"
    return None


def _operations(shape: Shape) -> float:
    """FLOPs of the products of a step: forward, and twice as many backward; without attention."""
    weights = 12 * shape.layers * shape.width**2 + shape.vocab * shape.width
    return 6.0 * weights * shape.batch * shape.time


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", SHAPES)
def test_training_step(benchmark, record_pair, capsys, shape, dtype):
    reasons = {name: _missing(name) for name in CONTENDERS}
    peers = [name for name, reason in reasons.items() if reason is None and name != "ours"]
    if not peers:
        pytest.skip("; ".join(str(reasons[name]) for name in CONTENDERS if name != "ours"))
    rates: list[float] = []
    with ExitStack() as stack:
        every = [stack.enter_context(contender(name, shape, dtype)) for name in ["ours", *peers]]

        def one_round() -> None:
            rates.append(machine.product_rate(getattr(torch, dtype), torch.get_num_threads()))
            for each in every:
                each.step()

        benchmark.pedantic(one_round, rounds=ROUNDS, iterations=1)
    check_equal_work({each.name: each.losses for each in every}, dtype)
    ours, *others = every
    tokens = SHAPES[shape].batch * SHAPES[shape].time
    floor = _operations(SHAPES[shape]) / statistics.median(rates)
    lines = [
        "",
        f"{shape} {dtype}: products at {statistics.median(rates) / 1e9:.0f} GFLOP/s would take "
        f"{floor * 1e3:.0f} ms ({tokens / floor:.0f} tokens/s)",
    ]
    for each in every:
        seconds = statistics.median(each.seconds)
        ratio = statistics.median(
            theirs / mine for theirs, mine in zip(each.seconds, ours.seconds, strict=True)
        )
        if each is not ours:
            record_pair(f"{shape} {dtype} {each.name}", ours.seconds, each.seconds)
        lines.append(
            f"  {each.name:<17} {seconds * 1e3:8.0f} ms {tokens / seconds:8.0f} tokens/s "
            f"{ratio:6.2f} x {each.memory / 2**30:6.2f} GiB  loss {each.losses[-1]:.5f}"
        )
    smallest = min(other.memory for other in others)
    lines.append(f"  memory: {ours.memory / smallest:.2f} of the smallest peer's")
    lines += [f"  without {name}: {why}" for name, why in reasons.items() if why is not None]
    with capsys.disabled():
        print("\n".join(lines))
    benchmark.extra_info.update(
        {each.name: {"seconds": each.seconds, "memory": each.memory} for each in every},
        product_rate=statistics.median(rates),
    )
