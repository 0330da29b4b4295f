"""Memory that is read from end to end at every step."""

from __future__ import annotations

import contextlib
import math
import mmap
from collections.abc import Sequence

import torch
from torch import Tensor

# Below, the pages of a tensor's own allocation do as well.
_WORTHWHILE = 4 << 20  # bytes


def zeros(
    shape: Sequence[int],
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """A tensor of zeros; a large one on the CPU has huge pages where the system gives them.

    A processor then looks up 512 times fewer addresses, and memory is taken as it is written to.
    """
    dtype = dtype or torch.get_default_dtype()
    size = math.prod(shape) * dtype.itemsize
    where = torch.device(device) if device is not None else torch.get_default_device()
    if where.type != "cpu" or size < _WORTHWHILE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.zeros(shape, dtype=dtype, device=device)
    # Private: shared memory, which is Python's default, gets huge pages on few systems.
    block = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel without them
        block.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(block, dtype=dtype).view(tuple(shape))
