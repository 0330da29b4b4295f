"""The position of a run in its training, and its result."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...data.order import ORDERS
from ...errors import shown


@dataclass
class Position:
    """Counters and losses of a run, which every checkpoint holds."""

    step: int = 0
    """Optimizer steps done."""
    batches: int = 0
    """Batches drawn from the training data."""
    tokens: int = 0
    """Tokens trained on."""
    evaluated: int = -1
    """Step of the last validation."""
    val_loss: float = math.nan
    """Loss of that validation, nats per token."""
    logged: int = -1
    """Step of the last row of log.csv."""
    loss_sum: float = 0.0
    """Sum of the training losses since that row."""
    grad_norm: float = math.nan
    """Gradient norm of the last step, before clipping."""
    best_val_loss: float = math.inf
    """Lowest validation loss so far, nats per token."""
    best_step: int = -1
    """Step of that loss; -1 before the first."""
    without_best: int = 0
    """Validations since that step."""
    elapsed: float = 0.0
    """Seconds of training, over all resumptions."""
    order: int = ORDERS[-1]
    """Version of the order of random windows, one of `data.order.ORDERS`."""

    @classmethod
    def of(cls, saved: dict[str, Any]) -> Position:
        """The position in a checkpoint; older versions did not save the order, which was 1.

        Raises:
            TypeError, ValueError: an entry is unknown, no number, or none that a run reaches.
        """
        position = cls(**{"order": 1, **saved})
        for name, value in vars(position).items():
            whole = isinstance(getattr(cls, name), int)
            if type(value) is not int and (whole or type(value) is not float):
                raise TypeError(f"{name} is a {type(value).__name__}")
            if whole and not -1 <= value < 1 << 62:
                raise ValueError(f"{name} is {shown(value)}")
        if position.order not in ORDERS:
            raise ValueError(f"order is {shown(position.order)}")
        return position


@dataclass(frozen=True)
class TrainResult:
    """The result of a finished run; losses in nats."""

    out: Path
    steps: int
    tokens: int
    val_loss: float
    val_loss_per_char: float | None
    """None where the data do not say how many characters they hold."""
    best_val_loss: float
    best_step: int
