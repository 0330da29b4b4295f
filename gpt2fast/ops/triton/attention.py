"""Attention over whole sequences in Triton (Dao, 2023).

Floor: 4 B H T^2 D FLOPs on tensor cores, half of them where it is causal; 2 B T (H + H_kv) D
elements are read and written.

Blocks of keys that all queries see (wholly below the diagonal, or before the end) are computed
without masks. Query heads of a group read their key head in place, one after another in the grid.

Not yet run on a GPU.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..backend import Arguments
from .attention_heads import (
    LOG2_E,
    block_of_head,
    head_of,
    head_settings,
    last_key,
    load_rows,
    mask_bytes,
    padded_width,
    readable,
    store_rows,
    strides_of,
    visible_places,
    whole_keys,
)
from .dropout import dropout_of, keep_mask
from .language import cast, dot

LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _add_keys(
    sums, highest, total, q, k, k_stride, v, v_stride, mask, seed, rows, first, time, head,
    scale, threshold, kept_scale,
    HEAD_DIM, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    CAUSAL: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """One step of the online softmax (Milakov & Gimelshein, 2018) over BLOCK_N keys."""
    keys = first + tl.arange(0, BLOCK_N)
    block = load_rows(k, k_stride, first, time, HEAD_DIM, BLOCK_N, BLOCK_D)
    scores = dot(q, tl.trans(block)) * scale
    if not WHOLE:
        seen = visible_places(rows[:, None], keys[None, :], time, CAUSAL)
        scores = tl.where(seen, scores, -float("inf"))
    if mask is not None:
        visible = tl.load(mask + keys, mask=keys < time, other=0) != 0
        scores = tl.where(visible[None, :], scores, -float("inf"))
    new = tl.maximum(highest, tl.max(scores, 1))
    shift = new
    if mask is not None:  # for a row that has seen nothing yet, -inf - -inf would be NaN
        shift = tl.where(new == -float("inf"), 0.0, new)
    weights = tl.exp2(scores - shift[:, None])
    decay = tl.exp2(highest - shift)
    total = total * decay + tl.sum(weights, 1)
    if seed is not None:
        kept = keep_mask(tl.load(seed), rows, first, head, threshold, BLOCK_M, BLOCK_N)
        weights = tl.where(kept, weights * kept_scale, 0.0)
    block = load_rows(v, v_stride, first, time, HEAD_DIM, BLOCK_N, BLOCK_D)
    sums = dot(cast(weights, v.dtype.element_ty), block, sums * decay[:, None])
    return sums, new, total


@triton.jit
def forward_kernel(
    q, k, v, out, lse, mask, seed,
    q_stride_b, q_stride_t, q_stride_h, k_stride_b, k_stride_t, k_stride_h,
    v_stride_b, v_stride_t, v_stride_h,
    time, heads, group, scale, threshold, kept_scale,
    HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    CAUSAL: tl.constexpr,
):  # fmt: skip
    """Outputs and log-normalizers of BLOCK_M queries, from all keys that they see."""
    begin, b, h = block_of_head(time, heads, BLOCK_M, CAUSAL)
    rows = begin + tl.arange(0, BLOCK_M)
    q = head_of(q, q_stride_b, q_stride_h, b, h)
    block = load_rows(q, q_stride_t, begin, time, HEAD_DIM, BLOCK_M, BLOCK_D)
    k = head_of(k, k_stride_b, k_stride_h, b, h // group)
    v = head_of(v, v_stride_b, v_stride_h, b, h // group)
    if mask is not None:
        mask += b.to(tl.int64) * time
    scale *= LOG2_E
    head = b * heads + h
    sums = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    highest = tl.full((BLOCK_M,), -float("inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    whole = whole_keys(begin, time, BLOCK_N, CAUSAL)
    for first in range(0, whole, BLOCK_N):
        sums, highest, total = _add_keys(
            sums, highest, total, block, k, k_stride_t, v, v_stride_t, mask, seed, rows, first,
            time, head, scale, threshold, kept_scale, HEAD_DIM, BLOCK_M, BLOCK_N, BLOCK_D, CAUSAL,
            True,
        )  # fmt: skip
    for first in range(whole, last_key(begin, time, BLOCK_M, CAUSAL), BLOCK_N):
        sums, highest, total = _add_keys(
            sums, highest, total, block, k, k_stride_t, v, v_stride_t, mask, seed, rows, first,
            time, head, scale, threshold, kept_scale, HEAD_DIM, BLOCK_M, BLOCK_N, BLOCK_D, CAUSAL,
            False,
        )  # fmt: skip
    normalizer = (highest + tl.log2(total)) * LN_2
    normalizer = tl.where(total == 0.0, float("inf"), normalizer)
    sums = tl.where(total[:, None] == 0.0, 0.0, sums / total[:, None])
    stride = heads * HEAD_DIM
    base = out + b.to(tl.int64) * time * stride + h * HEAD_DIM
    store_rows(base, stride, begin, time, sums, HEAD_DIM, BLOCK_M, BLOCK_D)
    tl.store(lse + head.to(tl.int64) * time + rows, normalizer, mask=rows < time)


def forward(call: Arguments) -> tuple[Tensor, Tensor]:
    q, k, v = readable(call.q, call.k, call.v)
    batch, time, heads, width = q.shape
    out = q.new_empty(q.shape)
    lse = q.new_empty((batch, heads, time), dtype=torch.float32)
    seed, threshold, kept_scale = dropout_of(call)
    launch = head_settings("attention_forward", q, seed)
    forward_kernel[(triton.cdiv(time, launch["BLOCK_M"]) * batch * heads,)](
        q, k, v, out, lse, mask_bytes(call.mask), seed, *strides_of(q, k, v),
        time, heads, heads // k.shape[2], call.scale, threshold, kept_scale,
        HEAD_DIM=width, BLOCK_D=padded_width(width), CAUSAL=call.causal, **launch,
    )  # fmt: skip
    return out, lse
