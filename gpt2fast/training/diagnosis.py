"""Where numbers stopped being finite: the first weight, layer or gradient in the model's order."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

ALL_FINITE = (
    "every weight, activation and gradient is finite, but their squares add up to more than a float"
)


def broken_weights(model: nn.Module) -> str | None:
    """The first parameter with a value that is not finite."""
    return next((name for name, param in model.named_parameters() if not _finite(param)), None)


@torch.no_grad()
def first_not_finite(model: nn.Module, forward: Callable[[], Any] | None = None) -> str:
    """Name what is not finite, as part of a sentence.

    Args:
        model: after a backward pass, before the step.
        forward: runs the model on the batch that failed; None where that cannot be done.
    """
    weights = broken_weights(model)
    if weights is not None:
        return f"the weights {weights} are not finite"
    layer = None if forward is None else _first_layer(model, forward)
    if layer is not None:
        return f"the first values that are not finite come out of {layer}"
    for name, param in model.named_parameters():
        if param.grad is not None and not _finite(param.grad):
            return f"the gradient of {name} is not finite"
    return ALL_FINITE


def _finite(tensor: Tensor) -> bool:
    local = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return bool(torch.isfinite(local).all())


def _first_layer(model: nn.Module, forward: Callable[[], Any]) -> str | None:
    found: list[str] = []

    def watch(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, _inputs: Any, outputs: Any) -> None:
            for tensor in outputs if isinstance(outputs, tuple) else (outputs,):
                if isinstance(tensor, Tensor) and not found and not _finite(tensor):
                    found.append(name)

        return hook

    handles = [m.register_forward_hook(watch(n)) for n, m in model.named_modules() if n]
    try:
        forward()
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else None
