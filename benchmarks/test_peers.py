"""Generation end to end against the other engines, in turns: GPT-2 124M with random weights.

    python benchmarks/peers/setup_peers.py [--llama-cpp PATH]
    python -m pytest benchmarks/test_peers.py --benchmark-only

Engines that are not installed are left out; `benchmarks/peers/compare.py` is the command line to
the same measurements, with its results as JSON, table and plot. GPT2FAST_PEERS names another folder
than that of setup_peers.py.
"""

from __future__ import annotations

import os
import statistics
import sys
from pathlib import Path

import pytest
import torch

_PEERS = Path(__file__).resolve().parent / "peers"
sys.path.insert(0, str(_PEERS))

import compare  # noqa: E402
from checkpoint import Checkpoint  # noqa: E402
from random_model import save_random  # noqa: E402
from setup_peers import DEFAULT_FOLDER  # noqa: E402

_FOLDER = Path(os.environ.get("GPT2FAST_PEERS", DEFAULT_FOLDER))
_ROUNDS = 3


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory):
    """Folder of the model, with its tokenizer, which llama.cpp's files hold as well."""
    data = Path(os.environ.get("GPT2FAST_DATA", _PEERS.parents[2] / "shared" / "data"))
    if not (data / "gpt2").is_dir():
        pytest.skip(f"no vocabulary of GPT-2: {data / 'gpt2'} is not a folder (set GPT2FAST_DATA)")
    folder = tmp_path_factory.mktemp("gpt2")
    save_random(folder, "gpt2", str(data / "gpt2"))
    return folder


@pytest.fixture(scope="module", params=compare.FORMATS)
def engines(request, model_dir, tmp_path_factory):
    """The engines of one format that run here, ours first."""
    threads = torch.get_num_threads()
    converted = tmp_path_factory.mktemp("converted")
    started, missing = compare.start(request.param, model_dir, threads, _FOLDER, converted)
    try:
        if not started or started[0].peer != compare.OURS or len(started) == 1:
            pytest.skip(f"nothing to compare: {'; '.join(missing)}")
        yield started
    finally:
        for engine in started:
            engine.close()


def test_all_engines_write_the_same(engines, model_dir):
    if engines[0].weights != "float32":
        pytest.skip("formats of fewer bits round each in its own way")
    same = compare.check(engines, Checkpoint(model_dir))
    assert set(same.values()) == {20}, same


@pytest.mark.parametrize("name", compare.CASES)
def test_speed(benchmark, engines, model_dir, name):
    """The table of pytest-benchmark shows a round of all of them; see extra_info."""
    checkpoint, threads = Checkpoint(model_dir), torch.get_num_threads()
    rows = []

    def measure():
        rows.append(compare.measure(engines, compare.CASES[name], 1, threads, checkpoint))

    benchmark.pedantic(measure, rounds=_ROUNDS)
    found = [
        compare.summary(compare.completed(row, engines[0].weights, checkpoint)) for row in rows
    ]
    for engine in engines:
        label = engine.label
        benchmark.extra_info[label] = {
            "tokens_per_second": statistics.median(row["speeds"][label] for row in found),
            "ours_over_it": statistics.median(row["ratios"][label] for row in found),
        }
    benchmark.extra_info["bandwidth"] = statistics.median(row["bandwidth"] for row in found)
