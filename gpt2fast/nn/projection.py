"""Matrix products with a bias, stored as GPT-2's checkpoints store them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from .initialization import Device, Dtype
from .plain import readable


@readable
class Projection(nn.Module):
    """`x @ weight + bias` with the weight stored (in, out), as in GPT-2's checkpoints.

    Args:
        in_features: size of x's last dimension.
        out_features: size of the result's last dimension.
        std: standard deviation of the initial weights.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        std: float = 0.02,
        *,
        device: Device = None,
        dtype: Dtype = None,
    ):
        super().__init__()
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.std = std
        self.weight = nn.Parameter(torch.empty(in_features, out_features, **factory))
        self.bias = nn.Parameter(torch.empty(out_features, **factory))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weight from N(0, std^2) and set the bias to zero."""
        if self.weight.is_meta:  # nothing to draw, and torch would load its compiler for it
            return
        nn.init.normal_(self.weight, std=self.std)
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        return ops.projection(x, self.weight, self.bias)

    def extra_repr(self) -> str:
        """What print shows."""
        inputs, outputs = self.weight.shape
        return f"in_features={inputs}, out_features={outputs}"
