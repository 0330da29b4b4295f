"""Measure the settings of the Triton kernels on this machine's GPU; keep the fastest.

    python benchmarks/tune_triton.py                     all cases below
    python benchmarks/tune_triton.py attention_forward   those of some kernels

rewrites gpt2fast/ops/triton/tuning.json with one row for this GPU's architecture a case. Rows of
other architectures, and of sizes that are not measured here, stay as they are.
"""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from gpt2fast.ops.triton import tuning

DTYPE = torch.bfloat16
TOKENS = 16384
Settings = dict[str, int]
Tables = dict[str, list[dict[str, Any]]]


@dataclass(frozen=True)
class Case:
    """Work whose time depends on one kernel's settings."""

    kernel: str
    """Its table in tuning.json."""
    key: dict[str, int]
    """The sizes up to which the settings found shall be taken."""
    run: Callable[[], Any]
    """Launches the kernel; other kernels that it launches keep their settings."""
    candidates: list[Settings]


def grid(**values: list[int]) -> list[Settings]:
    """Every combination."""
    return [
        dict(zip(values, chosen, strict=True)) for chosen in itertools.product(*values.values())
    ]


def fastest(case: Case, arch: int, measure: Callable[[Callable[[], Any]], float]) -> Settings:
    """The candidate with the shortest time among those that the GPU can run."""
    rows = tuning.tables()[case.kernel]
    times: dict[int, float] = {}
    for index, candidate in enumerate(case.candidates):
        rows.insert(0, {"arch": arch, **case.key, "settings": candidate})
        tuning.settings.cache_clear()
        try:
            times[index] = measure(case.run)
        except Exception as error:  # too much shared memory, or a shape that a kernel refuses
            print(f"{case.kernel} {candidate}: {type(error).__name__}", file=sys.stderr)
        finally:
            rows.pop(0)
            tuning.settings.cache_clear()
    if not times:
        raise RuntimeError(f"no candidate for {case.kernel} {case.key} runs on this GPU")
    return case.candidates[min(times, key=lambda index: times[index])]


def place(rows: list[dict[str, Any]], row: dict[str, Any]) -> None:
    """Put a row into a table: instead of one with its key, or before the first that hides it."""
    key = {name: value for name, value in row.items() if name != "settings"}
    for index, other in enumerate(rows):
        if all(other[name] == value for name, value in key.items()):
            rows[index] = row
            return
    for index, other in enumerate(rows):
        sizes = (other[name] >= value for name, value in key.items() if name != "arch")
        if other["arch"] <= row["arch"] and all(sizes):
            rows.insert(index, row)
            return
    rows.append(row)


def text(tables: Tables) -> str:
    """tuning.json: a row a line."""
    parts = [
        f"  {json.dumps(kernel)}: [\n"
        + ",\n".join(f"    {json.dumps(row)}" for row in rows)
        + "\n  ]"
        for kernel, rows in tables.items()
    ]
    return "{\n" + ",\n".join(parts) + "\n}\n"


def random(*shape: int) -> Tensor:
    return torch.randn(shape, device="cuda", dtype=DTYPE)


def cases() -> Iterator[Case]:
    """The cases to measure: GPT-2's shapes, the most common options."""
    from gpt2fast.ops.backend import OPS, Implementation

    def run(op: str, *arguments: Any) -> Any:
        implementation = OPS[op].implementations["triton"]
        assert isinstance(implementation, Implementation)
        return implementation.run(OPS[op].bind(*arguments))

    blocks = grid(BLOCK_M=[32, 64, 128], BLOCK_N=[32, 64, 128], num_warps=[4, 8], num_stages=[2, 3])
    seed = torch.zeros(1, dtype=torch.int64, device="cuda")
    for width, dropout in itertools.product((64, 128), (0, 1)):
        q, k, v = random(TOKENS // 1024, 1024, 3, 768 // width, width).unbind(2)
        options = (width**-0.5, None, 0.1 * dropout, seed if dropout else None, True)
        out, lse = run("causal_attention", q, k, v, *options)
        key = {"element_size": 2, "head_dim": width, "dropout": dropout}

        def forward(q=q, k=k, v=v, options=options):
            return run("causal_attention", q, k, v, *options)

        def backward(q=q, k=k, v=v, out=out, lse=lse, options=options):
            return run("causal_attention_backward", out, q, k, v, out, lse, *options)

        yield Case("attention_forward", key, forward, blocks)
        yield Case("attention_keys", {**key, "shared": 0}, backward, blocks)
        yield Case("attention_queries", key, backward, blocks)
    cache = random(8, 1024, 12, 64)
    lengths = torch.full((8,), 1000, device="cuda")
    for queries, heights in ((1, [1]), (16, [16])):
        q = random(8, queries, 12, 64)
        yield Case(
            "attention_with_cache",
            {"element_size": 2, "head_dim": 64, "queries": queries},
            partial(run, "attention_with_cache", q, cache, cache, lengths, 0.125),
            grid(BLOCK_M=heights, BLOCK_N=[32, 64, 128], num_warps=[2, 4, 8], num_stages=[2, 3]),
        )
    vectors = [random(768), random(768)]
    layer = [*vectors, random(768, 2304), random(2304), random(768, 768), random(768)]
    layer += [*vectors, random(768, 3072), random(3072), random(3072, 768), random(768)]
    weights = [random(50257, 768), random(1024, 768), *layer, *vectors]
    weights.append(weights[0])
    for batch, heights in ((1, [1]), (16, [16])):
        caches = [random(1, batch, 1024, 12, 64) for _ in "kv"]
        indices = [torch.full((batch,), 500, device="cuda") for _ in range(3)]
        yield Case(
            "decode_matmul",
            {"element_size": 2, "batch": batch, "outputs": 4096},
            partial(run, "decode_step", weights, *caches, *indices, 12, [0.125], "gelu_new", 1e-5),
            grid(
                BLOCK_B=heights,
                BLOCK_K=[64, 128, 256],
                BLOCK_N=[16, 32, 64],
                num_warps=[4, 8],
                num_stages=[2, 3],
            ),  # fmt: skip
        )
    x, w_fc, b_fc = random(TOKENS, 768), random(768, 3072), random(3072)
    w_proj, b_proj = random(3072, 768), random(768)
    for kernel in ("matmul_gelu", "matmul"):
        yield Case(
            kernel,
            {"element_size": 2, "unaligned": 0},
            lambda: run("gelu_mlp", x, w_fc, b_fc, w_proj, b_proj),
            grid(
                BLOCK_M=[64, 128],
                BLOCK_N=[128, 256],
                BLOCK_K=[32, 64],
                GROUP_M=[8],
                num_warps=[4, 8],
                num_stages=[3, 4],
            ),  # fmt: skip
        )


def main(wanted: list[str]) -> None:
    if not torch.cuda.is_available():
        sys.exit("there is no CUDA GPU to measure on")
    from triton.testing import do_bench

    arch = tuning.architecture(torch.device("cuda", torch.cuda.current_device()))
    for case in cases():
        if wanted and case.kernel not in wanted:
            continue
        found = fastest(case, arch, lambda run: do_bench(run, return_mode="median"))
        place(tuning.tables()[case.kernel], {"arch": arch, **case.key, "settings": found})
        tuning.settings.cache_clear()
        print(case.kernel, case.key, found, flush=True)
        tuning.PATH.write_text(text(tuning.tables()), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
