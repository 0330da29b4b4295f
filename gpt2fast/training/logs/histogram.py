"""The distribution of a tensor's values, small enough to log."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

BINS = 64


@dataclass(frozen=True)
class Histogram:
    """`BINS` bins of equal width from `low` to `high`, the least and the greatest value."""

    low: float
    high: float
    counts: list[int]
    total: float
    """Sum of the values."""
    squares: float
    """Sum of their squares."""

    @property
    def edges(self) -> list[float]:
        """The `BINS` + 1 bounds of the bins."""
        width = (self.high - self.low) / BINS
        return [self.low + width * i for i in range(BINS)] + [self.high]


def histogram(values: Tensor) -> Histogram | None:
    """The histogram of the finite values; None if there are none."""
    values = values.detach().float().flatten()
    values = values[values.isfinite()]
    if not len(values):
        return None
    low, high = (x.item() for x in values.aminmax())
    if low == high:  # histc would take bounds of its own
        low, high = low - 0.5, high + 0.5
    counts = torch.histc(values, BINS, low, high)
    total, squares = values.sum(dtype=torch.float64), values.double().square().sum()
    return Histogram(low, high, [int(n) for n in counts.tolist()], total.item(), squares.item())


def parameter_histograms(model: nn.Module) -> Iterator[tuple[str, Histogram]]:
    """Histograms of all weights, as weights/NAME, and all gradients, as gradients/NAME."""
    for name, parameter in model.named_parameters():
        for kind, values in (("weights", parameter), ("gradients", parameter.grad)):
            found = None if values is None else histogram(values)
            if found is not None:
                yield f"{kind}/{name}", found
