"""Choice of cuBLASLt for matrix products, which its epilogues finish.

csrc/launch/cublaslt.h counts what that spares. It is wanted for float16 and bfloat16 where every
GPU has compute capability 9.0 at least. What the library cannot do is multiplied by torch.

    GPT2FAST_CUBLASLT=1              wanted on any GPU
    GPT2FAST_CUBLASLT=0              not wanted
    GPT2FAST_CUBLASLT_LIBRARY=FILE   this library and no other, instead of the one that torch loaded
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch
from torch import Tensor

from ..backend import requested_backend
from . import takes

DTYPES = (torch.float16, torch.bfloat16)
"""Dtypes that it multiplies: float32 could only gain by TF32, which would lose digits."""

_forced: bool | None = None


def is_wanted(x: Tensor) -> bool:
    """An op whose first argument is x should use it."""
    return (
        x.dtype in DTYPES
        and takes(x)
        and requested_backend() in ("auto", "native")
        and ((x.is_cuda and _by_default()) if _forced is None else _forced)
    )


def _by_default() -> bool:
    named = os.environ.get("GPT2FAST_CUBLASLT", "").lower()
    if named:
        return named not in ("0", "off", "no", "false")
    return _suits_the_gpus()


# Set by `torch.compiler.assume_constant_result`, which would import the compiler, 1 s, to do so.
_by_default._dynamo_marked_constant = True  # type: ignore[attr-defined]


@cache
def _suits_the_gpus() -> bool:
    count = torch.cuda.device_count()
    return count > 0 and all(torch.cuda.get_device_capability(i) >= (9, 0) for i in range(count))


@contextmanager
def forced(on: bool) -> Iterator[None]:
    """Want it or not, whatever the GPU, within a `with` block: for tests and benchmarks."""
    global _forced
    previous, _forced = _forced, on
    try:
        yield
    finally:
        _forced = previous


def missing(x: Tensor) -> str | None:
    """The reason that x's device has no cuBLASLt, or None; needs the CUDA kernels."""
    if not is_compiled():
        return "the CUDA kernels were compiled without cublasLt.h"
    return torch.ops.gpt2fast_cuda.cublaslt_missing(x) or None


def is_compiled() -> bool:
    """The loaded library of CUDA kernels was compiled with cuBLASLt."""
    return hasattr(torch.ops.gpt2fast_cuda, "cublaslt_bias")
