"""torch's default dtype and device do not change an op's results."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from comparison import backend
from gpt2fast import KVCache, ops
from op_arguments import CPU_BACKENDS, LACKS, arguments


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def default_device() -> Any:
    """A device without data: what is made there by mistake is of no use."""
    return torch.device("meta")


DEFAULTS: dict[str, Callable[[], Any]] = {
    "float64": lambda: default_dtype(torch.float64),
    "bfloat16": lambda: default_dtype(torch.bfloat16),
    "device": default_device,
}


def results(op: str, given: dict[str, Any]) -> list[torch.Tensor]:
    """An op's results, written arguments, and gradients where it has them."""
    leaves = {}
    if op not in ("decode_step", "packed_step", "packed_next", "sample", "attention_with_cache"):
        leaves = {
            name: value.requires_grad_()
            for name, value in given.items()
            if isinstance(value, torch.Tensor) and value.is_floating_point()
        }
    if op in ("append_to_cache", "reorder_cache"):
        leaves = {}
        for value in given.values():
            value.requires_grad_(False)
    out = getattr(ops, op)(**given)
    outputs = [] if out is None else [out] if isinstance(out, torch.Tensor) else list(out)
    found = [each.detach() for each in outputs]
    if leaves:
        total = torch.stack([each.float().square().sum() for each in outputs]).sum()
        found += torch.autograd.grad(total, list(leaves.values()))
    for value in given.values():
        for tensor in value if isinstance(value, list) else [value]:
            if isinstance(tensor, torch.Tensor):
                found.append(tensor.detach())
    return found


@pytest.mark.parametrize("name", CPU_BACKENDS)
@pytest.mark.parametrize("default", DEFAULTS)
def test_results_are_the_same_bit_for_bit(name, default):
    for op in ops.__all__:
        if op in LACKS.get(name, ()):
            continue
        for dropout_p in (0.0, 0.5):
            given = []
            for _ in range(2):
                torch.manual_seed(0)
                given.append(arguments()[op])
            if op == "causal_attention" and dropout_p:
                if name == "torch":
                    continue  # it has none
                for each in given:
                    each.update(dropout_p=dropout_p, seed=torch.tensor([3]))
            if op == "fused_adamw":
                for each in given:
                    each["step"] = 257  # which bfloat16 does not hold
            with backend(name):
                expected = results(op, given[0])
                with DEFAULTS[default]():
                    found = results(op, given[1])
            for mine, plain in zip(found, expected, strict=True):
                assert mine.dtype == plain.dtype and mine.device == plain.device, op
                assert torch.equal(mine, plain), op


@pytest.mark.parametrize("default", DEFAULTS)
def test_packing_and_caches_are_the_same(default):
    plain = arguments()["packed_step"]["weights"]
    with DEFAULTS[default]():
        packed = type(plain)(plain.shape, plain.formats)
        again = type(plain).from_arena(packed.arena)
        cache = KVCache(1, 2, 4, 2, 8, torch.int8, torch.device("cpu"))
    assert torch.equal(packed.arena, plain.arena) and again.shape == plain.shape
    assert cache.k_scales.dtype == torch.float32 and cache.lengths.device.type == "cpu"
