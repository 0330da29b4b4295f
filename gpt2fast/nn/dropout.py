"""Dropout, which costs nothing where it does nothing."""

from __future__ import annotations

from torch import Tensor, nn

from ..errors import ArgumentError
from .plain import is_plain


def drop(dropout: nn.Module, x: Tensor) -> Tensor:
    """`dropout(x)`, without the call where it does nothing that can be told."""
    if is_plain(dropout, nn.Dropout) and not (dropout.training and dropout.p):
        return x
    return dropout(x)


def check_probability(name: str, dropout: float) -> None:
    """Refuse, under its `name`, a probability of dropping everything or none at all."""
    if not 0 <= dropout < 1:
        raise ArgumentError(f"{name}={dropout} is not a probability in [0, 1)")
