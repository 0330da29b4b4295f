"""The feed-forward half of a block."""

from __future__ import annotations

from torch import Tensor, nn

from .. import ops
from ..config import ACTIVATION_NAMES, plain_activation
from ..errors import ArgumentError
from ..ops.activations import ACTIVATIONS
from .dropout import check_probability, drop
from .initialization import Device, Dtype, reset
from .plain import is_plain, readable
from .projection import Projection


@readable
class Activation(nn.Module):
    """An elementwise activation by the name that transformers gives it.

    Args:
        name: one of `gpt2fast.config.ACTIVATION_NAMES`.
    """

    def __init__(self, name: str):
        super().__init__()
        if name not in ACTIVATION_NAMES:
            raise ArgumentError(f"activation={name!r} is not one of {', '.join(ACTIVATION_NAMES)}")
        self.name = name
        self.function = plain_activation(name)

    def forward(self, x: Tensor) -> Tensor:
        """Any shape."""
        return ACTIVATIONS[self.function](x)

    def extra_repr(self) -> str:
        """Shown by print."""
        return self.name


@readable
class GELUMLP(nn.Module):
    """Two projections with an activation between them.

    Args:
        width: width of the residual stream.
        inner: width of the hidden layer; None means 4 * width.
        activation: gelu_new (fused), gelu, relu, silu, tanh, or an alias of transformers'.
        dropout: probability of dropping an element of the result while training.
    """

    def __init__(
        self,
        width: int,
        inner: int | None = None,
        activation: str = "gelu_new",
        dropout: float = 0.0,
        *,
        device: Device = None,
        dtype: Dtype = None,
    ):
        super().__init__()
        check_probability("dropout", dropout)
        inner = 4 * width if inner is None else inner
        self.c_fc = Projection(width, inner, device=device, dtype=dtype)
        self.c_proj = Projection(inner, width, device=device, dtype=dtype)
        self.act = Activation(activation)
        self.dropout = nn.Dropout(dropout)

    @property
    def activation(self) -> str:
        """Name of the activation."""
        return self.act.name if isinstance(self.act, Activation) else type(self.act).__name__

    @activation.setter
    def activation(self, name: str) -> None:
        self.act = Activation(name)

    def reset_parameters(self) -> None:
        """Draw new weights."""
        reset(*self.children())

    def forward(self, x: Tensor) -> Tensor:
        """(..., width) -> (..., width)."""
        fc, act, proj = self.c_fc, self.act, self.c_proj
        if (
            is_plain(act, Activation)
            and act.function == "gelu_new"
            and is_plain(fc, Projection)
            and is_plain(proj, Projection)
        ):
            x = ops.gelu_mlp(x, fc.weight, fc.bias, proj.weight, proj.bias)
        else:
            x = proj(act(fc(x)))
        return drop(self.dropout, x)
