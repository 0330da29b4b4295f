"""Residual add and layer normalization in one pass (Ba et al., 2016).

summed = x + residual
normed = (summed - mean) / sqrt(var + eps) * weight + bias      over the last dimension
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..errors import ArgumentError
from .backend import Arguments, Op, statistics_dtype
from .cuda import by_device, cuda, kernels
from .derivatives import wants_graph
from .native import native, rows
from .requirements import check_at_least, check_constants, check_floating, check_shape
from .support import Tensors
from .triton import triton


def residual_layer_norm(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, eps: float = 1e-5
) -> tuple[Tensor, Tensor]:
    """Add to the residual stream and normalize the sum.

    Args:
        x: (..., C), what is added.
        residual: (..., C), the residual stream, or None for the first normalization.
        weight, bias: (C,).
        eps: added to the variance.

    Returns:
        normed: (..., C) in x's dtype.
        summed: (..., C) in residual's dtype; x itself where there is no residual.

    Mean and variance are computed and kept in at least float32.
    """
    check_constants(eps=eps)
    normed, summed, _, _ = _forward.call(x, residual, weight, bias, eps)
    return normed, x if residual is None else summed


def _check(call: Arguments) -> None:
    x, residual, weight, bias = call.x, call.residual, call.weight, call.bias
    if not (x.is_floating_point() and weight.is_floating_point() and bias.is_floating_point()):
        check_floating(x=x, weight=weight, bias=bias)
    if residual is not None and not residual.is_floating_point():
        check_floating(residual=residual)
    shape, width = x.shape, weight.shape
    if shape[-1:] != width or width != bias.shape or not width:
        raise ArgumentError(
            f"weight {tuple(width)} and bias {tuple(bias.shape)} must have the size of x's last "
            f"dimension, x being {tuple(shape)}"
        )
    if residual is not None and residual.shape != shape:
        raise ArgumentError(
            f"residual {tuple(residual.shape)} must have the shape of x {tuple(shape)}"
        )
    if not 0 <= call.eps < math.inf:
        check_at_least(0, eps=call.eps)


def _check_backward(call: Arguments) -> None:
    summed, weight = call.summed, call.weight
    check_floating(grad_normed=call.grad_normed, summed=summed, weight=weight)
    if not summed.dim() or weight.shape != summed.shape[-1:]:
        raise ArgumentError(
            f"weight {tuple(weight.shape)} must have the size of summed's last dimension, summed "
            f"being {tuple(summed.shape)}"
        )
    for name in ("grad_normed", "grad_summed"):
        grad = getattr(call, name)
        if grad is not None:
            check_shape(name, grad, *summed.shape, says="summed's shape")
    for name in ("mean", "rstd"):
        statistic = getattr(call, name)
        check_shape(name, statistic, *summed.shape[:-1], 1, says="a number a row")
        if statistic.dtype != statistics_dtype(summed.dtype):
            raise ArgumentError(f"{name} of {summed.dtype} rows cannot be {statistic.dtype}")


def _add(x: Tensor, residual: Tensor | None) -> Tensor:
    return x if residual is None else (residual + x).to(residual.dtype)


def _returned_sum(summed: Tensor, residual: Tensor | None) -> Tensor:
    # An op may not return one of its arguments: without a residual there is no new sum.
    return summed.new_empty(0) if residual is None else summed.contiguous()


def _statistics(wide: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Mean and reciprocal standard deviation of rows (..., C), each (..., 1)."""
    mean = wide.mean(-1, keepdim=True)
    return mean, (wide.var(-1, keepdim=True, correction=0) + eps).rsqrt()


def _reference(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    summed = _add(x, residual)
    wide = summed.to(statistics_dtype(summed.dtype))
    mean, rstd = _statistics(wide, eps)
    normed = (wide - mean) * rstd * weight.to(wide.dtype) + bias.to(wide.dtype)
    return normed.to(x.dtype).contiguous(), _returned_sum(summed, residual), mean, rstd


def _backward_reference(
    grad_normed: Tensor,
    grad_summed: Tensor | None,
    summed: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    wide = summed.to(mean.dtype)
    grad = grad_normed.to(mean.dtype)
    standard = (wide - mean) * rstd
    grad_standard = grad * weight.to(mean.dtype)
    grad_input = rstd * (
        grad_standard
        - grad_standard.mean(-1, keepdim=True)
        - standard * (grad_standard * standard).mean(-1, keepdim=True)
    )
    if grad_summed is not None:
        grad_input = grad_input + grad_summed
    return (
        grad_input.to(summed.dtype).contiguous(),
        rows(grad * standard).sum(0).to(weight.dtype),
        rows(grad).sum(0).to(weight.dtype),
    )


def _torch(call: Arguments) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    summed = _add(call.x, call.residual)
    dtype = statistics_dtype(summed.dtype)
    # With parameters in float32, torch keeps statistics of half-precision input in float32.
    weight, bias = call.weight.to(dtype), call.bias.to(dtype)
    normed, mean, rstd = torch.native_layer_norm(
        summed.contiguous(), weight.shape, weight, bias, call.eps
    )
    return (
        normed.to(call.x.dtype),
        _returned_sum(summed, call.residual),
        mean.to(dtype),
        rstd.to(dtype),
    )


def _backward_torch(call: Arguments) -> tuple[Tensor, Tensor, Tensor]:
    summed, weight, mean = call.summed, call.weight, call.mean
    grad_input, grad_weight, grad_bias = torch.ops.aten.native_layer_norm_backward(
        call.grad_normed.to(summed.dtype).contiguous(),
        summed.contiguous(),
        weight.shape,
        mean,
        call.rstd,
        weight.to(mean.dtype),
        torch.zeros_like(weight, dtype=mean.dtype),
        [True, True, True],
    )
    if call.grad_summed is not None:
        grad_input += call.grad_summed
    return grad_input, grad_weight.to(weight.dtype), grad_bias.to(weight.dtype)


def _run_kernels(call: Arguments) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x, residual = call.x, call.residual
    normed, summed, mean, rstd = kernels(x).layer_norm.default(
        rows(x),
        None if residual is None else rows(residual),
        call.weight.contiguous(),
        call.bias.contiguous(),
        call.eps,
    )
    if x.dim() == 2:
        return normed, summed, mean.unsqueeze(1), rstd.unsqueeze(1)
    row_statistics = (*x.shape[:-1], 1)
    return (
        normed.reshape(x.shape),
        summed if residual is None else summed.reshape(x.shape),
        mean.reshape(row_statistics),
        rstd.reshape(row_statistics),
    )


def _run_backward_kernels(call: Arguments) -> tuple[Tensor, Tensor, Tensor]:
    summed, grad_summed = call.summed, call.grad_summed
    grad_input, grad_weight, grad_bias = kernels(summed).layer_norm_backward.default(
        rows(call.grad_normed),
        None if grad_summed is None else rows(grad_summed),
        rows(summed),
        call.mean.contiguous(),
        call.rstd.contiguous(),
        call.weight.contiguous(),
    )
    return grad_input.reshape(summed.shape), grad_weight, grad_bias


def _refuses_mixture(branch: Tensor, stream: Tensor, *weights: Tensor) -> str | None:
    """A reason to refuse this mixture of dtypes, or None. A half-precision branch may go with a
    float32 stream and weights, as under autocast."""
    half, wide = branch.dtype, torch.float32
    for weight in weights:
        if (stream.dtype, weight.dtype) not in ((half, half), (half, wide), (wide, wide)):
            dtypes = (str(x.dtype).removeprefix("torch.") for x in (branch, stream, weight))
            return f"no CUDA layer norm for x, residual and weight in {', '.join(dtypes)}"
    return None


def _cuda_refuses(call: Arguments) -> str | None:
    stream = call.x if call.residual is None else call.residual
    return _refuses_mixture(call.x, stream, call.weight, call.bias)


def _cuda_refuses_backward(call: Arguments) -> str | None:
    if call.grad_summed is not None and call.grad_summed.dtype != call.summed.dtype:
        return f"the gradient of {call.summed.dtype} sums is in {call.grad_summed.dtype}"
    return _refuses_mixture(call.grad_normed, call.summed, call.weight)


# The dtypes of stream, branch and parameters may differ.
_GRADIENTS = Tensors("grad_normed", "grad_summed", "summed", "weight")
_backward = Op(
    "residual_layer_norm_backward",
    "(Tensor grad_normed, Tensor? grad_summed, Tensor summed, Tensor mean, Tensor rstd, "
    "Tensor weight) -> (Tensor, Tensor, Tensor)",
    check=_check_backward,
    native=by_device(
        cpu=native(
            Tensors("grad_normed", "weight"), Tensors("summed", "grad_summed", one_dtype=True)
        )(_run_backward_kernels),
        cuda=cuda(_GRADIENTS, refuses=_cuda_refuses_backward)(_run_backward_kernels),
    ),
    triton=triton("layer_norm", "backward", _GRADIENTS),
    torch=_backward_torch,
    reference=_backward_reference,
)
_forward = Op(
    "residual_layer_norm",
    "(Tensor x, Tensor? residual, Tensor weight, Tensor bias, float eps) "
    "-> (Tensor normed, Tensor summed, Tensor mean, Tensor rstd)",
    check=_check,
    native=by_device(
        cpu=native(Tensors("x", "residual"), Tensors("weight", "bias", one_dtype=True))(
            _run_kernels
        ),
        cuda=cuda(Tensors("x", "residual", "weight", "bias"), refuses=_cuda_refuses)(_run_kernels),
    ),
    triton=triton("layer_norm", "forward", Tensors("x", "residual", "weight", "bias")),
    torch=_torch,
    reference=_reference,
)


def _setup_context(ctx: Any, call: Arguments, results: tuple[Tensor, ...]) -> None:
    _, summed, mean, rstd = results
    ctx.mark_non_differentiable(mean, rstd)
    ctx.set_materialize_grads(False)
    ctx.eps = call.eps
    ctx.bias_dtype = call.bias.dtype
    ctx.x_dtype = call.x.dtype
    ctx.has_residual = call.residual is not None
    ctx.shape = call.x.shape
    ctx.save_for_backward(summed if ctx.has_residual else call.x, mean, rstd, call.weight)


def _differentiate(
    ctx: Any, grad_normed: Tensor | None, grad_summed: Tensor | None, *statistics: Any
) -> tuple[Tensor | None, ...]:
    summed, mean, rstd, weight = ctx.saved_tensors
    if grad_normed is None:
        grad_normed = summed.new_zeros(ctx.shape)
    if wants_graph():  # the saved statistics are constants
        mean, rstd = _statistics(summed.to(mean.dtype), ctx.eps)
    grad, grad_weight, grad_bias = _backward.gradient(
        grad_normed, grad_summed if ctx.has_residual else None, summed, mean, rstd, weight
    )
    grad_residual = grad if ctx.has_residual else None
    return grad.to(ctx.x_dtype), grad_residual, grad_weight, grad_bias.to(ctx.bias_dtype)


_forward.register_autograd(_differentiate, _setup_context)


@_forward.register_fake
def _(call: Arguments) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x, residual = call.x, call.residual
    row_statistics = (*x.shape[:-1], 1)
    dtype = statistics_dtype((x if residual is None else residual).dtype)
    return (
        x.new_empty(x.shape),
        x.new_empty(0) if residual is None else residual.new_empty(residual.shape),
        x.new_empty(row_statistics, dtype=dtype),
        x.new_empty(row_statistics, dtype=dtype),
    )


@_backward.register_fake
def _(call: Arguments) -> tuple[Tensor, Tensor, Tensor]:
    width = call.weight.shape
    return (
        call.summed.new_empty(call.summed.shape),
        call.weight.new_empty(width),
        call.weight.new_empty(width),
    )
