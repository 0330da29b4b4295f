"""Dropout that costs nothing when it is off."""

from __future__ import annotations

from torch import Tensor, nn

from ..errors import ArgumentError
from .plain import is_plain


def drop(dropout: nn.Module, x: Tensor) -> Tensor:
    """`dropout(x)`, without the call where nobody could notice."""
    if is_plain(dropout, nn.Dropout) and not (dropout.training and dropout.p):
        return x
    return dropout(x)


def check_probability(name: str, dropout: float) -> None:
    """Refuse a dropout outside of [0, 1); `name` is for the error."""
    if not 0 <= dropout < 1:
        raise ArgumentError(f"{name}={dropout} is not a probability in [0, 1)")
