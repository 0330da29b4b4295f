"""Notifications of moved weights, for caches of things made from them."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

_listeners: list[Callable[[nn.Module], None]] = []


def on_moved_weights(listener: Callable[[nn.Module], None]) -> Callable[[nn.Module], None]:
    """Decorator: call this with every model whose weights were moved, converted or resized."""
    _listeners.append(listener)
    return listener


def weights_moved(model: nn.Module) -> None:
    """Tell all listeners that the weights of `model` were moved, converted or resized."""
    for listener in _listeners:
        listener(model)
