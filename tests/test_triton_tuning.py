"""The tables of settings, and how they are measured anew."""

from __future__ import annotations

import importlib.util
import itertools
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from gpt2fast.ops.triton import tuning


@pytest.fixture(scope="module")
def tuner() -> Iterator[ModuleType]:
    path = Path(__file__).parents[1] / "benchmarks" / "tune_triton.py"
    spec = importlib.util.spec_from_file_location("tune_triton", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # A dataclass looks its module up.
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "tune_triton", module)
        spec.loader.exec_module(module)
        yield module


@pytest.mark.parametrize("arch", [80, 86, 89, 90, 100, 120])
@pytest.mark.parametrize("element_size", [2, 4])
@pytest.mark.parametrize("head_dim", [1, 32, 64, 80, 128])
def test_every_gpu_and_head_has_settings(arch, element_size, head_dim):
    key = {"element_size": element_size, "head_dim": head_dim}
    for kernel in ("attention_forward", "attention_keys", "attention_queries"):
        for dropout in (0, 1):
            found = tuning.for_architecture(kernel, arch, **key, dropout=dropout)
            # Dropout draws for 32 keys at once.
            assert found["BLOCK_N"] % 32 == 0
    for dropout, shared in itertools.product((0, 1), (0, 1)):
        tuning.for_architecture("attention_keys", arch, **key, dropout=dropout, shared=shared)
    for queries in (1, 2, 5000):
        found = tuning.for_architecture("attention_with_cache", arch, **key, queries=queries)
        assert (found["BLOCK_M"] == 1) == (queries == 1)
    for batch in (1, 2, 200):
        size = {"element_size": element_size, "outputs": 50257}
        found = tuning.for_architecture("decode_matmul", arch, **size, batch=batch)
        assert (found["BLOCK_B"] == 1) == (batch == 1)


def test_what_no_row_fits_is_an_error():
    with pytest.raises(KeyError, match="sm_70"):
        tuning.for_architecture("release_rows", 70)


def test_the_table_is_written_as_it_is_read(tuner):
    assert tuner.text(tuning.tables()) == tuning.PATH.read_text(encoding="utf-8")


def test_the_fastest_candidate_that_runs_is_kept(tuner, monkeypatch):
    rows = [{"arch": 80, "head_dim": 64, "settings": {"BLOCK": 1}}]
    monkeypatch.setitem(tuning.tables(), "example", rows)

    def run():
        return tuning.for_architecture("example", 90, head_dim=64)["BLOCK"]

    def measure(run):
        if run() == 4:
            raise RuntimeError("out of shared memory")
        return 10 / run()

    case = tuner.Case("example", {"head_dim": 64}, run, tuner.grid(BLOCK=[2, 3, 4], num_warps=[8]))
    assert tuner.fastest(case, 90, measure) == {"BLOCK": 3, "num_warps": 8}
    assert run() == 1


def test_a_new_row_is_found_and_hides_no_other(tuner):
    rows = [{"arch": 120, "n": 1, "settings": 0}, {"arch": 80, "n": 4, "settings": 1}]
    for arch, n, settings in [
        (90, 2, 2),
        (90, 1, 3),
        (90, 4, 4),
        (80, 4, 5),
        (80, 2, 6),
        (90, 8, 7),
    ]:
        tuner.place(rows, {"arch": arch, "n": n, "settings": settings})
    assert [row["settings"] for row in rows] == [0, 3, 2, 4, 6, 5, 7]
