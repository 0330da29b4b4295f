"""A linear layer whose weight lies as in GPT-2's checkpoints.

projection = x @ weight + bias

It is computed in x's dtype: a weight and bias in float32 may meet activations in bfloat16, as they
do under autocast. Their gradients are float32 then, too.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import ArgumentError
from .backend import Op, autocast, statistics_dtype
from .matmul import matmul, reads_wider_weights, refuses_mixture, weight_gradient
from .native import native, rows
from .requirements import check_floating, check_shape


def projection(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """`x @ weight + bias`.

    Args:
        x: (..., in).
        weight: (in, out); a transposed view of an `nn.Linear` weight is read in place.
        bias: (out,).

    Returns:
        (..., out), in x's dtype or in that of autocast where it is active.
    """
    if not reads_wider_weights(x):
        _projection.require(x, weight, bias)
        return F.linear(x, weight.t(), bias)
    (x,) = autocast(x)
    return _projection.call(x, weight, bias)


def _check(x: Tensor, weight: Tensor, bias: Tensor) -> None:
    check_floating(x=x, weight=weight, bias=bias)
    _check_chain(x, weight, bias.shape)


def _check_chain(x: Tensor, weight: Tensor, bias: torch.Size) -> None:
    if weight.dim() != 2 or x.shape[-1:] != weight.shape[:1] or weight.shape[1:] != bias:
        raise ArgumentError(
            f"shapes do not chain: x {tuple(x.shape)}, weight {tuple(weight.shape)}, "
            f"bias {tuple(bias)}; the weight is (in, out)"
        )


def _check_backward(
    grad: Tensor, x: Tensor, weight: Tensor, bias_dtype: torch.dtype, wanted: list[bool]
) -> None:
    check_floating(grad=grad, x=x, weight=weight)
    _check_chain(x, weight, grad.shape[-1:])
    check_shape("grad", grad, *x.shape[:-1], weight.shape[1], says="a row for each of x's")
    if len(wanted) != 3 or not bias_dtype.is_floating_point:
        raise ArgumentError(f"wanted={wanted}, bias_dtype={bias_dtype}: three, floating point")


def _reference(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return torch.matmul(x, weight.to(x.dtype)) + bias.to(x.dtype)


def _torch(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    out = torch.addmm(bias.to(x.dtype), rows(x), weight.to(x.dtype))
    return out.view(*x.shape[:-1], weight.shape[1])


def _native(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    out = matmul(rows(x), weight, x.dtype, bias=bias)
    return out.view(*x.shape[:-1], weight.shape[1])


def _backward_torch(
    grad: Tensor, x: Tensor, weight: Tensor, bias_dtype: torch.dtype, wanted: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    grad, nothing = rows(grad), grad.new_empty(0)
    sums = statistics_dtype(grad.dtype)
    return (
        (grad @ weight.to(grad.dtype).t()).reshape(x.shape) if wanted[0] else nothing,
        (rows(x).t() @ grad).to(weight.dtype) if wanted[1] else weight.new_empty(0),
        grad.sum(0, dtype=sums).to(bias_dtype) if wanted[2] else nothing.to(bias_dtype),
    )


def _backward_native(
    grad: Tensor, x: Tensor, weight: Tensor, bias_dtype: torch.dtype, wanted: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    grad, dtype = rows(grad), x.dtype
    grad_x, grad_weight = grad.new_empty(0), weight.new_empty(0)
    sums = grad.new_empty(grad.shape[1] if wanted[2] else 0, dtype=torch.float32)
    if wanted[0]:
        grad_x = matmul(grad, weight.t(), dtype).view(x.shape)
    if wanted[1]:
        grad_weight = weight_gradient(rows(x), grad, weight, sums if wanted[2] else None)
    elif wanted[2]:
        torch.sum(grad, 0, dtype=torch.float32, out=sums)
    return grad_x, grad_weight, sums.to(bias_dtype)


_backward = Op(
    "projection_backward",
    "(Tensor grad, Tensor x, Tensor weight, ScalarType bias_dtype, bool[] wanted) "
    "-> (Tensor, Tensor, Tensor)",
    check=_check_backward,
    native=native(_backward_native, refuses_mixture),
    torch=_backward_torch,
    reference=_backward_torch,
)
_projection = Op(
    "projection",
    "(Tensor x, Tensor weight, Tensor bias) -> Tensor",
    check=_check,
    native=native(_native, refuses_mixture),
    torch=_torch,
    reference=_reference,
)


def _setup_context(ctx: Any, inputs: Any, output: Any) -> None:
    x, weight, bias = inputs
    ctx.bias_dtype = bias.dtype
    ctx.save_for_backward(x, weight)


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight = ctx.saved_tensors
    wanted = list(ctx.needs_input_grad[:3])
    gradients = _backward.gradient(grad, x, weight, ctx.bias_dtype, wanted)
    return tuple(g if want else None for g, want in zip(gradients, wanted, strict=True))


_projection.register_autograd(_differentiate, _setup_context)


@_projection.register_fake
def _(x, weight, bias):  # type: ignore[no-untyped-def]
    return x.new_empty((*x.shape[:-1], weight.shape[1]))


@_backward.register_fake
def _(grad, x, weight, bias_dtype, wanted):  # type: ignore[no-untyped-def]
    return (
        x.new_empty(x.shape if wanted[0] else 0),
        weight.new_empty(weight.shape if wanted[1] else 0),
        grad.new_empty(grad.shape[-1] if wanted[2] else 0, dtype=bias_dtype),
    )
