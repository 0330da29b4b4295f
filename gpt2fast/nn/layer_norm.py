"""Layer normalization, alone or with the addition before it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from .initialization import Device, Dtype
from .plain import is_plain, readable


@readable
class LayerNorm(nn.Module):
    """Layer normalization (Ba et al., 2016), alone or with the addition before it.

    Args:
        width: size of the last dimension.
        eps: added to the variance.
        elementwise_affine: multiply by a weight, and add a bias if `bias` is true.
        bias: have a bias.
    """

    weight: nn.Parameter | None
    bias: nn.Parameter | None

    def __init__(
        self,
        width: int,
        eps: float = 1e-5,
        *,
        elementwise_affine: bool = True,
        bias: bool = True,
        device: Device = None,
        dtype: Dtype = None,
    ):
        super().__init__()
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.width, self.eps = width, eps
        self.weight = self.bias = None
        if elementwise_affine:
            self.weight = nn.Parameter(torch.ones(width, **factory))
            if bias:
                self.bias = nn.Parameter(torch.zeros(width, **factory))

    def reset_parameters(self) -> None:
        """Set the weight to one and the bias to zero."""
        if self.weight is not None:
            nn.init.ones_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(..., width) -> (..., width)."""
        return self.add(x, None)[0]

    def add(self, x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        """Normalize `x + residual` in one pass.

        Args:
            x: (..., width).
            residual: (..., width), or None for x alone.

        Returns:
            The normalized sum and the sum, (..., width) both.
        """
        weight = x.new_ones(self.width) if self.weight is None else self.weight
        bias = weight.new_zeros(self.width) if self.bias is None else self.bias
        return ops.residual_layer_norm(x, residual, weight, bias, self.eps)

    def extra_repr(self) -> str:
        """Shown by print."""
        affine = ", elementwise_affine=False" if self.weight is None else ""
        return f"{self.width}, eps={self.eps:g}, bias={self.bias is not None}{affine}"


@readable
class ResidualLayerNorm(LayerNorm):
    """Add to the residual stream and normalize the sum, in one pass.

    Args:
        width, eps, elementwise_affine, bias: as in `LayerNorm`.
    """

    def forward(  # type: ignore[override]
        self, x: Tensor, residual: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Normalize `x + residual`.

        Args:
            x: (..., width).
            residual: (..., width), or None for x alone.

        Returns:
            The normalized sum, and the sum: the residual stream to go on with.
        """
        return self.add(x, residual)


def add_and_normalize(norm: nn.Module, x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
    """`norm.add` in one pass, or a call of `norm` with the sum if it has hooks or is replaced."""
    if is_plain(norm, LayerNorm, ResidualLayerNorm):
        return norm.add(x, residual)  # type: ignore[operator]
    stream = x if residual is None else (residual + x).to(residual.dtype)
    normed = norm(stream)
    return normed[0] if isinstance(norm, ResidualLayerNorm) else normed, stream
