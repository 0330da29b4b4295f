"""Copies between the host and a GPU that the host does not wait for."""

from __future__ import annotations

import torch
from torch import Tensor


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A CPU tensor on `device`, in the order of what runs there.

    `torch.tensor(..., device=...)` and `.to(device)` copy out of memory that the system may move,
    and therefore wait until everything before them on the GPU has run. Pinned memory is read later;
    torch keeps it until then.
    """
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def to_host(tensor: Tensor) -> tuple[Tensor, torch.cuda.Event | None]:
    """A copy on the CPU, and the event to wait for before it is read; None: it is there."""
    if not tensor.is_cuda:
        return tensor, None
    # Explicitly on the CPU: pinned memory would fail on another default device.
    host = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=True)
    host.copy_(tensor, non_blocking=True)
    done = torch.cuda.Event()
    done.record(torch.cuda.current_stream(tensor.device))
    return host, done
