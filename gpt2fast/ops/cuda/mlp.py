"""The feed-forward layer with cuBLASLt's epilogues; None where cuBLASLt cannot do it.

It then is the caller's to multiply in another way: what these functions keep and take is `inner` as
every implementation of the op has it (ops/mlp.py).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..native import rows
from . import cublaslt, kernels


def gelu_mlp(
    x: Tensor, w_fc: Tensor, b_fc: Tensor, w_proj: Tensor, b_proj: Tensor, keep: str = "product"
) -> tuple[Tensor, Tensor] | None:
    if keep == "product" or not (cublaslt.is_wanted(x) and cublaslt.is_compiled()):
        return None
    flat = rows(x)
    activated = flat.new_empty((len(flat), w_fc.shape[1]))
    inner = torch.empty_like(activated) if keep == "sum" else None
    library = kernels(x)
    if not library.cublaslt_bias_gelu(flat, w_fc, b_fc.contiguous(), activated, inner):
        return None
    out = flat.new_empty((len(flat), w_proj.shape[1]))
    if not library.cublaslt_bias(activated, w_proj, b_proj.contiguous(), out):
        out = torch.addmm(b_proj, activated, w_proj)
    if inner is None:
        inner = activated.new_empty((0, w_fc.shape[1]))
    return out.view(*x.shape[:-1], -1), inner


def gelu_mlp_backward(
    grad: Tensor,
    x: Tensor,
    inner: Tensor,
    w_fc: Tensor,
    b_fc: Tensor,
    w_proj: Tensor,
    kept: str = "product",
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor] | None:
    if kept != "sum" or not (cublaslt.is_wanted(grad) and cublaslt.is_compiled()):
        return None
    grad, inner = rows(grad), inner.contiguous()
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
