"""The feed-forward layer with cuBLASLt's epilogues; None where cuBLASLt cannot do it.

The caller then multiplies in another way. `inner` is saved as by every other implementation of the
op (ops/mlp.py).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..backend import Arguments
from ..native import rows
from . import cublaslt, kernels


def gelu_mlp(call: Arguments) -> tuple[Tensor, Tensor] | None:
    x, w_fc, w_proj, keep = call.x, call.w_fc, call.w_proj, call.keep
    if keep == "product" or not (cublaslt.is_wanted(x) and cublaslt.is_compiled()):
        return None
    flat = rows(x)
    activated = flat.new_empty((len(flat), w_fc.shape[1]))
    inner = torch.empty_like(activated) if keep == "sum" else None
    library = kernels(x)
    if not library.cublaslt_bias_gelu(flat, w_fc, call.b_fc.contiguous(), activated, inner):
        return None
    out = flat.new_empty((len(flat), w_proj.shape[1]))
    if not library.cublaslt_bias(activated, w_proj, call.b_proj.contiguous(), out):
        out = torch.addmm(call.b_proj, activated, w_proj)
    if inner is None:
        inner = activated.new_empty((0, w_fc.shape[1]))
    return out.view(*x.shape[:-1], -1), inner


def gelu_mlp_backward(
    call: Arguments,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor] | None:
    x, w_fc, b_fc, w_proj = call.x, call.w_fc, call.b_fc, call.w_proj
    if call.kept != "sum" or not (cublaslt.is_wanted(call.grad) and cublaslt.is_compiled()):
        return None
    grad, inner = rows(call.grad), call.inner.contiguous()
    library = kernels(x)
    grad_inner = torch.empty_like(inner)
    grad_b_fc = b_fc.new_empty(b_fc.shape)
    if not library.cublaslt_gelu_gradient(grad, w_proj.t(), inner, grad_inner, grad_b_fc):
        return None
    activated = library.bias_gelu(inner, torch.zeros_like(grad_b_fc))
    grad_w_proj = activated.new_empty(w_proj.shape)
    grad_b_proj = grad.new_empty((grad.shape[1],))
    if not library.cublaslt_column_sums(activated.t(), grad, grad_w_proj, grad_b_proj):
        torch.mm(activated.t(), grad, out=grad_w_proj)
        grad_b_proj = library.sum_rows(grad)
    grad_w_fc = rows(x).t() @ grad_inner
    grad_x = (grad_inner @ w_fc.t()).view(x.shape)
    return grad_x, grad_w_fc, grad_b_fc, grad_w_proj, grad_b_proj
