"""The ops as Triton kernels: where they run, and what they ask of their arguments.

A module of this package holds the kernels of one family of ops and the functions that launch them.
It is imported when the first of its ops runs: importing gpt2fast does not import triton.

The kernels run on CUDA tensors. With TRITON_INTERPRET=1 in the environment when triton is first
imported, its interpreter runs them on CPU tensors, too: for tests, and only where this backend was
forced.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..backend import AVAILABILITY, Implementation, requested_backend
from ..derivatives import tensors_in

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
"""What the kernels store; they compute in float32."""


def interpreting() -> bool:
    """Whether Triton's interpreter runs the kernels, in place of a GPU."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")


@functools.cache
def _installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def unavailable() -> str | None:
    """Why there are no Triton kernels here, or None."""
    if not _installed():
        return "the package triton is not installed"
    if not interpreting() and not torch.cuda.is_available():
        return "there is no CUDA GPU, and TRITON_INTERPRET=1 is not set"
    if not interpreting() and torch.cuda.get_device_capability() < (8, 0):
        return "the Triton kernels need compute capability 8.0"
    return None


AVAILABILITY["triton"] = unavailable


def unsuitable(
    *tensors: Tensor | None,
    dtypes: tuple[torch.dtype, ...] = DTYPES,
    one_dtype: bool = False,
    may_be_empty: bool = False,
) -> str | None:
    """Why the kernels cannot take these tensors, or None. Absent tensors do not count.

    Args:
        dtypes: of those that hold floating-point numbers.
        one_dtype: whether these must be of one dtype.
        may_be_empty: whether tensors without elements pass.
    """
    given = [tensor for tensor in tensors if tensor is not None]
    floating = [tensor for tensor in given if tensor.is_floating_point()]
    for tensor in given:
        if tensor.device != given[0].device:
            return f"tensors are on {given[0].device} and on {tensor.device}"
        if not (tensor.numel() or may_be_empty):
            return "the Triton kernels need at least one element"
    for tensor in floating:
        if tensor.dtype not in dtypes:
            names = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
            return f"the Triton kernel takes {names}, not {tensor.dtype}"
        if one_dtype and tensor.dtype != floating[0].dtype:
            return f"the Triton kernel takes one dtype, not {floating[0].dtype} and {tensor.dtype}"
    if given and given[0].device.type != "cuda":
        if given[0].device.type != "cpu":
            return f"the Triton kernels run on a CUDA GPU, and a tensor is on {given[0].device}"
        if not interpreting():
            return "the Triton kernels run on a GPU, and a tensor is on the CPU"
    return None


def refuses_strided_caches(*caches: Tensor) -> str | None:
    """Why the kernels cannot read these caches, or None."""
    if any(cache.stride(-1) != 1 and cache.shape[-1] != 1 for cache in caches):
        return "the Triton kernels read caches whose last dimension is contiguous"
    return None


def _refuses_arguments(*arguments: Any) -> str | None:
    return unsuitable(*tensors_in(arguments), may_be_empty=True)


def triton(
    module: str, function: str, refuses: Callable[..., str | None] = _refuses_arguments
) -> Implementation:
    """The implementation `function` in the module `module` of this package, imported at first use.

    Args:
        module, function: names.
        refuses: takes the op's arguments; returns why the kernels cannot run them, or None. By
            default, no tensor may be `unsuitable`; empty ones pass.
    """

    @functools.cache
    def load() -> Callable[..., Any]:
        return getattr(importlib.import_module(f"{__name__}.{module}"), function)

    def run(*arguments: Any) -> Any:
        device = next(tensors_in(arguments)).device
        if device.type == "cpu" or device.index == torch.cuda.current_device():
            return load()(*arguments)
        with torch.cuda.device(device):  # Triton launches on the current one
            return load()(*arguments)

    def refusal(*arguments: Any) -> str | None:
        reason = unavailable()
        if reason is None and interpreting() and requested_backend() == "auto":
            reason = "the interpreter runs where this backend is forced, and only there"
        return reason or refuses(*arguments)

    return Implementation(run, refusal)
