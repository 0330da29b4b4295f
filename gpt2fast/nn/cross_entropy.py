"""The loss of a language model."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .. import ops
from ..errors import ArgumentError
from ..ops.backend import statistics_dtype
from ..ops.projection import linear
from .plain import readable

_CHUNK_BYTES = 1 << 27
"""Most bytes of logits to hold at once where the fused loss cannot run."""

REDUCTIONS = ("mean", "sum", "none")


@readable
class LinearCrossEntropy(nn.Module):
    """Cross-entropy of `hidden @ weight.T` that never holds all logits.

    Args:
        ignore_index: targets of this value do not count.
        reduction: "mean" over the targets that count, their "sum", or "none": each by itself.
        label_smoothing: in [0, 1], the share of each target that is spread over the vocabulary
            (Szegedy et al., 2016).

    The mean and the sum without smoothing are one fused op; the others compute each chunk of
    logits again in the backward pass.
    """

    def __init__(
        self, ignore_index: int = -100, reduction: str = "mean", label_smoothing: float = 0.0
    ):
        super().__init__()
        if reduction not in REDUCTIONS:
            raise ArgumentError(f"reduction={reduction!r} is not one of {', '.join(REDUCTIONS)}")
        if not 0 <= label_smoothing <= 1:
            raise ArgumentError(f"label_smoothing={label_smoothing} must lie in [0, 1]")
        self.ignore_index = ignore_index
        self.reduction = reduction
        self.label_smoothing = label_smoothing

    @property
    def is_one_op(self) -> bool:
        """True if `forward` is `ops.linear_cross_entropy` on the weight, scaled at most."""
        return not self.label_smoothing and self.reduction != "none"

    def forward(self, hidden: Tensor, weight: Tensor | None, targets: Tensor) -> Tensor:
        """The loss of hidden states.

        Args:
            hidden: (..., C).
            weight: (V, C), the output projection; None where `hidden` are logits (..., V) already.
            targets: (...) int64.

        Returns:
            Scalar, in nats; of the shape of `targets` with reduction "none".
        """
        if weight is None:
            return self.of_logits(hidden, targets)
        rows, flat = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1)
        if not self.is_one_op:
            return self._reduced(self._chunked(rows, weight, flat), targets)
        mean = ops.linear_cross_entropy(rows, weight, flat, self.ignore_index)
        if self.reduction == "mean":
            return mean
        count = (flat != self.ignore_index).sum()
        return torch.where(count > 0, mean * count, 0.0)

    def of_logits(self, logits: Tensor, targets: Tensor) -> Tensor:
        """The loss of given logits.

        Args:
            logits: (..., V).
            targets: (...) int64.

        Returns:
            Same as `forward`.
        """
        flat = logits.reshape(-1, logits.shape[-1])
        return self._reduced(self._each(flat, targets.reshape(-1)), targets)

    def _each(self, logits: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(
            logits.to(statistics_dtype(logits.dtype)),
            targets,
            ignore_index=self.ignore_index,
            reduction="none",
            label_smoothing=self.label_smoothing,
        )

    def _chunked(self, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        """(N,) losses, a chunk of logits at a time."""

        def losses(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
            return self._each(linear(hidden, weight), targets)

        step: Callable[..., Any] = losses
        if torch.is_grad_enabled():
            step = partial(checkpoint, losses, use_reentrant=False)
        size = max(1, _CHUNK_BYTES // (4 * weight.shape[0]))
        pairs = zip(hidden.split(size), targets.split(size), strict=True)
        return torch.cat([step(rows, weight, wanted) for rows, wanted in pairs])

    def _reduced(self, losses: Tensor, targets: Tensor) -> Tensor:
        if self.reduction == "none":
            return losses.view(targets.shape)
        if self.reduction == "sum":
            return losses.sum()
        return losses.sum() / (targets != self.ignore_index).sum()

    def extra_repr(self) -> str:
        """Shown by print."""
        smoothing = f", label_smoothing={self.label_smoothing}" if self.label_smoothing else ""
        return f"ignore_index={self.ignore_index}, reduction={self.reduction!r}{smoothing}"


def loss_of_logits(loss: nn.Module, logits: Tensor, targets: Tensor) -> Tensor:
    """A model's loss from the logits (B, T, V) of an output projection that had to be called.

    Raises:
        ArgumentError: `loss` is another module, which takes hidden states only.
    """
    if not isinstance(loss, LinearCrossEntropy):
        raise ArgumentError(
            f"loss is a {type(loss).__name__}, which takes the head's weight, and lm_head "
            "is watched or replaced: remove one of them, or compute the loss from the logits"
        )
    return loss(logits, None, targets)
