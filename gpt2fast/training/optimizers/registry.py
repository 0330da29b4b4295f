"""The optimizers that the setting `optimizer` chooses from. To add one, add an entry here."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

from .adamw import AdamW


class Hyperparameters(Protocol):
    """The settings that entries read; TrainConfig has them."""

    @property
    def beta1(self) -> float: ...
    @property
    def beta2(self) -> float: ...
    @property
    def weight_decay(self) -> float: ...
    @property
    def momentum(self) -> float: ...


@dataclass(frozen=True)
class Entry:
    """An optimizer as the settings, the help, checkpoints and the memory prediction know it."""

    make: type[torch.optim.Optimizer]
    """The class: called with parameter groups and `arguments`."""
    arguments: Callable[[Hyperparameters], dict[str, Any]]
    """Its keyword arguments, but for `lr`, which is set before every step."""
    state: tuple[str, ...]
    """Its tensors of a parameter's shape, by their keys in `optimizer.state`; a checkpoint names
    them `<key>.<parameter>`."""
    help: str
    takes: Callable[[str, nn.Parameter], bool] = lambda name, param: True
    """Which parameters it updates; AdamW updates the others."""
    why_no_adapters: str | None = None
    """Why LoRA adapters cannot be trained with it; None if they can."""


_HIDDEN_MATRIX = re.compile(r"(.*\.)?h\.\d+\..*\.weight")

OPTIMIZERS = {
    "adamw": Entry(
        AdamW,
        lambda settings: {"betas": (settings.beta1, settings.beta2)},
        state=("exp_avg", "exp_avg_sq"),
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
