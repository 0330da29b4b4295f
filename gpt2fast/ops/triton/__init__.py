"""The ops as Triton kernels: where they run, and how they are imported and launched.

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

from ..backend import AVAILABILITY, Arguments, Implementation, first_tensor, requested_backend
from ..support import GPU_DTYPES as DTYPES
from ..support import Kernels, Tensors


def interpreting() -> bool:
    """True if Triton's interpreter runs the kernels, in place of a GPU."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")


@functools.cache
def _installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def unavailable() -> str | None:
    """The reason that Triton kernels are unavailable, or None."""
    if not _installed():
        return "the package triton is not installed"
    if not interpreting() and not torch.cuda.is_available():
        return "there is no CUDA GPU, and TRITON_INTERPRET=1 is not set"
    if not interpreting() and torch.cuda.get_device_capability() < (8, 0):
        return "the Triton kernels need compute capability 8.0"
    return None


AVAILABILITY["triton"] = unavailable


def _unavailable_unless_forced() -> str | None:
    reason = unavailable()
    if reason is None and interpreting() and requested_backend() == "auto":
        return "the interpreter runs where this backend is forced, and only there"
    return reason


def _wrong_device(tensor: Tensor) -> str | None:
    if tensor.is_cuda or (tensor.is_cpu and interpreting()):
        return None
    if tensor.is_cpu:
        return "the Triton kernels run on a GPU, and a tensor is on the CPU"
    return f"the Triton kernels run on a CUDA GPU, and a tensor is on {tensor.device}"


_KERNELS = Kernels("Triton kernels", DTYPES, _unavailable_unless_forced, _wrong_device)


def triton(
    module: str,
    function: str,
    *required: Tensors,
    refuses: Callable[[Arguments], str | None] | None = None,
) -> Implementation:
    """The implementation `function` in the module `module` of this package, imported at first use.

    Args:
        module, function: names.
        required, refuses: as in `Kernels`.
    """

    @functools.cache
    def load() -> Callable[[Arguments], Any]:
        return getattr(importlib.import_module(f"{__name__}.{module}"), function)

    def run(call: Arguments) -> Any:
        device = first_tensor(call).device
        if device.type == "cpu" or device.index == torch.cuda.current_device():
            return load()(call)
        with torch.cuda.device(device):  # Triton launches on the current one
            return load()(call)

    return _KERNELS(*required, refuses=refuses)(run)
