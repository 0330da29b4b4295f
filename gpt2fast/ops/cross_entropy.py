"""Output projection and cross-entropy in one, without the logits ever standing in memory.

    logits = hidden @ weight^T
    loss   = mean over n with targets[n] != ignore_index of
             logsumexp(logits[n, :]) - logits[n, targets[n]]

The loss is kept in at least float32. With no target left the mean is NaN, as in torch.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import ArgumentError
from .backend import Op, autocast, statistics_dtype

# Logits held at once: 64 MB in float32. Every chunk reads the weight and adds to its gradient, so
# fewer rows cost more (docs/performance.md).
_CHUNK_ELEMENTS = 1 << 24


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, ignore_index: int = -100
) -> Tensor:
    """Mean next-token loss of `hidden @ weight.T` against `targets`.

    Args:
        hidden: (N, C).
        weight: (V, C), the output projection.
        targets: (N,) int64 class indices in [0, V), or `ignore_index`.
        ignore_index: the target that does not count.

    Returns:
        Scalar loss in nats, at least float32.
    """
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ArgumentError(
            f"hidden (N, C) and weight (V, C) do not fit: {tuple(hidden.shape)} and "
            f"{tuple(weight.shape)}"
        )
    if targets.shape != hidden.shape[:1]:
        raise ArgumentError(
            f"targets must be ({hidden.shape[0]},), one per row of hidden, "
            f"not {tuple(targets.shape)}"
        )
    hidden, weight = autocast(hidden, weight)
    return _forward.call(hidden, weight, targets, ignore_index)[0]


def _reference(
    hidden: Tensor, weight: Tensor, targets: Tensor, ignore_index: int
) -> tuple[Tensor, Tensor]:
    logits = (hidden @ weight.t()).to(statistics_dtype(hidden.dtype))
    return F.cross_entropy(logits, targets, ignore_index=ignore_index), logits.logsumexp(-1)


def _backward_reference(
    grad: Tensor, hidden: Tensor, weight: Tensor, targets: Tensor, lse: Tensor, ignore_index: int
) -> tuple[Tensor, Tensor]:
    logits = (hidden @ weight.t()).to(lse.dtype)
    grad_logits = _grad_logits(
        logits, targets, lse, ignore_index, _per_target(grad, targets, ignore_index)
    )
    grad_logits = grad_logits.to(hidden.dtype)
    return grad_logits @ weight, grad_logits.t() @ hidden


def _per_target(grad: Tensor, targets: Tensor, ignore_index: int) -> Tensor:
    return grad / (targets != ignore_index).sum()


def _grad_logits(
    logits: Tensor, targets: Tensor, lse: Tensor, ignore_index: int, scale: Tensor
) -> Tensor:
    """softmax(logits) - onehot(targets), scaled, in the storage of `logits`."""
    counted = targets != ignore_index
    grad = logits.sub_(lse[:, None]).exp_()
    rows = torch.arange(len(targets), device=targets.device)
    grad[rows, targets.where(counted, 0)] -= 1.0
    return grad.mul_((scale * counted)[:, None])


def _chunks(hidden: Tensor, weight: Tensor) -> Iterator[slice]:
    rows = max(64, _CHUNK_ELEMENTS // max(1, len(weight)))
    for start in range(0, len(hidden), rows):
        yield slice(start, start + rows)


def _chunked(
    hidden: Tensor, weight: Tensor, targets: Tensor, ignore_index: int
) -> tuple[Tensor, Tensor]:
    dtype = statistics_dtype(hidden.dtype)
    lse = hidden.new_empty(len(hidden), dtype=dtype)
    total = hidden.new_zeros((), dtype=dtype)
    for rows in _chunks(hidden, weight):
        logits = (hidden[rows] @ weight.t()).to(dtype)
        lse[rows] = logits.logsumexp(-1)
        counted = targets[rows] != ignore_index
        picked = logits.gather(1, targets[rows].where(counted, 0)[:, None])[:, 0]
        total += ((lse[rows] - picked) * counted).sum()
    return total / (targets != ignore_index).sum(), lse


def _chunked_backward(
    grad: Tensor, hidden: Tensor, weight: Tensor, targets: Tensor, lse: Tensor, ignore_index: int
) -> tuple[Tensor, Tensor]:
    scale = _per_target(grad, targets, ignore_index)
    grad_hidden = torch.empty_like(hidden, memory_format=torch.contiguous_format)
    grad_weight = torch.zeros_like(weight, dtype=lse.dtype)
    for rows in _chunks(hidden, weight):
        logits = (hidden[rows] @ weight.t()).to(lse.dtype)
        grad_logits = _grad_logits(logits, targets[rows], lse[rows], ignore_index, scale)
        grad_logits = grad_logits.to(hidden.dtype)
        torch.mm(grad_logits, weight, out=grad_hidden[rows])
        if grad_weight.dtype == hidden.dtype:
            grad_weight.addmm_(grad_logits.t(), hidden[rows])
        else:
            grad_weight += grad_logits.t() @ hidden[rows]
    return grad_hidden, grad_weight.to(weight.dtype)


_backward = Op(
    "linear_cross_entropy_backward",
    "(Tensor grad, Tensor hidden, Tensor weight, Tensor targets, Tensor lse, int ignore_index) "
    "-> (Tensor, Tensor)",
    torch=_chunked_backward,
    reference=_backward_reference,
)
_forward = Op(
    "linear_cross_entropy",
    "(Tensor hidden, Tensor weight, Tensor targets, int ignore_index) -> (Tensor loss, Tensor lse)",
    torch=_chunked,
    reference=_reference,
)


def _setup_context(ctx: Any, inputs: Any, output: Any) -> None:
    hidden, weight, targets, ctx.ignore_index = inputs
    _, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.save_for_backward(hidden, weight, targets, lse)


def _differentiate(ctx: Any, grad: Tensor, grad_lse: Any) -> tuple[Any, ...]:
    return (*_backward.call(grad, *ctx.saved_tensors, ctx.ignore_index), None, None)


_forward.register_autograd(_differentiate, _setup_context)


@_forward.register_fake
def _(hidden, weight, targets, ignore_index):  # type: ignore[no-untyped-def]
    dtype = statistics_dtype(hidden.dtype)
    return hidden.new_empty((), dtype=dtype), hidden.new_empty(len(hidden), dtype=dtype)


@_backward.register_fake
def _(grad, hidden, weight, targets, lse, ignore_index):  # type: ignore[no-untyped-def]
    return hidden.new_empty(hidden.shape), weight.new_empty(weight.shape)
