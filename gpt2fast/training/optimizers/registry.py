"""The optimizers that the setting `optimizer` chooses from. To add one, add an entry here."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .adamw import AdamW


@dataclass(frozen=True)
class Entry:
    """An optimizer as settings, help, checkpoints and the prediction of memory know it."""

    make: type[torch.optim.Optimizer]
    """The class: called with parameter groups and `arguments`."""
    arguments: Callable[[Any], dict[str, Any]]
    """Keyword arguments for a run's settings (a TrainConfig); `lr` is set before every step."""
    state: tuple[str, ...]
    """Keys of its state that are tensors of a parameter's shape; a checkpoint names them
    `<key>.<parameter>`."""
    help: str
    takes: Callable[[str, nn.Parameter], bool] = lambda name, param: True
    """True for the parameters that it updates; AdamW updates the others."""
    state_itemsize: Callable[[Any], int] = lambda settings: 4
    """Bytes of a number of it, for a run's settings."""
    why_no_adapters: str | None = None
    """The reason that LoRA adapters cannot be trained with it; None if they can."""


_HIDDEN_MATRIX = re.compile(r"(.*\.)?h\.\d+\..*\.weight")

OPTIMIZERS = {
    "adamw": Entry(
        AdamW,
        lambda settings: {
            "betas": (settings.beta1, settings.beta2),
            "moments": torch.bfloat16 if settings.moments == "bfloat16" else None,
        },
        state=("exp_avg", "exp_avg_sq"),
        state_itemsize=lambda settings: getattr(torch, settings.moments).itemsize,
        help="AdamW for everything",
    ),
    # Jordan et al., 2024; its steps scaled to the size of AdamW's (Liu et al., 2025, section 2.2),
    # so that one learning rate serves both.
    "muon": Entry(
        torch.optim.Muon,
        lambda settings: {"momentum": settings.momentum, "adjust_lr_fn": "match_rms_adamw"},
        state=("momentum_buffer",),
        help="Muon for the matrices inside the blocks, AdamW for everything else",
        takes=lambda name, param: param.dim() == 2 and bool(_HIDDEN_MATRIX.fullmatch(name)),
        why_no_adapters="Muon is for whole matrices",
    ),
}
