"""Run an op beside torch's own expression of it and in float64, gradients included."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

import gpt2fast
from gpt2fast.errors import BackendError
from gpt2fast.kernels.library import Library, find_library
from gpt2fast.kernels.toolchain import SIMULATED, find_toolchain
from gpt2fast.ops.cuda import DTYPES as CUDA_DTYPES
from gpt2fast.ops.cuda import simulated
from gpt2fast.ops.native import DTYPES as NATIVE_DTYPES
from gpt2fast.ops.native import unavailable
from gpt2fast.ops.triton import DTYPES as TRITON_DTYPES
from gpt2fast.ops.triton import interpreting
from gpt2fast.ops.triton import unavailable as triton_unavailable
from thread_order import THREAD_ORDER
from tolerance import assert_close

needs_native = pytest.mark.skipif(unavailable() is not None, reason=str(unavailable()))
# These tests' tensors are on the CPU.
_no_triton = triton_unavailable() or (None if interpreting() else "TRITON_INTERPRET=1 is not set")
needs_triton = pytest.mark.skipif(_no_triton is not None, reason=str(_no_triton))


def _no_simulator() -> str | None:
    try:
        find_toolchain(SIMULATED)
    except BackendError as error:
        return str(error)
    return None


needs_simulator = pytest.mark.skipif(_no_simulator() is not None, reason=str(_no_simulator()))
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA GPU")
BACKENDS: list[Any] = [
    pytest.param("native", marks=needs_native),
    "torch",
    "reference",
    pytest.param("triton", marks=needs_triton),
    pytest.param("simulator", marks=needs_simulator),
    # The fixture `device` of conftest.py creates these tests' tensors on the GPU.
    pytest.param("cuda", marks=[needs_gpu, pytest.mark.gpu]),
    pytest.param("cuda-triton", marks=[needs_gpu, pytest.mark.gpu]),
]
TRITON_BACKENDS = [
    each for each in BACKENDS if getattr(each, "values", ()) in (("triton",), ("cuda-triton",))
]
CUDA_BACKENDS = [
    each for each in BACKENDS if getattr(each, "values", ()) in (("simulator",), ("cuda",))
]
"""Backends that run the CUDA kernels."""
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


@cache
def simulated_library() -> Library:
    """The CUDA kernels, compiled for the simulator."""
    return find_library(SIMULATED)


@contextmanager
def backend(name: str) -> Iterator[None]:
    """`gpt2fast.backend`, which knows more names.

    "simulator" are the CUDA kernels on a CPU, "cuda" and "cuda-triton" both kinds on a GPU.
    """
    on_gpu = {"cuda": "native", "cuda-triton": "triton"}
    if name == "simulator":
        THREAD_ORDER.simulated = True
        with simulated(simulated_library()), gpt2fast.backend("native"):
            yield
    else:
        with gpt2fast.backend(on_gpu.get(name, name)):
            yield


def seeded(seed: int) -> torch.Generator:
    """A source of random numbers where tensors are created by default."""
    return torch.Generator(torch.get_default_device()).manual_seed(seed)


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
    if name in ("simulator", "cuda") and dtype not in CUDA_DTYPES:
        pytest.skip(f"the CUDA kernels leave {dtype} to torch")
    if name in ("triton", "cuda-triton") and dtype not in TRITON_DTYPES:
        pytest.skip(f"the Triton kernels leave {dtype} to torch")
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
    result = function(*(layout(leaf) for leaf in leaves))
    outputs = [result] if isinstance(result, Tensor) else list(result)
    generator = seeded(1)
    directions = [
        torch.randn(out.shape, generator=generator).bfloat16().to(out.dtype) for out in outputs
    ]
    gradients = torch.autograd.grad(outputs, leaves, directions)
    return [out.detach() for out in outputs], list(gradients)
