"""Creation of modules: device, dtype and initial weights."""

from __future__ import annotations

import torch
from torch import nn

Device = torch.device | str | None
Dtype = torch.dtype | None


def reset(*modules: nn.Module) -> None:
    """Draw new weights for the modules that have any, in this order."""
    for module in modules:
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()  # type: ignore[operator]
