"""The memory of a training step: predicted before the first one, measured after it."""

from __future__ import annotations

import mmap
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from ...config import GPT2Config

# Bytes that the ops of a block save for the backward pass, for each token and unit of width, as
# `torch.autograd.graph.saved_tensors_hooks` counts them. Two of the values, the residual stream,
# are float32 in every precision.
_SAVED = {"float32": 48, "bfloat16": 28, "float16": 28}
_SAVED_WITH_DROPOUT = {"float32": 8, "bfloat16": 4, "float16": 4}
_SAVED_CHECKPOINTED = {"float32": 8, "bfloat16": 6, "float16": 6}


@dataclass(frozen=True)
class Prediction:
    """Bytes in one process."""

    state: int
    """Weights, gradients, the optimizer's averages."""
    activations: int
    """All that the forward pass of one batch keeps for the backward pass."""

    @property
    def total(self) -> int:
        return self.state + self.activations


def predict(
    shape: GPT2Config,
    tokens: int,
    *,
    dtype: str = "float32",
    trained: int | None = None,
    optimizer_state: int | None = None,
    checkpoint_activations: bool = False,
    parallel: str = "ddp",
    processes: int = 1,
) -> Prediction:
    """The memory that training takes.

    Args:
        shape: of the model.
        tokens: of one forward pass in one process, batch x time.
        dtype: float32, bfloat16 or float16 (autocast; everything else stays float32).
        trained: parameters that are trained; None means all.
        optimizer_state: bytes that the optimizer keeps; None means AdamW's two float32 averages for
            each trained parameter.
        checkpoint_activations, parallel, processes: as in the run.
    """
    width = shape.n_embd
    count = shape.parameter_count
    trained = count if trained is None else trained
    moments = 8 * trained if optimizer_state is None else optimizer_state
    weights, gradients = 4 * count, 4 * trained
    if parallel == "fsdp":
        weights, gradients = weights // processes, gradients // processes
    if parallel in ("fsdp", "zero"):
        moments //= processes
    block = _SAVED[dtype] + (_SAVED_WITH_DROPOUT[dtype] if shape.resid_pdrop else 0)
    kept = (_SAVED_CHECKPOINTED[dtype] if checkpoint_activations else block) * shape.n_layer
    # While a block is computed again, its own activations are there as well.
    kept += block if checkpoint_activations else 0
    itemsize = 4 if dtype == "float32" else 2
    copies = 0 if dtype == "float32" else 2 * count
    # The gradients of the output projection are computed in the forward pass.
    projection = shape.vocab_size * width * itemsize
    return Prediction(
        weights + gradients + moments, tokens * width * (kept + 8) + copies + projection
    )


def peak(device: torch.device) -> int:
    """Most bytes that were held at once so far: by tensors on a GPU, by the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return 0
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def held(device: torch.device) -> int:
    """Bytes that are held now, as `peak` counts."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except (OSError, ValueError):
        return 0
    return pages * mmap.PAGESIZE


def gib(size: int) -> str:
    """`size` bytes for people."""
    return f"{size / 2**30:.2f} GiB" if size >= 2**27 else f"{size / 2**20:.0f} MiB"
