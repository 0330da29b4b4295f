"""Matrix products of the CPU ops: our kernels where they are the faster ones, else torch's.

Ours read float32 weights where bfloat16 is multiplied, rounding them on the way, and keep sums in
float32. Which are the faster ones was measured (docs/performance.md). Where a processor has no
instructions for 16-bit products, torch multiplies such matrices an element at a time, up to a
hundred times slower than in float32: there they are widened, which changes no product.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from .backend import requested_backend
from .cuda import takes
from .native import DTYPES, unavailable

_LEAST_SIDE = 512
"""From this size on, in all three dimensions, our kernel is faster than torch."""
_LEAST_SIDE_FLOAT32 = 256
"""The same for float32 where the rows of the first matrix are contiguous."""
_LONG_ROW = 16384
"""Columns of results from which torch's kernel is slower on AVX2."""


def _has_kernel(name: str) -> bool:
    supported = getattr(torch.ops.mkldnn, name, None)
    return supported is None or bool(supported())


_WIDENED = {
    dtype
    for dtype, name in (
        (torch.bfloat16, "_is_mkldnn_bf16_supported"),
        (torch.float16, "_is_mkldnn_fp16_supported"),
    )
    if not _has_kernel(name)
}
"""Dtypes that torch multiplies an element at a time on this processor."""


@cache
def _multiplied_here(narrow: bool, awkward: bool) -> bool:
    """True if our kernels were measured to beat torch's on this kind of processor."""
    return unavailable() is None and torch.ops.gpt2fast_native.multiplies(narrow, awkward)


def _is_faster(a: Tensor, b: Tensor, out: Tensor, dtype: torch.dtype) -> bool:
    """True if our kernel is the faster one for a (rows, inputs) and b (inputs, columns)."""
    in_rows = dtype == torch.float32 and a.stride(1) == 1
    least = _LEAST_SIDE_FLOAT32 if in_rows else _LEAST_SIDE
    # GPT-2's vocabulary is odd, so that no row of logits is aligned as the one before it.
    awkward = out.stride(0) % 8 != 0 or b.shape[1] >= _LONG_ROW
    return min(*a.shape, b.shape[1]) >= least and _multiplied_here(dtype == torch.bfloat16, awkward)


def _ours(a: Tensor, b: Tensor, out: Tensor, dtype: torch.dtype, add: bool) -> bool:
    read = DTYPES if dtype == torch.bfloat16 else (torch.float32,)
    written = (torch.float32,) if add or dtype == torch.float32 else DTYPES
    return (
        dtype in DTYPES
        and a.dtype in read
        and b.dtype in read
        and out.dtype in written
        and a.device.type == "cpu"
        and unavailable() is None
        and _is_faster(a, b, out, dtype)
    )


def multiplied_by_torch(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype in which torch is to multiply another: float32 where it has no kernel for that."""
    return torch.float32 if dtype in _WIDENED and device.type == "cpu" else dtype


def product(a: Tensor, b: Tensor, bias: Tensor | None = None, out: Tensor | None = None) -> Tensor:
    """`a @ b + bias` by torch, all of one dtype; with a bias or `out`, a has two dimensions."""
    wide = multiplied_by_torch(a.dtype, a.device)
    if wide != a.dtype:
        wider = product(a.to(wide), b.to(wide), None if bias is None else bias.to(wide))
        return wider.to(a.dtype) if out is None else out.copy_(wider)
    if bias is not None:
        return torch.addmm(bias, a, b, out=out)
    return torch.matmul(a, b, out=out)


def reads_wider_weights(x: Tensor) -> bool:
    """True if ops on activations x round wider weights themselves, as they read them.

    On a GPU they do not: cuBLAS reads the copy that autocast has rounded and caches.
    """
    return x.device.type == "cpu" and requested_backend() != "triton" and not takes(x)


def _readable(x: Tensor) -> Tensor:
    return x if 1 in x.stride() else x.contiguous()


def matmul(
    a: Tensor,
    b: Tensor,
    dtype: torch.dtype,
    *,
    out_dtype: torch.dtype | None = None,
    bias: Tensor | None = None,
    out: Tensor | None = None,
    add: bool = False,
    column_sums: Tensor | None = None,
) -> Tensor:
    """`a @ b + bias`, multiplied in `dtype` whatever the operands' dtypes are.

    Args:
        a: (M, K).
        b: (K, N).
        dtype: dtype of the multiplication; sums are at least float32.
        out_dtype: dtype of the result; None means `dtype`.
        bias: (N,).
        out: (M, N), rows contiguous; receives the result.
        add: add the result to the contents of `out`.
        column_sums: (N,) float32; receives the sum of b's rows.

    Returns:
        (M, N).
    """
    if out is None:
        out = a.new_empty((a.shape[0], b.shape[1]), dtype=out_dtype or dtype)
    if _ours(a, b, out, dtype, add):
        torch.ops.gpt2fast_native.matmul(
            _readable(a),
            _readable(b),
            None if bias is None else bias.float().contiguous(),
            out,
            add,
            dtype == torch.bfloat16,
            column_sums,
        )
        return out
    if column_sums is not None:
        torch.sum(b, 0, dtype=column_sums.dtype, out=column_sums)
    a, b = a.to(dtype), b.to(dtype)
    wide = multiplied_by_torch(a.dtype, a.device)
    a, b = a.to(wide), b.to(wide)
    if add:
        return out.addmm_(a, b) if out.dtype == wide else out.add_(a @ b)
    if bias is not None:
        return out.copy_(torch.addmm(bias.to(dtype).to(wide), a, b))
    return torch.mm(a, b, out=out) if out.dtype == wide else out.copy_(a @ b)


def weight_gradient(
    x: Tensor, grad: Tensor, weight: Tensor, column_sums: Tensor | None = None
) -> Tensor:
    """`x.T @ grad` (in, out), in the dtype and the layout of a weight that is (in, out).

    Args:
        x: (M, in).
        grad: (M, out), in the dtype of the multiplication.
        weight: the weight that the gradient belongs to.
        column_sums: (out,) float32; receives the sum of grad's rows: the bias's gradient.
    """
    if weight.stride(0) == 1 and weight.stride(1) != 1:  # a transposed view of (out, in)
        if column_sums is not None:
            torch.sum(grad, 0, dtype=column_sums.dtype, out=column_sums)
        return matmul(grad.t(), x, grad.dtype, out_dtype=weight.dtype).t()
    return matmul(x.t(), grad, grad.dtype, out_dtype=weight.dtype, column_sums=column_sums)
