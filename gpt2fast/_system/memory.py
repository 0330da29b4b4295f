"""Memory: how much there is, and blocks of it that are read from end to end at every step."""

from __future__ import annotations

import contextlib
import math
import mmap
from collections.abc import Sequence
from pathlib import Path

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


def available(device: torch.device) -> int | None:
    """Bytes that can still be taken; None where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    free: list[int] = []
    with contextlib.suppress(OSError, ValueError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                free.append(int(line.split()[1]) * 1024)
    with contextlib.suppress(OSError, ValueError):  # a container's share
        folder = Path("/sys/fs/cgroup")
        limit = int((folder / "memory.max").read_text())
        free.append(limit - int((folder / "memory.current").read_text()))
    return min(free) if free else None
