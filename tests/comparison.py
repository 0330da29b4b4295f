"""Run an op beside torch's own expression of it and in float64, gradients included."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from gpt2fast import backend
from gpt2fast.ops.native import DTYPES as NATIVE_DTYPES
from gpt2fast.ops.native import unavailable
from tolerance import assert_close

needs_native = pytest.mark.skipif(unavailable() is not None, reason=str(unavailable()))
BACKENDS = [pytest.param("native", marks=needs_native), "torch", "reference"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def contiguous(x: Tensor) -> Tensor:
    """x as it is."""
    return x


def strided(x: Tensor) -> Tensor:
    """x as every other element of a larger tensor's last dimension."""
    larger = x.new_zeros(*x.shape[:-1], 2 * x.shape[-1])
    larger[..., ::2] = x
    return larger[..., ::2]


def unaligned(x: Tensor) -> Tensor:
    """x in memory that begins one element past an aligned address."""
    flat = x.new_zeros(x.numel() + 1)
    flat[1:] = x.reshape(-1)
    return flat[1:].view(x.shape)


LAYOUTS = [contiguous, strided, unaligned]


def random(*shape: int) -> Tensor:
    """Standard normal values in float64, rounded to bfloat16 so that every dtype holds them."""
    return torch.randn(shape).bfloat16().double()


def compare(
    ours: Callable[..., Tensor | tuple[Tensor, ...]],
    theirs: Callable[..., Tensor | tuple[Tensor, ...]],
    inputs: Sequence[Tensor],
    dtype: torch.dtype,
    name: str,
    layout: Callable[[Tensor], Tensor] = contiguous,
) -> None:
    """Hold outputs and input gradients of `ours` against the project's tolerance rule.

    Args:
        ours, theirs: take `inputs`, return one tensor or several.
        inputs: float64 tensors, all differentiable.
        dtype: in which `ours` and `theirs` are compared.
        name: backend of `ours`.
        layout: how our inputs lie in memory.
    """
    if name == "native" and dtype not in NATIVE_DTYPES:
        pytest.skip(f"the native kernels leave {dtype} to torch")
    exact, exact_gradients = _run(theirs, inputs, torch.float64, contiguous)
    other, other_gradients = _run(theirs, inputs, dtype, contiguous)
    with backend(name):
        mine, my_gradients = _run(ours, inputs, dtype, layout)
    assert_close(mine, other, exact, times=2.0)
    assert_close(my_gradients, other_gradients, exact_gradients, times=3.0)


def _run(
    function: Callable[..., Tensor | tuple[Tensor, ...]],
    inputs: Sequence[Tensor],
    dtype: torch.dtype,
    layout: Callable[[Tensor], Tensor],
) -> tuple[list[Tensor], list[Tensor]]:
    leaves = [x.to(dtype).requires_grad_() for x in inputs]
    outputs = function(*(layout(leaf) for leaf in leaves))
    outputs = [outputs] if isinstance(outputs, Tensor) else list(outputs)
    generator = torch.Generator().manual_seed(1)
    directions = [
        torch.randn(out.shape, generator=generator).bfloat16().to(out.dtype) for out in outputs
    ]
    gradients = torch.autograd.grad(outputs, leaves, directions)
    return [out.detach() for out in outputs], list(gradients)
