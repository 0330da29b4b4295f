"""The library of compiled kernels (csrc), and what all its ops ask of their arguments."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from .backend import Implementation

DTYPES = (torch.float32, torch.bfloat16)
"""What the CPU kernels store; they compute in float32."""


@cache
def unavailable() -> str | None:
    """Load the library, once; returns why there is none, or None."""
    path = os.environ.get("GPT2FAST_LIBRARY")
    if path is None:
        return "no compiled kernels in this version"
    torch.ops.load_library(path)
    return None


def native(run: Callable[..., Any], refuses: Callable[..., str | None]) -> Implementation:
    """An implementation that calls `torch.ops.gpt2fast_native`; it refuses without the library."""
    return Implementation(run, lambda *args, **kwargs: unavailable() or refuses(*args, **kwargs))


def refuses_tensors(*tensors: Tensor | None) -> str | None:
    """Why the CPU kernels cannot read these tensors, or None; absent ones don't count."""
    given = [tensor for tensor in tensors if tensor is not None]
    for tensor in given:
        if tensor.device.type != "cpu":
            return f"the native kernels run on the CPU, and a tensor is on {tensor.device}"
        if tensor.dtype not in DTYPES:
            return f"the native kernels take float32 and bfloat16, not {tensor.dtype}"
        if tensor.dtype != given[0].dtype:
            return f"the native kernels take one dtype, not {given[0].dtype} and {tensor.dtype}"
    return None
