"""Matrix products with a bias, stored as GPT-2's checkpoints store them."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from .. import ops
from .initialization import Device, Dtype
from .plain import readable

_Model = TypeVar("_Model", bound=nn.Module)


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
        if self.weight.is_meta:  # nothing to draw; torch would import its compiler to do so
            return
        nn.init.normal_(self.weight, std=self.std)
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        return ops.projection(x, self.weight, self.bias)

    def merged_weight(self) -> Tensor:
        """(in, out): the weight of a plain projection that computes the same."""
        return self.weight

    def extra_repr(self) -> str:
        """Shown by print."""
        inputs, outputs = self.weight.shape
        return f"in_features={inputs}, out_features={outputs}"


def merged(model: _Model) -> _Model:
    """The model itself, or `merge` of it if a projection adds to its weight, as adapters do."""
    return merge(model) if _adding(model) else model


def merge(model: _Model) -> _Model:
    """A plain model that computes, up to rounding, the same as `model`, a GPT2 with adapters.

    Adapted weights are new; all others are shared with `model`, which stays as it is. Everything in
    the result is trainable, and it is in evaluation mode where `model` is.
    """
    state = model.state_dict()
    for name, projection in _adding(model).items():
        for part in projection.state_dict().keys() - {"weight", "bias"}:
            del state[f"{name}.{part}"]
        state[f"{name}.weight"] = projection.merged_weight()
    source: Any = model
    plain = type(source)(source.config, device="meta")
    plain.load_state_dict(state, assign=True)
    plain.gradient_checkpointing = source.gradient_checkpointing
    plain.generation_config = dict(source.generation_config)
    return plain.train(source.training)


def _adding(model: nn.Module) -> dict[str, Projection]:
    """Projections of subclasses that add something to their weight, by name."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, Projection)
        and type(module).merged_weight is not Projection.merged_weight
    }
