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
from .backend import Arguments, Op, autocast, statistics_dtype
from .matmul import matmul, multiplied_by_torch, product, reads_wider_weights, weight_gradient
from .native import native, rows
from .requirements import check_floating, check_shape
from .support import Tensors


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


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """`x @ weight.T` (..., out), for a weight (out, in): `F.linear`, where torch has a kernel."""
    if x.device.type != "cpu" or x.dtype == torch.float64:
        return F.linear(x, weight)
    cast = torch.is_autocast_enabled("cpu")
    dtype = torch.get_autocast_dtype("cpu") if cast else x.dtype
    # Of two dtypes torch makes an error.
    if multiplied_by_torch(dtype, x.device) == dtype or not (cast or weight.dtype == dtype):
        return F.linear(x, weight)
    return projection(x, weight.t(), weight.new_zeros(len(weight)))


def _check(call: Arguments) -> None:
    check_floating(x=call.x, weight=call.weight, bias=call.bias)
    _check_chain(call, call.bias.shape)


def _check_chain(call: Arguments, bias: torch.Size) -> None:
    x, weight = call.x, call.weight
    if weight.dim() != 2 or x.shape[-1:] != weight.shape[:1] or weight.shape[1:] != bias:
        raise ArgumentError(
            f"shapes do not chain: x {tuple(x.shape)}, weight {tuple(weight.shape)}, "
            f"bias {tuple(bias)}; the weight is (in, out)"
        )


def _check_backward(call: Arguments) -> None:
    grad, x, weight, wanted = call.grad, call.x, call.weight, call.wanted
    check_floating(grad=grad, x=x, weight=weight)
    _check_chain(call, grad.shape[-1:])
    check_shape("grad", grad, *x.shape[:-1], weight.shape[1], says="a row for each of x's")
    if len(wanted) != 3 or not call.bias_dtype.is_floating_point:
        raise ArgumentError(f"wanted={wanted}, bias_dtype={call.bias_dtype}: three, floating point")


def _reference(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return product(x, weight.to(x.dtype)) + bias.to(x.dtype)


def _torch(call: Arguments) -> Tensor:
    x = call.x
    out = product(rows(x), call.weight.to(x.dtype), call.bias.to(x.dtype))
    return out.view(*x.shape[:-1], out.shape[1])


@native(Tensors("x", "weight", "bias"))
def _native(call: Arguments) -> Tensor:
    x = call.x
    out = matmul(rows(x), call.weight, x.dtype, bias=call.bias)
    return out.view(*x.shape[:-1], out.shape[1])


def _backward_reference(
    grad: Tensor, x: Tensor, weight: Tensor, bias_dtype: torch.dtype, wanted: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    grad, nothing = rows(grad), grad.new_empty(0)
    sums = statistics_dtype(grad.dtype)
    return (
        product(grad, weight.to(grad.dtype).t()).reshape(x.shape) if wanted[0] else nothing,
        product(rows(x).t(), grad).to(weight.dtype) if wanted[1] else weight.new_empty(0),
        grad.sum(0, dtype=sums).to(bias_dtype) if wanted[2] else nothing.to(bias_dtype),
    )


@native(Tensors("grad", "x", "weight"))
def _backward_native(call: Arguments) -> tuple[Tensor, Tensor, Tensor]:
    grad, x, weight = rows(call.grad), call.x, call.weight
    x_wanted, weight_wanted, bias_wanted = call.wanted
    grad_x, grad_weight = grad.new_empty(0), weight.new_empty(0)
    sums = grad.new_empty(grad.shape[1] if bias_wanted else 0, dtype=torch.float32)
    if x_wanted:
        grad_x = matmul(grad, weight.t(), x.dtype).view(x.shape)
    if weight_wanted:
        grad_weight = weight_gradient(rows(x), grad, weight, sums if bias_wanted else None)
    elif bias_wanted:
        torch.sum(grad, 0, dtype=torch.float32, out=sums)
    return grad_x, grad_weight, sums.to(call.bias_dtype)


_backward = Op(
    "projection_backward",
    "(Tensor grad, Tensor x, Tensor weight, ScalarType bias_dtype, bool[] wanted) "
    "-> (Tensor, Tensor, Tensor)",
    check=_check_backward,
    native=_backward_native,
    reference=_backward_reference,
)
_projection = Op(
    "projection",
    "(Tensor x, Tensor weight, Tensor bias) -> Tensor",
    check=_check,
    native=_native,
    torch=_torch,
    reference=_reference,
)


def _setup_context(ctx: Any, call: Arguments, results: Tensor) -> None:
    ctx.bias_dtype = call.bias.dtype
    ctx.save_for_backward(call.x, call.weight)


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight = ctx.saved_tensors
    wanted = list(ctx.needs_input_grad[:3])
    gradients = _backward.gradient(grad, x, weight, ctx.bias_dtype, wanted)
    return tuple(g if want else None for g, want in zip(gradients, wanted, strict=True))


_projection.register_autograd(_differentiate, _setup_context)


@_projection.register_fake
def _(call: Arguments) -> Tensor:
    return call.x.new_empty((*call.x.shape[:-1], call.weight.shape[1]))


@_backward.register_fake
def _(call: Arguments) -> tuple[Tensor, Tensor, Tensor]:
    grad, x, weight = call.grad, call.x, call.weight
    x_wanted, weight_wanted, bias_wanted = call.wanted
    return (
        x.new_empty(x.shape if x_wanted else 0),
        weight.new_empty(weight.shape if weight_wanted else 0),
        grad.new_empty(grad.shape[-1] if bias_wanted else 0, dtype=call.bias_dtype),
    )
