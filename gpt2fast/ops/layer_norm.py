"""Residual add and layer normalisation in one pass (Ba et al., 2016).

summed = x + residual
normed = (summed - mean) / sqrt(var + eps) * weight + bias      over the last dimension
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..errors import ArgumentError
from .backend import Op, statistics_dtype
from .cuda import by_device, cuda, kernels, unsuitable
from .derivatives import wants_graph
from .native import native, refuses_tensors, rows
from .requirements import check_at_least, check_constants, check_floating, check_shape
from .triton import triton
from .triton import unsuitable as unsuitable_for_triton


def residual_layer_norm(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, eps: float = 1e-5
) -> tuple[Tensor, Tensor]:
    """Add to the residual stream and normalise the sum.

    Args:
        x: (..., C), what is added.
        residual: (..., C), the residual stream, or None for the first normalisation.
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


def _check(x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, eps: float) -> None:
    if not (x.is_floating_point() and weight.is_floating_point() and bias.is_floating_point()):
        check_floating(x=x, weight=weight, bias=bias)
    if residual is not None and not residual.is_floating_point():
        check_floating(residual=residual)
    if x.shape[-1:] != weight.shape or weight.shape != bias.shape or not weight.dim():
        raise ArgumentError(
            f"weight {tuple(weight.shape)} and bias {tuple(bias.shape)} must have the size of "
            f"x's last dimension, x being {tuple(x.shape)}"
        )
    if residual is not None and residual.shape != x.shape:
        raise ArgumentError(
            f"residual {tuple(residual.shape)} must have the shape of x {tuple(x.shape)}"
        )
    if not 0 <= eps < math.inf:
        check_at_least(0, eps=eps)


def _check_backward(
    grad_normed: Tensor,
    grad_summed: Tensor | None,
    summed: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor,
) -> None:
    check_floating(grad_normed=grad_normed, summed=summed, weight=weight)
    if not summed.dim() or weight.shape != summed.shape[-1:]:
        raise ArgumentError(
            f"weight {tuple(weight.shape)} must have the size of summed's last dimension, summed "
            f"being {tuple(summed.shape)}"
        )
    for name, grad in (("grad_normed", grad_normed), ("grad_summed", grad_summed)):
        if grad is not None:
            check_shape(name, grad, *summed.shape, says="summed's shape")
    for name, statistic in (("mean", mean), ("rstd", rstd)):
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


def _torch(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    summed = _add(x, residual)
    dtype = statistics_dtype(summed.dtype)
    # Parameters in float32 make torch keep the statistics of half-precision input in float32.
    normed, mean, rstd = torch.native_layer_norm(
        summed.contiguous(), weight.shape, weight.to(dtype), bias.to(dtype), eps
    )
    return (
        normed.to(x.dtype),
        _returned_sum(summed, residual),
        mean.to(dtype),
        rstd.to(dtype),
    )


def _native(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    normed, summed, mean, rstd = kernels(x).layer_norm(
        rows(x),
        None if residual is None else rows(residual),
        weight.contiguous(),
        bias.contiguous(),
        eps,
    )
    row_statistics = (*x.shape[:-1], 1)
    return (
        normed.view(x.shape),
        summed if residual is None else summed.view(x.shape),
        mean.view(row_statistics),
        rstd.view(row_statistics),
    )


def _native_refuses(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, eps: float
) -> str | None:
    return _refuses(x, residual, weight) or refuses_tensors(weight, bias)


def _refuses(*tensors: Tensor | None) -> str | None:
    """The dtypes of stream, branch and parameters may differ."""
    given = [tensor for tensor in tensors if tensor is not None]
    if not given[0].numel():
        return "the native kernels need at least one element"
    return next(filter(None, map(refuses_tensors, given)), None)


def _backward_native(
    grad_normed: Tensor,
    grad_summed: Tensor | None,
    summed: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    grad_input, grad_weight, grad_bias = kernels(summed).layer_norm_backward(
        rows(grad_normed),
        None if grad_summed is None else rows(grad_summed),
        rows(summed),
        mean.contiguous(),
        rstd.contiguous(),
        weight.contiguous(),
    )
    return grad_input.view(summed.shape), grad_weight, grad_bias


def _backward_native_refuses(
    grad_normed: Tensor,
    grad_summed: Tensor | None,
    summed: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor,
) -> str | None:
    return _refuses(grad_normed, weight, summed) or refuses_tensors(summed, grad_summed)


def _cuda_refuses(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, eps: float
) -> str | None:
    stream = x if residual is None else residual
    return unsuitable(x, stream, weight, bias) or _refuses_mixture(x, stream, weight, bias)


def _backward_cuda_refuses(
    grad_normed: Tensor,
    grad_summed: Tensor | None,
    summed: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor,
) -> str | None:
    if grad_summed is not None and grad_summed.dtype != summed.dtype:
        return f"the gradient of {summed.dtype} sums is in {grad_summed.dtype}"
    return unsuitable(grad_normed, grad_summed, summed, weight) or _refuses_mixture(
        grad_normed, summed, weight
    )


def _refuses_mixture(branch: Tensor, stream: Tensor, *weights: Tensor) -> str | None:
    """Half-precision branches go with float32 streams and weights, as under autocast."""
    half, wide = branch.dtype, torch.float32
    for weight in weights:
        if (stream.dtype, weight.dtype) not in ((half, half), (half, wide), (wide, wide)):
            dtypes = (str(x.dtype).removeprefix("torch.") for x in (branch, stream, weight))
            return f"no CUDA layer norm for x, residual and weight in {', '.join(dtypes)}"
    return None


def _triton_refuses(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, eps: float
) -> str | None:
    return unsuitable_for_triton(x, residual, weight, bias)


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


def _backward_torch(
    grad_normed: Tensor,
    grad_summed: Tensor | None,
    summed: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    grad_input, grad_weight, grad_bias = torch.ops.aten.native_layer_norm_backward(
        grad_normed.to(summed.dtype).contiguous(),
        summed.contiguous(),
        weight.shape,
        mean,
        rstd,
        weight.to(mean.dtype),
        torch.zeros_like(weight, dtype=mean.dtype),
        [True, True, True],
    )
    if grad_summed is not None:
        grad_input += grad_summed
    return grad_input, grad_weight.to(weight.dtype), grad_bias.to(weight.dtype)


_backward = Op(
    "residual_layer_norm_backward",
    "(Tensor grad_normed, Tensor? grad_summed, Tensor summed, Tensor mean, Tensor rstd, "
    "Tensor weight) -> (Tensor, Tensor, Tensor)",
    check=_check_backward,
    native=by_device(
        cpu=native(_backward_native, _backward_native_refuses),
        cuda=cuda(_backward_native, _backward_cuda_refuses),
    ),
    triton=triton("layer_norm", "backward", unsuitable_for_triton),
    torch=_backward_torch,
    reference=_backward_reference,
)
_forward = Op(
    "residual_layer_norm",
    "(Tensor x, Tensor? residual, Tensor weight, Tensor bias, float eps) "
    "-> (Tensor normed, Tensor summed, Tensor mean, Tensor rstd)",
    check=_check,
    native=by_device(
        cpu=native(_native, _native_refuses),
        cuda=cuda(_native, _cuda_refuses),
    ),
    triton=triton("layer_norm", "forward", _triton_refuses),
    torch=_torch,
    reference=_reference,
)


def _setup_context(ctx: Any, inputs: Any, output: Any) -> None:
    x, residual, weight, bias, ctx.eps = inputs
    _, summed, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    ctx.set_materialize_grads(False)
    ctx.bias_dtype = bias.dtype
    ctx.x_dtype = x.dtype
    ctx.has_residual = residual is not None
    ctx.shape = x.shape
    ctx.save_for_backward(summed if ctx.has_residual else x, mean, rstd, weight)


def _differentiate(
    ctx: Any, grad_normed: Tensor | None, grad_summed: Tensor | None, *statistics: Any
) -> tuple[Any, ...]:
    summed, mean, rstd, weight = ctx.saved_tensors
    if grad_normed is None:
        grad_normed = summed.new_zeros(ctx.shape)
    if wants_graph():  # what was saved of the statistics is a constant
        mean, rstd = _statistics(summed.to(mean.dtype), ctx.eps)
    grad, grad_weight, grad_bias = _backward.gradient(
        grad_normed, grad_summed if ctx.has_residual else None, summed, mean, rstd, weight
    )
    grad_residual = grad if ctx.has_residual else None
    return grad.to(ctx.x_dtype), grad_residual, grad_weight, grad_bias.to(ctx.bias_dtype), None


_forward.register_autograd(_differentiate, _setup_context)


@_forward.register_fake
def _(x, residual, weight, bias, eps):  # type: ignore[no-untyped-def]
    summed = x if residual is None else residual
    row_statistics = (*x.shape[:-1], 1)
    dtype = statistics_dtype(summed.dtype)
    return (
        x.new_empty(x.shape),
        x.new_empty(0) if residual is None else residual.new_empty(residual.shape),
        x.new_empty(row_statistics, dtype=dtype),
        x.new_empty(row_statistics, dtype=dtype),
    )


@_backward.register_fake
def _(grad_normed, grad_summed, summed, mean, rstd, weight):  # type: ignore[no-untyped-def]
    return (
        summed.new_empty(summed.shape),
        weight.new_empty(weight.shape),
        weight.new_empty(weight.shape),
    )
