"""Derivatives that the ops' kernels do not have: of any order, in forward mode, batched.

A kernel knows one backward pass. Where more is asked for, an op becomes its reference, a plain
expression that torch differentiates and batches as it does any other. Where an op has no derivative
at all, what asks for one is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad


def is_transformed() -> bool:
    """True under `torch.func` or forward mode, which may ask for more than one backward pass."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def wants_graph() -> bool:
    """True within a backward pass whose results are to be differentiated or batched."""
    return torch.is_grad_enabled() or is_transformed()


def outside_autocast(run: Callable[..., Any], *args: Any) -> Any:
    """`run(*args)`, whose matrix products keep the dtypes of what they are given."""
    if not torch._C._is_any_autocast_enabled():
        return run(*args)
    with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
        return run(*args)


def tensors_in(arguments: Iterable[Any]) -> Iterator[Tensor]:
    """The tensors among an op's arguments, those in lists as well."""
    for argument in arguments:
        if isinstance(argument, Tensor):
            yield argument
        elif isinstance(argument, (list, tuple)):
            yield from tensors_in(argument)


def differentiated(arguments: Iterable[Any]) -> Tensor | None:
    """A tensor among an op's arguments with respect to which something is differentiated."""
    grad_enabled = torch.is_grad_enabled()
    dual = forward_ad._current_level >= 0
    for tensor in tensors_in(arguments):
        if grad_enabled and tensor.requires_grad:
            return tensor
        if dual and forward_ad.unpack_dual(tensor).tangent is not None:
            return tensor
    return None


class _Refusal(torch.autograd.Function):
    """Passes results through unchanged; their backward pass is an error."""

    @staticmethod
    def forward(ctx: Any, why: str, anchor: Tensor, *results: Tensor) -> tuple[Tensor, ...]:
        ctx.why = why
        return tuple(result.view_as(result) for result in results)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> None:
        raise NotImplementedError(ctx.why)


def refused(result: Any, anchor: Tensor, why: str) -> Any:
    """An op's results, made to raise an error that says why in a backward pass.

    Args:
        result: a floating-point tensor, or several of which one is.
        anchor: an argument of the op that requires a gradient.
        why: the error's message.
    """
    if isinstance(result, Tensor):
        return _Refusal.apply(why, anchor, result)[0]
    floating = [each for each in result if each.is_floating_point()]
    marked = iter(_Refusal.apply(why, anchor, *floating))
    return tuple(next(marked) if each.is_floating_point() else each for each in result)
