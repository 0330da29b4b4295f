"""The ops as CUDA kernels: finding, building and loading the library that holds them.

The library's ops are in the namespace `gpt2fast_cuda`. It is found, or compiled, when the first
CUDA tensor arrives. The backend is `native`, as for the CPU's kernels: `by_device` takes the one or
the other, and where both have an op of one schema, `kernels` names the one that a tensor needs.
A module of this package prepares the arguments of a family whose CUDA kernels ask for others.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ...errors import BackendError
from ...kernels.library import Library, find_library, is_switched_off, notice
from ...kernels.toolchain import CUDA
from .. import native
from ..backend import AVAILABILITY, ByDevice, Implementation
from ..support import GPU_DTYPES as DTYPES
from ..support import Kernels

_lock = threading.Lock()
_library: Library | None = None
_reason: str | None = None
_simulating = False


def unavailable() -> str | None:
    """The reason that CUDA kernels are unavailable, or None. The first call loads or builds
    them."""
    global _library, _reason
    if _simulating:
        return None
    if _reason is None:
        with _lock:
            if _reason is None:  # another thread was not faster
                try:
                    _library = _find_and_load()
                    _reason = ""
                except BackendError as error:
                    _reason = str(error)
                    if torch.cuda.is_available() and not is_switched_off():
                        notice(f"no CUDA kernels, Triton or torch run instead: {error}")
    return _reason or None


def loaded() -> Library | None:
    """The library that runs, or None if there is none: `unavailable()` says why."""
    unavailable()
    return _library


def _find_and_load() -> Library:
    if not torch.cuda.is_available():
        raise BackendError("there is no CUDA GPU")
    library = find_library(CUDA, _architectures())
    try:
        native.load_library(library, "gpt2fast_cuda", CUDA)
    except OSError as error:
        raise BackendError(native.does_not_load(library, error)) from None
    return library


def _architectures() -> tuple[str, ...]:
    """Architectures of the GPUs here, by their names in nvcc."""
    found = {torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())}
    if min(found) < (8, 0):
        major, minor = min(found)
        raise BackendError(f"a GPU here has compute capability {major}.{minor}; they need 8.0")
    # Only "90a" has all that Hopper can do.
    names = {(9, 0): "90a"}
    return tuple(names.get(both, f"{both[0]}{both[1]}") for both in sorted(found))


def _available() -> str | None:
    """The reason that there are no compiled kernels at all, or None."""
    reason = native.unavailable()
    return reason if reason is None or unavailable() is not None else None


AVAILABILITY["native"] = _available


@contextmanager
def simulated(library: Library) -> Iterator[None]:
    """Run the CUDA kernels on CPU tensors within a `with` block, in the simulator: for tests."""
    global _simulating
    torch.ops.load_library(library.path)
    _simulating = True
    try:
        yield
    finally:
        _simulating = False


cuda = Kernels("CUDA kernels", DTYPES, lambda: unavailable())
"""The kernels in `torch.ops.gpt2fast_cuda`."""


def takes(tensor: Tensor) -> bool:
    """The tensor is on a device of the CUDA kernels, should there be any."""
    return _simulating or tensor.is_cuda


def kernels(tensor: Tensor) -> Any:
    """The namespace of the compiled kernels that run on the tensor's device."""
    return torch.ops.gpt2fast_cuda if takes(tensor) else torch.ops.gpt2fast_native


def by_device(cpu: Implementation, cuda: Implementation) -> ByDevice:
    """The one implementation for CUDA tensors, the other for all others."""
    return ByDevice(cpu, cuda, takes)
