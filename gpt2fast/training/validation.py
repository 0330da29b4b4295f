"""The validation loss, which the processes of a run measure together."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from .distributed import Group

Batch = tuple[Tensor, Tensor]


def mean_loss(
    loss: Callable[[Batch], Tensor], batches: Any, limit: int | None, group: Group
) -> float:
    """Mean loss, in nats, over all targets that count.

    Args:
        loss: mean loss of a batch.
        batches: the batches, by number.
        limit: number of batches to use, from the first on; None means all.
        group: whose processes take turns.
    """
    count = min(len(batches), limit or len(batches))
    total, targets = 0.0, 0
    for first in range(0, count, group.size):
        # All processes call the model equally often: its forward pass may communicate.
        number = first + group.rank
        batch = batches[min(number, count - 1)]
        with group.explain_lost_peer():
            measured = loss(batch).item()
        if number < count:
            counted = int((batch[1] != -100).sum())
            total += measured * counted
            targets += counted
    total, summed = group.sum(total, targets)
    return total / summed
