"""GPT-2's feed-forward layer and its activation (Hendrycks & Gimpel, 2016, tanh form).

gelu(z)  = z / 2 * (1 + tanh(sqrt(2 / pi) * (z + 0.044715 z^3)))
gelu_mlp = gelu(x @ w_fc + b_fc) @ w_proj + b_proj

The op gives back `inner`, too, from which the backward pass recomputes the activation. What that
holds is the caller's choice (`keep`): "product", x @ w_fc; "sum", x @ w_fc + b_fc, as epilogues of
matrix products write (ops/cuda/cublaslt.py); "nothing", where no backward pass follows. Each
implementation of the backward pass takes either of the first two, from whichever it came.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import ArgumentError
from .backend import Op, autocast, statistics_dtype
from .cuda import by_device, cublaslt, cuda, kernels, unsuitable
from .cuda import mlp as cuda_mlp
from .derivatives import wants_graph
from .matmul import matmul, reads_wider_weights, refuses_mixture, weight_gradient
from .native import native, refuses_tensors, rows
from .requirements import check_floating, check_shape
from .triton import triton
from .triton import unsuitable as unsuitable_for_triton


def bias_gelu(x: Tensor, bias: Tensor) -> Tensor:
    """`gelu(x + bias)`.

    Args:
        x: (..., C).
        bias: (C,).

    Returns:
        (..., C) in x's dtype.
    """
    return _bias_gelu.call(x, bias)


def gelu_mlp(x: Tensor, w_fc: Tensor, b_fc: Tensor, w_proj: Tensor, b_proj: Tensor) -> Tensor:
    """`gelu(x @ w_fc + b_fc) @ w_proj + b_proj`; what the backward pass can recompute is not kept.

    Args:
        x: (..., C_in).
        w_fc: (C_in, C_inner); a transposed view of an `nn.Linear` weight is read in place.
        b_fc: (C_inner,).
        w_proj: (C_inner, C_out).
        b_proj: (C_out,).

    Returns:
        (..., C_out).
    """
    tensors = [x, w_fc, b_fc, w_proj, b_proj]
    rounded = 1 if reads_wider_weights(x) else len(tensors)
    tensors[:rounded] = autocast(*tensors[:rounded])
    keep = "nothing"
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        keep = "sum" if cublaslt.is_wanted(tensors[0]) else "product"
    return _gelu_mlp.call(*tensors, keep)[0]


def _check_bias_gelu(x: Tensor, bias: Tensor) -> None:
    check_floating(x=x, bias=bias)
    if x.shape[-1:] != bias.shape or not bias.dim():
        raise ArgumentError(
            f"bias {tuple(bias.shape)} must have the size of x's last dimension, "
            f"x being {tuple(x.shape)}"
        )


def _check_bias_gelu_backward(grad: Tensor, x: Tensor, bias: Tensor) -> None:
    _check_bias_gelu(x, bias)
    check_floating(grad=grad)
    check_shape("grad", grad, *x.shape, says="x's shape")


def _check_gelu_mlp(
    x: Tensor, w_fc: Tensor, b_fc: Tensor, w_proj: Tensor, b_proj: Tensor, keep: str = "product"
) -> None:
    check_floating(x=x, w_fc=w_fc, b_fc=b_fc, w_proj=w_proj, b_proj=b_proj)
    sizes = (*x.shape[-1:], *b_fc.shape, *b_proj.shape)
    if len(sizes) != 3 or w_fc.shape != sizes[:2] or w_proj.shape != sizes[1:]:
        raise ArgumentError(
            f"shapes do not chain: x {tuple(x.shape)}, w_fc {tuple(w_fc.shape)}, "
            f"b_fc {tuple(b_fc.shape)}, w_proj {tuple(w_proj.shape)}, "
            f"b_proj {tuple(b_proj.shape)}; weights are (in, out)"
        )
    if keep not in ("product", "sum", "nothing"):
        raise ArgumentError(f"keep={keep!r} is none of product, sum, nothing")


def _check_gelu_mlp_backward(
    grad: Tensor,
    x: Tensor,
    inner: Tensor,
    w_fc: Tensor,
    b_fc: Tensor,
    w_proj: Tensor,
    kept: str = "product",
) -> None:
    check_floating(grad=grad, inner=inner)
    _check_gelu_mlp(x, w_fc, b_fc, w_proj, w_proj.new_empty(w_proj.shape[1:]))
    check_shape("grad", grad, *x.shape[:-1], *w_proj.shape[1:], says="a row for each of x's")
    check_shape("inner", inner, x.shape[:-1].numel(), *b_fc.shape, says="a row for each of x's")
    if kept not in ("product", "sum"):
        raise ArgumentError(f"kept={kept!r} is none of product, sum")


_A = math.sqrt(2.0 / math.pi)
_B = 0.044715


def _bias_gelu_reference(x: Tensor, bias: Tensor) -> Tensor:
    dtype = statistics_dtype(x.dtype)
    z = x.to(dtype) + bias.to(dtype)
    return (0.5 * z * (1.0 + torch.tanh(_A * (z + _B * z**3)))).to(x.dtype).contiguous()


def _bias_gelu_torch(x: Tensor, bias: Tensor) -> Tensor:
    return F.gelu((x + bias.to(x.dtype)).contiguous(), approximate="tanh")


def _bias_gelu_backward_reference(grad: Tensor, x: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    dtype = statistics_dtype(x.dtype)
    z = x.to(dtype) + bias.to(dtype)
    tanh = torch.tanh(_A * (z + _B * z**3))
    slope = 0.5 * (1.0 + tanh) + 0.5 * z * (1.0 - tanh**2) * _A * (1.0 + 3.0 * _B * z**2)
    grad_z = grad.to(dtype) * slope
    return grad_z.to(x.dtype).contiguous(), rows(grad_z).sum(0).to(bias.dtype)


def _bias_gelu_backward_torch(grad: Tensor, x: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    z = (x + bias.to(x.dtype)).contiguous()
    grad_x = torch.ops.aten.gelu_backward(grad.contiguous(), z, approximate="tanh")
    return grad_x, rows(grad_x).sum(0, dtype=statistics_dtype(x.dtype)).to(bias.dtype)


def _bias_gelu_native(x: Tensor, bias: Tensor) -> Tensor:
    return kernels(x).bias_gelu(rows(x), bias.contiguous()).view(x.shape)


def _bias_gelu_backward_native(grad: Tensor, x: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    grad_x = torch.empty_like(x, memory_format=torch.contiguous_format)
    grad_bias = kernels(x).bias_gelu_backward(
        rows(grad), rows(x), bias.contiguous(), rows(grad_x), None
    )
    return grad_x, grad_bias


def _refuses(*arguments: Tensor | str) -> str | None:
    tensors = _tensors(arguments)
    if not tensors[0].numel():
        return "the native kernels need at least one element"
    return refuses_tensors(*tensors)


def _cuda_refuses(*arguments: Tensor | str) -> str | None:
    return unsuitable(*_tensors(arguments), one_dtype=True)


def _triton_refuses_mixture(*arguments: Tensor | str) -> str | None:
    return unsuitable_for_triton(*_tensors(arguments), one_dtype=True)


def _tensors(arguments: Sequence[Tensor | str]) -> list[Tensor]:
    return [argument for argument in arguments if isinstance(argument, Tensor)]


def _inner(x: Tensor, w_fc: Tensor, b_fc: Tensor, keep: str) -> tuple[Tensor, Tensor]:
    """x's rows through the first projection, and the bias that is still to be added."""
    if keep == "sum":
        return torch.addmm(b_fc, rows(x), w_fc), torch.zeros_like(b_fc)
    return rows(x) @ w_fc, b_fc


def _kept(inner: Tensor, keep: str) -> Tensor:
    return inner.new_empty((0, inner.shape[1])) if keep == "nothing" else inner


def _bias_of(b_fc: Tensor, kept: str) -> Tensor:
    """What GELU's argument lacks in what was kept."""
    return torch.zeros_like(b_fc) if kept == "sum" else b_fc


def _gelu_mlp_forward(
    x: Tensor, w_fc: Tensor, b_fc: Tensor, w_proj: Tensor, b_proj: Tensor, keep: str = "product"
) -> tuple[Tensor, Tensor]:
    w_fc, b_fc, w_proj, b_proj = (weight.to(x.dtype) for weight in (w_fc, b_fc, w_proj, b_proj))
    inner, bias = _inner(x, w_fc, b_fc, keep)
    out = torch.addmm(b_proj, bias_gelu(inner, bias), w_proj)
    return out.reshape(*x.shape[:-1], w_proj.shape[1]), _kept(inner, keep)


def _gelu_mlp_backward(
    grad: Tensor,
    x: Tensor,
    inner: Tensor,
    w_fc: Tensor,
    b_fc: Tensor,
    w_proj: Tensor,
    kept: str = "product",
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    grad, dtype = rows(grad), x.dtype
    bias = _bias_of(b_fc, kept).to(dtype)
    activated = bias_gelu(inner, bias)
    grad_w_proj = (activated.t() @ grad).to(w_proj.dtype)
    grad_inner, grad_b_fc = _bias_gelu_backward.call(grad @ w_proj.to(dtype).t(), inner, bias)
    grad_w_fc = (rows(x).t() @ grad_inner).to(w_fc.dtype)
    grad_x = (grad_inner @ w_fc.to(dtype).t()).reshape(x.shape)
    grad_b_proj = grad.sum(0, dtype=statistics_dtype(dtype)).to(w_proj.dtype)
    return grad_x, grad_w_fc, grad_b_fc.to(b_fc.dtype), grad_w_proj, grad_b_proj


def _gelu_mlp_forward_cpu(
    x: Tensor, w_fc: Tensor, b_fc: Tensor, w_proj: Tensor, b_proj: Tensor, keep: str = "product"
) -> tuple[Tensor, Tensor]:
    inner = matmul(rows(x), w_fc, x.dtype, bias=b_fc if keep == "sum" else None)
    bias = _bias_of(b_fc, keep).to(x.dtype).contiguous()
    activated = kernels(x).bias_gelu(inner, bias)
    out = matmul(activated, w_proj, x.dtype, bias=b_proj)
    return out.view(*x.shape[:-1], out.shape[1]), _kept(inner, keep)


def _gelu_mlp_backward_cpu(
    grad: Tensor,
    x: Tensor,
    inner: Tensor,
    w_fc: Tensor,
    b_fc: Tensor,
    w_proj: Tensor,
    kept: str = "product",
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    grad, dtype = rows(grad), x.dtype
    grad_inner = matmul(grad, w_proj.t(), dtype)
    activated = torch.empty_like(grad_inner)
    bias = _bias_of(b_fc, kept).to(dtype).contiguous()
    grad_b_fc = kernels(x).bias_gelu_backward(grad_inner, inner, bias, grad_inner, activated)
    grad_b_proj = grad.new_empty(grad.shape[1], dtype=torch.float32)
    grad_w_proj = weight_gradient(activated, grad, w_proj, grad_b_proj)
    del activated
    grad_w_fc = weight_gradient(rows(x), grad_inner, w_fc)
    grad_x = matmul(grad_inner, w_fc.t(), dtype).view(x.shape)
    return grad_x, grad_w_fc, grad_b_fc.to(b_fc.dtype), grad_w_proj, grad_b_proj.to(w_proj.dtype)


# On a GPU the matrix products are cuBLAS's.


def _gelu_mlp_forward_cublas(
    x: Tensor, w_fc: Tensor, b_fc: Tensor, w_proj: Tensor, b_proj: Tensor, keep: str = "product"
) -> tuple[Tensor, Tensor]:
    inner, bias = _inner(x, w_fc, b_fc, keep)
    activated = kernels(x).bias_gelu(inner, bias.contiguous())
    out = torch.addmm(b_proj, activated, w_proj)
    return out.view(*x.shape[:-1], out.shape[1]), _kept(inner, keep)


def _gelu_mlp_backward_cublas(
    grad: Tensor,
    x: Tensor,
    inner: Tensor,
    w_fc: Tensor,
    b_fc: Tensor,
    w_proj: Tensor,
    kept: str = "product",
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    grad = rows(grad)
    grad_inner = grad @ w_proj.t()
    activated = torch.empty_like(grad_inner)
    grad_b_fc = kernels(x).bias_gelu_backward(
        grad_inner, inner, _bias_of(b_fc, kept).contiguous(), grad_inner, activated
    )
    grad_w_proj = activated.t() @ grad
    grad_w_fc = rows(x).t() @ grad_inner
    grad_x = (grad_inner @ w_fc.t()).view(x.shape)
    return grad_x, grad_w_fc, grad_b_fc, grad_w_proj, kernels(x).sum_rows(grad)


def _gelu_mlp_forward_cuda(*arguments: Any) -> tuple[Tensor, Tensor]:
    return cuda_mlp.gelu_mlp(*arguments) or _gelu_mlp_forward_cublas(*arguments)


def _gelu_mlp_backward_cuda(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return cuda_mlp.gelu_mlp_backward(*arguments) or _gelu_mlp_backward_cublas(*arguments)


_bias_gelu_backward = Op(
    "bias_gelu_backward",
    "(Tensor grad, Tensor x, Tensor bias) -> (Tensor, Tensor)",
    check=_check_bias_gelu_backward,
    native=by_device(
        cpu=native(_bias_gelu_backward_native, _refuses),
        cuda=cuda(_bias_gelu_backward_native, _cuda_refuses),
    ),
    triton=triton("mlp", "bias_gelu_backward", unsuitable_for_triton),
    torch=_bias_gelu_backward_torch,
    reference=_bias_gelu_backward_reference,
)
_bias_gelu = Op(
    "bias_gelu",
    "(Tensor x, Tensor bias) -> Tensor",
    check=_check_bias_gelu,
    native=by_device(
        cpu=native(_bias_gelu_native, _refuses),
        cuda=cuda(_bias_gelu_native, _cuda_refuses),
    ),
    triton=triton("mlp", "bias_gelu", unsuitable_for_triton),
    torch=_bias_gelu_torch,
    reference=_bias_gelu_reference,
)
_gelu_mlp_gradient = Op(
    "gelu_mlp_backward",
    "(Tensor grad, Tensor x, Tensor inner, Tensor w_fc, Tensor b_fc, Tensor w_proj, "
    'str kept="product") -> (Tensor, Tensor, Tensor, Tensor, Tensor)',
    check=_check_gelu_mlp_backward,
    native=by_device(
        cpu=native(_gelu_mlp_backward_cpu, refuses_mixture),
        cuda=cuda(_gelu_mlp_backward_cuda, _cuda_refuses),
    ),
    triton=triton("mlp", "gelu_mlp_backward", _triton_refuses_mixture),
    torch=_gelu_mlp_backward,
    reference=_gelu_mlp_backward,
)
_gelu_mlp = Op(
    "gelu_mlp",
    '(Tensor x, Tensor w_fc, Tensor b_fc, Tensor w_proj, Tensor b_proj, str keep="product") '
    "-> (Tensor out, Tensor inner)",
    check=_check_gelu_mlp,
    native=by_device(
        cpu=native(_gelu_mlp_forward_cpu, refuses_mixture),
        cuda=cuda(_gelu_mlp_forward_cuda, _cuda_refuses),
    ),
    triton=triton("mlp", "gelu_mlp", _triton_refuses_mixture),
    torch=_gelu_mlp_forward,
    reference=_gelu_mlp_forward,
)


def _bias_gelu_setup(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.save_for_backward(*inputs)


def _bias_gelu_differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
    return _bias_gelu_backward.gradient(grad, *ctx.saved_tensors)


def _gelu_mlp_setup(ctx: Any, inputs: Any, output: Any) -> None:
    x, w_fc, b_fc, w_proj, _, ctx.kept = inputs
    _, inner = output
    ctx.mark_non_differentiable(inner)
    ctx.save_for_backward(x, inner, w_fc, b_fc, w_proj)


def _gelu_mlp_differentiate(ctx: Any, grad: Tensor, grad_inner: Any) -> tuple[Tensor | None, ...]:
    x, inner, w_fc, b_fc, w_proj = ctx.saved_tensors
    if wants_graph():  # what was saved of the results is a constant
        inner = rows(x) @ w_fc.to(x.dtype)
        return *_gelu_mlp_gradient.gradient(grad, x, inner, w_fc, b_fc, w_proj, "product"), None
    if any(ctx.needs_input_grad[1:5]):
        return *_gelu_mlp_gradient.gradient(grad, x, inner, w_fc, b_fc, w_proj, ctx.kept), None
    # The weights are frozen: half of the products would be for nobody.
    grad_inner = matmul(rows(grad), w_proj.t(), x.dtype)
    bias = _bias_of(b_fc, ctx.kept).to(x.dtype)
    grad_inner, _ = _bias_gelu_backward.gradient(grad_inner, inner, bias)
    grad_x = matmul(grad_inner, w_fc.t(), x.dtype).view(x.shape)
    return grad_x, None, None, None, None, None


_bias_gelu.register_autograd(_bias_gelu_differentiate, _bias_gelu_setup)
_gelu_mlp.register_autograd(_gelu_mlp_differentiate, _gelu_mlp_setup)


@_bias_gelu.register_fake
def _(x, bias):  # type: ignore[no-untyped-def]
    return x.new_empty(x.shape)


@_bias_gelu_backward.register_fake
def _(grad, x, bias):  # type: ignore[no-untyped-def]
    return x.new_empty(x.shape), bias.new_empty(bias.shape)


@_gelu_mlp.register_fake
def _(x, w_fc, b_fc, w_proj, b_proj, keep="product"):  # type: ignore[no-untyped-def]
    rows = 0 if keep == "nothing" else x.shape[:-1].numel()
    return x.new_empty((*x.shape[:-1], w_proj.shape[1])), x.new_empty((rows, w_fc.shape[1]))


@_gelu_mlp_gradient.register_fake
def _(grad, x, inner, w_fc, b_fc, w_proj, kept="product"):  # type: ignore[no-untyped-def]
    return (
        x.new_empty(x.shape),
        w_fc.new_empty(w_fc.shape),
        b_fc.new_empty(b_fc.shape),
        w_proj.new_empty(w_proj.shape),
        w_proj.new_empty((grad.shape[-1],)),
    )
