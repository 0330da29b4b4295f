"""The backward pass of attention over whole sequences in Triton (Dao, 2023).

Floor: 2.5 times the forward pass's FLOPs, and two more products since the scores are computed in
the dK/dV kernel and in the dQ kernel: no atomics, so that a gradient is the same in every run. For
the same reason one program adds up what all query heads of a group give a block of their keys.

Blocks of keys that all queries see are computed without masks.

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
from .tuning import settings


@triton.jit
def delta_kernel(
    grad, out, delta,
    grad_stride_b, grad_stride_t, grad_stride_h, out_stride_b, out_stride_t, out_stride_h,
    time, heads,
    HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """delta[b, h, t] = grad[b, t, h] . out[b, t, h]: subtracted from every weight's gradient
    in the derivative of the softmax."""
    begin, b, h = block_of_head(time, heads, BLOCK_M, False)
    rows = begin + tl.arange(0, BLOCK_M)
    grad = head_of(grad, grad_stride_b, grad_stride_h, b, h)
    out = head_of(out, out_stride_b, out_stride_h, b, h)
    a = load_rows(grad, grad_stride_t, begin, time, HEAD_DIM, BLOCK_M, BLOCK_D).to(tl.float32)
    b_ = load_rows(out, out_stride_t, begin, time, HEAD_DIM, BLOCK_M, BLOCK_D).to(tl.float32)
    at = delta + (b * heads + h).to(tl.int64) * time + rows
    tl.store(at, tl.sum(a * b_, 1), mask=rows < time)


@triton.jit
def _add_queries(
    grad_k, grad_v, k, v, q, q_stride, grad, grad_stride, lse, delta, visible, seed, begin, first,
    time, head, scale, threshold, kept_scale,
    HEAD_DIM, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    DIAGONAL: tl.constexpr,
):  # fmt: skip
    """Add the part of BLOCK_M queries to the gradients of BLOCK_N keys and values; weights are
    transposed, (keys, queries)."""
    keys = begin + tl.arange(0, BLOCK_N)
    rows = first + tl.arange(0, BLOCK_M)
    queries = load_rows(q, q_stride, first, time, HEAD_DIM, BLOCK_M, BLOCK_D)
    # Infinity makes the weights of rows past the end vanish.
    normalizer = tl.load(lse + rows, mask=rows < time, other=float("inf")) * LOG2_E
    weights = tl.exp2(dot(k, tl.trans(queries)) * scale - normalizer[None, :])
    if DIAGONAL:
        weights = tl.where(rows[None, :] >= keys[:, None], weights, 0.0)
    if visible is not None:
        weights = tl.where(visible[:, None], weights, 0.0)
    block = load_rows(grad, grad_stride, first, time, HEAD_DIM, BLOCK_M, BLOCK_D)
    inner = tl.load(delta + rows, mask=rows < time, other=0.0)
    grad_weights = dot(v, tl.trans(block))
    dropped = weights
    if seed is not None:
        kept = keep_mask(tl.load(seed), rows, begin, head, threshold, BLOCK_M, BLOCK_N)
        kept = tl.trans(kept)
        dropped = tl.where(kept, weights * kept_scale, 0.0)
        grad_weights = tl.where(kept, grad_weights * kept_scale, 0.0)
    grad_v = dot(cast(dropped, block.dtype), block, grad_v)
    grad_scores = weights * (grad_weights - inner[None, :])
    grad_k = dot(cast(grad_scores, queries.dtype), queries, grad_k)
    return grad_k, grad_v


@triton.jit
def keys_kernel(
    grad, q, k, v, lse, delta, grad_k, grad_v, mask, seed,
    grad_stride_b, grad_stride_t, grad_stride_h, q_stride_b, q_stride_t, q_stride_h,
    k_stride_b, k_stride_t, k_stride_h, v_stride_b, v_stride_t, v_stride_h,
    time, heads, group, scale, threshold, kept_scale,
    HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    CAUSAL: tl.constexpr,
):  # fmt: skip
    """Gradients of BLOCK_N keys and values, from all queries that see them, head after head of the
    group that shares them."""
    key_heads = heads // group
    begin, b, key_head = block_of_head(time, key_heads, BLOCK_N, False)
    k = head_of(k, k_stride_b, k_stride_h, b, key_head)
    v = head_of(v, v_stride_b, v_stride_h, b, key_head)
    keys = load_rows(k, k_stride_t, begin, time, HEAD_DIM, BLOCK_N, BLOCK_D)
    values = load_rows(v, v_stride_t, begin, time, HEAD_DIM, BLOCK_N, BLOCK_D)
    visible = None
    if mask is not None:
        places = begin + tl.arange(0, BLOCK_N)
        visible = tl.load(mask + b.to(tl.int64) * time + places, mask=places < time, other=0) != 0
    sum_k = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    sum_v = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    first_whole = 0
    if CAUSAL:
        first_whole = tl.minimum(tl.cdiv(begin + BLOCK_N, BLOCK_M) * BLOCK_M, time)
    # Nothing moves out of the loop over heads: registers are what this kernel runs out of.
    for member in tl.range(group, disable_licm=True):
        h = key_head * group + member
        head = b * heads + h
        queries = head_of(q, q_stride_b, q_stride_h, b, h)
        given = head_of(grad, grad_stride_b, grad_stride_h, b, h)
        normalizers = lse + head.to(tl.int64) * time
        inner = delta + head.to(tl.int64) * time
        if CAUSAL:
            for first in range(begin // BLOCK_M * BLOCK_M, first_whole, BLOCK_M):
                sum_k, sum_v = _add_queries(
                    sum_k, sum_v, keys, values, queries, q_stride_t, given, grad_stride_t,
                    normalizers, inner, visible, seed, begin, first, time, head, scale * LOG2_E,
                    threshold, kept_scale, HEAD_DIM, BLOCK_M, BLOCK_N, BLOCK_D, True,
                )  # fmt: skip
        for first in range(first_whole, time, BLOCK_M):
            sum_k, sum_v = _add_queries(
                sum_k, sum_v, keys, values, queries, q_stride_t, given, grad_stride_t,
                normalizers, inner, visible, seed, begin, first, time, head, scale * LOG2_E,
                threshold, kept_scale, HEAD_DIM, BLOCK_M, BLOCK_N, BLOCK_D, False,
            )  # fmt: skip
    stride = key_heads * HEAD_DIM
    offset = b.to(tl.int64) * time * stride + key_head * HEAD_DIM
    store_rows(grad_k + offset, stride, begin, time, sum_k * scale, HEAD_DIM, BLOCK_N, BLOCK_D)
    store_rows(grad_v + offset, stride, begin, time, sum_v, HEAD_DIM, BLOCK_N, BLOCK_D)


@triton.jit
def _add_grad_keys(
    sums, q, grad, normalizer, inner, k, k_stride, v, v_stride, mask, seed, rows, first, time,
    head, scale, threshold, kept_scale,
    HEAD_DIM, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    CAUSAL: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Add the part of BLOCK_N keys to the gradients of BLOCK_M queries."""
    keys = first + tl.arange(0, BLOCK_N)
    block = load_rows(k, k_stride, first, time, HEAD_DIM, BLOCK_N, BLOCK_D)
    weights = tl.exp2(dot(q, tl.trans(block)) * scale - normalizer[:, None])
    if not WHOLE:
        seen = visible_places(rows[:, None], keys[None, :], time, CAUSAL)
        weights = tl.where(seen, weights, 0.0)
    if mask is not None:
        visible = tl.load(mask + keys, mask=keys < time, other=0) != 0
        weights = tl.where(visible[None, :], weights, 0.0)
    values = load_rows(v, v_stride, first, time, HEAD_DIM, BLOCK_N, BLOCK_D)
    grad_weights = dot(grad, tl.trans(values))
    if seed is not None:
        kept = keep_mask(tl.load(seed), rows, first, head, threshold, BLOCK_M, BLOCK_N)
        grad_weights = tl.where(kept, grad_weights * kept_scale, 0.0)
    grad_scores = weights * (grad_weights - inner[:, None])
    return dot(cast(grad_scores, block.dtype), block, sums)


@triton.jit
def queries_kernel(
    grad, q, k, v, lse, delta, grad_q, mask, seed,
    grad_stride_b, grad_stride_t, grad_stride_h, q_stride_b, q_stride_t, q_stride_h,
    k_stride_b, k_stride_t, k_stride_h, v_stride_b, v_stride_t, v_stride_h,
    time, heads, group, scale, threshold, kept_scale,
    HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    CAUSAL: tl.constexpr,
):  # fmt: skip
    """Gradients of BLOCK_M queries, from all keys that they see."""
    begin, b, h = block_of_head(time, heads, BLOCK_M, CAUSAL)
    head = b * heads + h
    rows = begin + tl.arange(0, BLOCK_M)
    q = head_of(q, q_stride_b, q_stride_h, b, h)
    grad = head_of(grad, grad_stride_b, grad_stride_h, b, h)
    queries = load_rows(q, q_stride_t, begin, time, HEAD_DIM, BLOCK_M, BLOCK_D)
    given = load_rows(grad, grad_stride_t, begin, time, HEAD_DIM, BLOCK_M, BLOCK_D)
    at = head.to(tl.int64) * time + rows
    normalizer = tl.load(lse + at, mask=rows < time, other=float("inf")) * LOG2_E
    inner = tl.load(delta + at, mask=rows < time, other=0.0)
    k = head_of(k, k_stride_b, k_stride_h, b, h // group)
    v = head_of(v, v_stride_b, v_stride_h, b, h // group)
    if mask is not None:
        mask += b.to(tl.int64) * time
    sums = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    whole = whole_keys(begin, time, BLOCK_N, CAUSAL)
    for first in range(0, whole, BLOCK_N):
        sums = _add_grad_keys(
            sums, queries, given, normalizer, inner, k, k_stride_t, v, v_stride_t, mask, seed, rows,
            first, time, head, scale * LOG2_E, threshold, kept_scale,
            HEAD_DIM, BLOCK_M, BLOCK_N, BLOCK_D, CAUSAL, True,
        )  # fmt: skip
    for first in range(whole, last_key(begin, time, BLOCK_M, CAUSAL), BLOCK_N):
        sums = _add_grad_keys(
            sums, queries, given, normalizer, inner, k, k_stride_t, v, v_stride_t, mask, seed, rows,
            first, time, head, scale * LOG2_E, threshold, kept_scale,
            HEAD_DIM, BLOCK_M, BLOCK_N, BLOCK_D, CAUSAL, False,
        )  # fmt: skip
    stride = heads * HEAD_DIM
    base = grad_q + b.to(tl.int64) * time * stride + h * HEAD_DIM
    store_rows(base, stride, begin, time, sums * scale, HEAD_DIM, BLOCK_M, BLOCK_D)


def backward(call: Arguments) -> tuple[Tensor, Tensor, Tensor]:
    grad, q, k, v, out = readable(call.grad, call.q, call.k, call.v, call.out)
    lse, mask, scale = call.lse.contiguous(), mask_bytes(call.mask), call.scale
    batch, time, heads, width = q.shape
    padded = padded_width(width)
    delta = torch.empty_like(lse)
    key_heads = k.shape[2]
    group = heads // key_heads
    grad_q, grad_k, grad_v = (x.new_empty(x.shape) for x in (q, k, v))
    seed, threshold, kept_scale = dropout_of(call)
    launch = settings("attention_delta", q.device)
    delta_kernel[(triton.cdiv(time, launch["BLOCK_M"]) * batch * heads,)](
        grad, out, delta, *strides_of(grad, out), time, heads,
        HEAD_DIM=width, BLOCK_D=padded, **launch,
    )  # fmt: skip
    launch = head_settings("attention_keys", q, seed, shared=int(group > 1))
    keys_kernel[(triton.cdiv(time, launch["BLOCK_N"]) * batch * key_heads,)](
        grad, q, k, v, lse, delta, grad_k, grad_v, mask, seed, *strides_of(grad, q, k, v),
        time, heads, group, scale, threshold, kept_scale,
        HEAD_DIM=width, BLOCK_D=padded, CAUSAL=call.causal, **launch,
    )  # fmt: skip
    launch = head_settings("attention_queries", q, seed)
    queries_kernel[(triton.cdiv(time, launch["BLOCK_M"]) * batch * heads,)](
        grad, q, k, v, lse, delta, grad_q, mask, seed, *strides_of(grad, q, k, v),
        time, heads, group, scale, threshold, kept_scale,
        HEAD_DIM=width, BLOCK_D=padded, CAUSAL=call.causal, **launch,
    )  # fmt: skip
    return grad_q, grad_k, grad_v
