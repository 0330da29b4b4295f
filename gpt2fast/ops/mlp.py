"""GPT-2's feed-forward layer and its activation (Hendrycks & Gimpel, 2016, tanh form).

gelu(z)  = z / 2 * (1 + tanh(sqrt(2 / pi) * (z + 0.044715 z^3)))
gelu_mlp = gelu(x @ w_fc + b_fc) @ w_proj + b_proj

The op also returns the pre-activation, `inner`, from which the backward pass recomputes the
activation. `keep` says what it holds: "product", x @ w_fc; "sum", x @ w_fc + b_fc, as the epilogues
of matrix products write it (ops/cuda/cublaslt.py); "nothing", where no backward pass follows. Each
implementation of the backward pass takes the first two, whichever implementation they come from.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import ArgumentError
from .backend import Arguments, Op, autocast, statistics_dtype
from .cuda import by_device, cublaslt, cuda, kernels
from .cuda import mlp as cuda_mlp
from .derivatives import wants_graph
from .matmul import matmul, product, reads_wider_weights, weight_gradient
from .native import native, rows
from .requirements import check_floating, check_shape
from .support import Tensors
from .triton import triton


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


def _check_bias_gelu(call: Arguments) -> None:
    x, bias = call.x, call.bias
    check_floating(x=x, bias=bias)
    if x.shape[-1:] != bias.shape or not bias.dim():
        raise ArgumentError(
            f"bias {tuple(bias.shape)} must have the size of x's last dimension, "
            f"x being {tuple(x.shape)}"
        )


def _check_bias_gelu_backward(call: Arguments) -> None:
    _check_bias_gelu(call)
    check_floating(grad=call.grad)
    check_shape("grad", call.grad, *call.x.shape, says="x's shape")


def _check_gelu_mlp(call: Arguments) -> None:
    check_floating(b_proj=call.b_proj)
    _check_chain(call, call.b_proj.shape)
    if call.keep not in ("product", "sum", "nothing"):
        raise ArgumentError(f"keep={call.keep!r} is none of product, sum, nothing")


def _check_chain(call: Arguments, b_proj: torch.Size) -> None:
    x, w_fc, b_fc, w_proj = call.x, call.w_fc, call.b_fc, call.w_proj
    check_floating(x=x, w_fc=w_fc, b_fc=b_fc, w_proj=w_proj)
    sizes = (*x.shape[-1:], *b_fc.shape, *b_proj)
    if len(sizes) != 3 or w_fc.shape != sizes[:2] or w_proj.shape != sizes[1:]:
        raise ArgumentError(
            f"shapes do not chain: x {tuple(x.shape)}, w_fc {tuple(w_fc.shape)}, "
            f"b_fc {tuple(b_fc.shape)}, w_proj {tuple(w_proj.shape)}, "
            f"b_proj {tuple(b_proj)}; weights are (in, out)"
        )


def _check_gelu_mlp_backward(call: Arguments) -> None:
    x, grad, inner, outputs = call.x, call.grad, call.inner, call.w_proj.shape[1:]
    check_floating(grad=grad, inner=inner)
    _check_chain(call, outputs)
    check_shape("grad", grad, *x.shape[:-1], *outputs, says="a row for each of x's")
    rows_of_x = x.shape[:-1].numel()
    check_shape("inner", inner, rows_of_x, *call.b_fc.shape, says="a row for each of x's")
    if call.kept not in ("product", "sum"):
        raise ArgumentError(f"kept={call.kept!r} is none of product, sum")


_A = math.sqrt(2.0 / math.pi)
_B = 0.044715


def _bias_gelu_reference(x: Tensor, bias: Tensor) -> Tensor:
    dtype = statistics_dtype(x.dtype)
    z = x.to(dtype) + bias.to(dtype)
    return (0.5 * z * (1.0 + torch.tanh(_A * (z + _B * z**3)))).to(x.dtype).contiguous()


def _bias_gelu_backward_reference(grad: Tensor, x: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    dtype = statistics_dtype(x.dtype)
    z = x.to(dtype) + bias.to(dtype)
    tanh = torch.tanh(_A * (z + _B * z**3))
    slope = 0.5 * (1.0 + tanh) + 0.5 * z * (1.0 - tanh**2) * _A * (1.0 + 3.0 * _B * z**2)
    grad_z = grad.to(dtype) * slope
    return grad_z.to(x.dtype).contiguous(), rows(grad_z).sum(0).to(bias.dtype)


def _bias_gelu_torch(call: Arguments) -> Tensor:
    return F.gelu((call.x + call.bias.to(call.x.dtype)).contiguous(), approximate="tanh")


def _bias_gelu_backward_torch(call: Arguments) -> tuple[Tensor, Tensor]:
    x, bias = call.x, call.bias
    z = (x + bias.to(x.dtype)).contiguous()
    grad_x = torch.ops.aten.gelu_backward(call.grad.contiguous(), z, approximate="tanh")
    return grad_x, rows(grad_x).sum(0, dtype=statistics_dtype(x.dtype)).to(bias.dtype)


def _bias_gelu_native(call: Arguments) -> Tensor:
    x = call.x
    return kernels(x).bias_gelu.default(rows(x), call.bias.contiguous()).view(x.shape)


def _bias_gelu_backward_native(call: Arguments) -> tuple[Tensor, Tensor]:
    x = call.x
    grad_x = torch.empty_like(x, memory_format=torch.contiguous_format)
    grad_bias = kernels(x).bias_gelu_backward.default(
        rows(call.grad), rows(x), call.bias.contiguous(), rows(grad_x), None
    )
    return grad_x, grad_bias


def _inner(call: Arguments) -> tuple[Tensor, Tensor]:
    """x's rows through the first projection, and the bias not yet included in them."""
    x, w_fc, b_fc = rows(call.x), call.w_fc, call.b_fc
    if call.keep == "sum":
        return product(x, w_fc, b_fc), torch.zeros_like(b_fc)
    return product(x, w_fc), b_fc


def _kept(inner: Tensor, keep: str) -> Tensor:
    return inner.new_empty((0, inner.shape[1])) if keep == "nothing" else inner


def _bias_of(b_fc: Tensor, kept: str) -> Tensor:
    """Bias not yet included in the saved pre-activation; zero if it is."""
    return torch.zeros_like(b_fc) if kept == "sum" else b_fc


def _gelu_mlp_reference(
    x: Tensor, w_fc: Tensor, b_fc: Tensor, w_proj: Tensor, b_proj: Tensor, keep: str = "product"
) -> tuple[Tensor, Tensor]:
    w_fc, b_fc, w_proj, b_proj = (weight.to(x.dtype) for weight in (w_fc, b_fc, w_proj, b_proj))
    inner, bias = _inner(_gelu_mlp.bind(x, w_fc, b_fc, w_proj, b_proj, keep))
    out = product(bias_gelu(inner, bias), w_proj, b_proj)
    return out.reshape(*x.shape[:-1], w_proj.shape[1]), _kept(inner, keep)


def _gelu_mlp_backward_reference(
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
    grad_w_proj = product(activated.t(), grad).to(w_proj.dtype)
    grad_inner = product(grad, w_proj.to(dtype).t())
    grad_inner, grad_b_fc = _bias_gelu_backward.call(grad_inner, inner, bias)
    grad_w_fc = product(rows(x).t(), grad_inner).to(w_fc.dtype)
    grad_x = product(grad_inner, w_fc.to(dtype).t()).reshape(x.shape)
    grad_b_proj = grad.sum(0, dtype=statistics_dtype(dtype)).to(w_proj.dtype)
    return grad_x, grad_w_fc, grad_b_fc.to(b_fc.dtype), grad_w_proj, grad_b_proj


@native(Tensors("x", "w_fc", "b_fc", "w_proj", "b_proj"))
def _gelu_mlp_native(call: Arguments) -> tuple[Tensor, Tensor]:
    x, keep = call.x, call.keep
    inner = matmul(rows(x), call.w_fc, x.dtype, bias=call.b_fc if keep == "sum" else None)
    bias = _bias_of(call.b_fc, keep).to(x.dtype).contiguous()
    activated = kernels(x).bias_gelu.default(inner, bias)
    out = matmul(activated, call.w_proj, x.dtype, bias=call.b_proj)
    return out.view(*x.shape[:-1], out.shape[1]), _kept(inner, keep)


@native(Tensors("grad", "x", "inner", "w_fc", "b_fc", "w_proj"))
def _gelu_mlp_backward_native(
    call: Arguments,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    grad, x, w_proj, dtype = rows(call.grad), call.x, call.w_proj, call.x.dtype
    grad_inner = matmul(grad, w_proj.t(), dtype)
    activated = torch.empty_like(grad_inner)
    bias = _bias_of(call.b_fc, call.kept).to(dtype).contiguous()
    grad_b_fc = kernels(x).bias_gelu_backward.default(
        grad_inner, call.inner, bias, grad_inner, activated
    )
    grad_b_proj = grad.new_empty(grad.shape[1], dtype=torch.float32)
    grad_w_proj = weight_gradient(activated, grad, w_proj, grad_b_proj)
    del activated
    grad_w_fc = weight_gradient(rows(x), grad_inner, call.w_fc)
    grad_x = matmul(grad_inner, call.w_fc.t(), dtype).view(x.shape)
    return (
        grad_x,
        grad_w_fc,
        grad_b_fc.to(call.b_fc.dtype),
        grad_w_proj,
        grad_b_proj.to(w_proj.dtype),
    )


# On a GPU the matrix products are cuBLAS's, unless cuBLASLt finishes them in its epilogues.


@cuda(Tensors("x", "w_fc", "b_fc", "w_proj", "b_proj", one_dtype=True))
def _gelu_mlp_cuda(call: Arguments) -> tuple[Tensor, Tensor]:
    found = cuda_mlp.gelu_mlp(call)
    if found is not None:
        return found
    inner, bias = _inner(call)
    activated = kernels(call.x).bias_gelu(inner, bias.contiguous())
    out = torch.addmm(call.b_proj, activated, call.w_proj)
    return out.view(*call.x.shape[:-1], out.shape[1]), _kept(inner, call.keep)


@cuda(Tensors("grad", "x", "inner", "w_fc", "b_fc", "w_proj", one_dtype=True))
def _gelu_mlp_backward_cuda(call: Arguments) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    found = cuda_mlp.gelu_mlp_backward(call)
    if found is not None:
        return found
    grad, x = rows(call.grad), call.x
    grad_inner = grad @ call.w_proj.t()
    activated = torch.empty_like(grad_inner)
    bias = _bias_of(call.b_fc, call.kept).contiguous()
    grad_b_fc = kernels(x).bias_gelu_backward(grad_inner, call.inner, bias, grad_inner, activated)
    grad_w_proj = activated.t() @ grad
    grad_w_fc = rows(x).t() @ grad_inner
    grad_x = (grad_inner @ call.w_fc.t()).view(x.shape)
    return grad_x, grad_w_fc, grad_b_fc, grad_w_proj, kernels(x).sum_rows(grad)


_BIAS_GELU = Tensors("x", "bias", one_dtype=True)
_BIAS_GELU_GRADIENT = Tensors("grad", "x", "bias", one_dtype=True)
_bias_gelu_backward = Op(
    "bias_gelu_backward",
    "(Tensor grad, Tensor x, Tensor bias) -> (Tensor, Tensor)",
    check=_check_bias_gelu_backward,
    native=by_device(
        cpu=native(_BIAS_GELU_GRADIENT)(_bias_gelu_backward_native),
        cuda=cuda(_BIAS_GELU_GRADIENT)(_bias_gelu_backward_native),
    ),
    triton=triton("mlp", "bias_gelu_backward", Tensors("grad", "x", "bias")),
    torch=_bias_gelu_backward_torch,
    reference=_bias_gelu_backward_reference,
)
_bias_gelu = Op(
    "bias_gelu",
    "(Tensor x, Tensor bias) -> Tensor",
    check=_check_bias_gelu,
    native=by_device(
        cpu=native(_BIAS_GELU)(_bias_gelu_native), cuda=cuda(_BIAS_GELU)(_bias_gelu_native)
    ),
    triton=triton("mlp", "bias_gelu", Tensors("x", "bias")),
    torch=_bias_gelu_torch,
    reference=_bias_gelu_reference,
)
_gelu_mlp_gradient = Op(
    "gelu_mlp_backward",
    "(Tensor grad, Tensor x, Tensor inner, Tensor w_fc, Tensor b_fc, Tensor w_proj, "
    'str kept="product") -> (Tensor, Tensor, Tensor, Tensor, Tensor)',
    check=_check_gelu_mlp_backward,
    native=by_device(cpu=_gelu_mlp_backward_native, cuda=_gelu_mlp_backward_cuda),
    triton=triton(
        "mlp",
        "gelu_mlp_backward",
        Tensors("grad", "x", "inner", "w_fc", "b_fc", "w_proj", one_dtype=True),
    ),
    reference=_gelu_mlp_backward_reference,
)
_gelu_mlp = Op(
    "gelu_mlp",
    '(Tensor x, Tensor w_fc, Tensor b_fc, Tensor w_proj, Tensor b_proj, str keep="product") '
    "-> (Tensor out, Tensor inner)",
    check=_check_gelu_mlp,
    native=by_device(cpu=_gelu_mlp_native, cuda=_gelu_mlp_cuda),
    triton=triton(
        "mlp", "gelu_mlp", Tensors("x", "w_fc", "b_fc", "w_proj", "b_proj", one_dtype=True)
    ),
    reference=_gelu_mlp_reference,
)


def _bias_gelu_setup(ctx: Any, call: Arguments, results: Tensor) -> None:
    ctx.save_for_backward(call.x, call.bias)


def _bias_gelu_differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
    return _bias_gelu_backward.gradient(grad, *ctx.saved_tensors)


def _gelu_mlp_setup(ctx: Any, call: Arguments, results: tuple[Tensor, Tensor]) -> None:
    _, inner = results
    ctx.kept = call.keep
    ctx.mark_non_differentiable(inner)
    ctx.save_for_backward(call.x, inner, call.w_fc, call.b_fc, call.w_proj)


def _gelu_mlp_differentiate(ctx: Any, grad: Tensor, grad_inner: Any) -> tuple[Tensor | None, ...]:
    x, inner, w_fc, b_fc, w_proj = ctx.saved_tensors
    if wants_graph():  # the saved results are constants
        inner = product(rows(x), w_fc.to(x.dtype))
        return _gelu_mlp_gradient.gradient(grad, x, inner, w_fc, b_fc, w_proj, "product")
    _, *weights_wanted = ctx.needs_input_grad[:5]
    if any(weights_wanted):
        return _gelu_mlp_gradient.gradient(grad, x, inner, w_fc, b_fc, w_proj, ctx.kept)
    # The weights are frozen: their gradients, half of the products, are not wanted.
    grad_inner = matmul(rows(grad), w_proj.t(), x.dtype)
    bias = _bias_of(b_fc, ctx.kept).to(x.dtype)
    grad_inner, _ = _bias_gelu_backward.gradient(grad_inner, inner, bias)
    return (matmul(grad_inner, w_fc.t(), x.dtype).view(x.shape),)


_bias_gelu.register_autograd(_bias_gelu_differentiate, _bias_gelu_setup)
_gelu_mlp.register_autograd(_gelu_mlp_differentiate, _gelu_mlp_setup)


@_bias_gelu.register_fake
def _(call: Arguments) -> Tensor:
    return call.x.new_empty(call.x.shape)


@_bias_gelu_backward.register_fake
def _(call: Arguments) -> tuple[Tensor, ...]:
    return tuple(x.new_empty(x.shape) for x in (call.x, call.bias))


@_gelu_mlp.register_fake
def _(call: Arguments) -> tuple[Tensor, Tensor]:
    x = call.x
    rows = 0 if call.keep == "nothing" else x.shape[:-1].numel()
    return (
        x.new_empty((*x.shape[:-1], call.w_proj.shape[1])),
        x.new_empty((rows, call.w_fc.shape[1])),
    )


@_gelu_mlp_gradient.register_fake
def _(call: Arguments) -> tuple[Tensor, ...]:
    grads = (x.new_empty(x.shape) for x in (call.x, call.w_fc, call.b_fc, call.w_proj))
    return (*grads, call.w_proj.new_empty((call.grad.shape[-1],)))
