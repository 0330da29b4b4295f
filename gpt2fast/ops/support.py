"""Requirements of a backend's kernels, declared beside each implementation and checked here.

    @native(Tensors("q", "k", "v", one_dtype=True))
    def _native(call: Arguments) -> tuple[Tensor, Tensor]: ...

makes `_native` an `Implementation` that refuses calls whose tensors do not meet this. Unlike the
checks of requirements.py, a refusal is no error: the next backend is tried.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from .backend import Arguments, Implementation, first_tensor

GPU_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
"""Dtypes of tensors that kernels for GPUs read and write; they compute in float32."""
GPU_CACHE_DTYPES = (*GPU_DTYPES, torch.int8)
"""Dtypes of caches that kernels for GPUs read and write."""
MAX_HEAD_SIZE = 128
"""Largest size of a head in kernels for GPUs."""


class Tensors:
    """Requirements on some tensors of a call. Those that are None pass.

    Args:
        names: arguments of the op; one may be a list of tensors.
        dtypes: allowed dtypes of floating-point tensors and int8 caches; None means the backend's
            own.
        one_dtype: all must be of one dtype.
        may_be_empty: tensors without elements pass.
        contiguous_rows: the last dimension must be contiguous.
        max_head_size: largest last dimension, which is a head's size.
    """

    def __init__(
        self,
        *names: str,
        dtypes: tuple[torch.dtype, ...] | None = None,
        one_dtype: bool = False,
        may_be_empty: bool = False,
        contiguous_rows: bool = False,
        max_head_size: int | None = None,
    ):
        get: Callable[[Arguments], Any] = attrgetter(*names)
        self.of: Callable[[Arguments], Sequence[Tensor | None]] = (
            get if len(names) > 1 else lambda call: _as_list(get(call))
        )
        """Returns the tensors of a call."""
        self.dtypes = dtypes
        self.one_dtype = one_dtype
        self.may_be_empty = may_be_empty
        self.contiguous_rows = contiguous_rows
        self.max_head_size = max_head_size


def _as_list(argument: Tensor | list[Tensor] | None) -> Sequence[Tensor | None]:
    return argument if isinstance(argument, list) else (argument,)


@dataclass(frozen=True)
class Kernels:
    """The kernels of a backend: availability, device, and default requirements.

    A call makes a decorator for functions that launch them.
    """

    name: str
    """Name in refusals: "native kernels"."""
    dtypes: tuple[torch.dtype, ...]
    unavailable: Callable[[], str | None]
    """Returns a reason why there are none here, or None."""
    wrong_device: Callable[[Tensor], str | None] = lambda tensor: None
    """Returns a reason not to run on a tensor's device, or None."""
    no_int8: str | None = None
    """Reason that kernels refuse int8 caches unless declared otherwise."""

    def __call__(
        self,
        *required: Tensors,
        refuses: Callable[[Arguments], str | None] | None = None,
        checks: bool = False,
    ) -> Callable[[Callable[[Arguments], Any]], Implementation]:
        """An implementation that refuses without a library, or where tensors do not suit.

        Args:
            required: requirements on the call's tensors.
            refuses: returns another reason not to run a call, or None.
            checks: as in `Implementation`.
        """

        def refusal(call: Arguments) -> str | None:
            reason = self.unavailable() or self.wrong_device(first_tensor(call))
            if reason is not None:
                return reason
            for tensors in required:
                reason = self.unsuitable(tensors, tensors.of(call))
                if reason is not None:
                    return reason
            return None if refuses is None else refuses(call)

        return lambda run: Implementation(run, refusal, checks)

    def unsuitable(self, required: Tensors, tensors: Iterable[Tensor | None]) -> str | None:
        """A reason why the kernels cannot take these tensors, or None."""
        dtypes = required.dtypes or self.dtypes
        dtype = None
        for tensor in tensors:
            if tensor is None:
                continue
            if not (required.may_be_empty or tensor.numel()):
                return f"the {self.name} need at least one element"
            found = tensor.dtype
            if found not in dtypes and (found == torch.int8 or tensor.is_floating_point()):
                if found == torch.int8:
                    return self.no_int8 or f"the {self.name} have no 8-bit caches"
                names = [str(each).removeprefix("torch.") for each in dtypes]
                return f"the {self.name} take {', '.join(names)}, not {found}"
            if required.one_dtype and found is not dtype:
                if dtype is None:
                    dtype = found
                else:
                    return f"the {self.name} take one dtype, not {dtype} and {found}"
            if required.contiguous_rows and tensor.stride(-1) != 1 and tensor.shape[-1] != 1:
                return f"the {self.name} read caches whose last dimension is contiguous"
            if required.max_head_size is not None and tensor.shape[-1] > required.max_head_size:
                return (
                    f"the {self.name} take heads of size up to {required.max_head_size}, "
                    f"not {tensor.shape[-1]}"
                )
        return None
