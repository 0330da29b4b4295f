"""Causal attention in Triton, over whole sequences and against a cache (Dao, 2023).

Floor, forward: 2 T^2 D multiply-adds a head (half of 4 T^2 D: causal), i.e. 2 B H T^2 D FLOPs, on
tensor cores; 4 B T H D elements are read and written. Backward: 2.5 times the FLOPs, and two more
products since the scores are computed in the dK/dV kernel and in the dQ kernel: no atomics, so that
a gradient is the same in every run. Against a cache, with few queries: 2 length D elements are read
a head and row; the split over programs keeps all multiprocessors reading.

Scores live in units of log2: exp2 is the instruction. A head's width is padded to a power of two.
Blocks wholly below the diagonal are computed without causal masks.

Dropout drops the weight of query t and key s where 16 bits of Philox 4x32-10 (Salmon et al., 2011)
are below a threshold: counter (s / 32 * 4 + s % 8 / 2, t, b * H + h, 0), word s / 8 % 4, low half
for even s. It is the mask of the CUDA kernels.

Not yet run on a GPU.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..backend import Arguments
from .language import cast, dot
from .tuning import multiprocessors, settings

MOST_SHARES = 64
"""Programs that may share the entries of one row and head."""
LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _kept(seed, rows, first, head, threshold, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """(BLOCK_M, BLOCK_N): true where dropout keeps the weight of a query in `rows` and a key."""
    counters = first // 8 + tl.arange(0, BLOCK_N // 8)
    words = tl.philox(seed, counters[None, :], rows[:, None], head, 0)
    a, b, c, d = (
        _halves(words[0], threshold, BLOCK_M, BLOCK_N),
        _halves(words[1], threshold, BLOCK_M, BLOCK_N),
        _halves(words[2], threshold, BLOCK_M, BLOCK_N),
        _halves(words[3], threshold, BLOCK_M, BLOCK_N),
    )
    # (query, key / 32, key % 8 / 2, key % 2, key / 16 % 2, key / 8 % 2)
    joined = tl.join(tl.join(a, c), tl.join(b, d))
    return tl.reshape(tl.permute(joined, (0, 1, 4, 5, 2, 3)), (BLOCK_M, BLOCK_N)) != 0


@triton.jit
def _halves(words, threshold, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    words = tl.reshape(words, (BLOCK_M, BLOCK_N // 32, 4))
    low = ((words & 0xFFFF) >= threshold).to(tl.int8)
    return tl.join(low, ((words >> 16) >= threshold).to(tl.int8))


@triton.jit
def _load(base, stride, first, time, HEAD_DIM, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows first .. first + BLOCK of one head, zeros past the end."""
    rows = tl.arange(0, BLOCK)
    columns = tl.arange(0, BLOCK_D)
    pointers = base + tl.cast(first, tl.int64) * stride
    pointers += rows[:, None] * stride + columns[None, :]
    if BLOCK_D == HEAD_DIM:
        return tl.load(pointers, mask=(first + rows)[:, None] < time, other=0.0)
    inside = ((first + rows)[:, None] < time) & (columns[None, :] < HEAD_DIM)
    return tl.load(pointers, mask=inside, other=0.0)


@triton.jit
def _store(base, stride, first, time, value, HEAD_DIM, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr):
    rows = tl.arange(0, BLOCK)
    columns = tl.arange(0, BLOCK_D)
    pointers = base + tl.cast(first, tl.int64) * stride
    pointers += rows[:, None] * stride + columns[None, :]
    inside = ((first + rows)[:, None] < time) & (columns[None, :] < HEAD_DIM)
    tl.store(pointers, cast(value, base.dtype.element_ty), mask=inside)


@triton.jit
def _head(base, stride_b, stride_h, b, h):
    return base + b.to(tl.int64) * stride_b + h.to(tl.int64) * stride_h


@triton.jit
def _block_of_head(time, heads, BLOCK: tl.constexpr, LAST_FIRST: tl.constexpr):
    """This program's first row, its row of the batch, and its head."""
    blocks = tl.cdiv(time, BLOCK)
    block = tl.program_id(0) % blocks
    if LAST_FIRST:  # later blocks have more work, so they start first
        block = blocks - 1 - block
    head = tl.program_id(0) // blocks
    return block * BLOCK, head // heads, head % heads


@triton.jit
def _add_keys(
    sums, highest, total, q, k, k_stride, v, v_stride, mask, seed, rows, first, time, head,
    scale, threshold, kept_scale,
    HEAD_DIM, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    DIAGONAL: tl.constexpr,
):  # fmt: skip
    """One step of the online softmax (Milakov & Gimelshein, 2018) over BLOCK_N keys."""
    keys = first + tl.arange(0, BLOCK_N)
    block = _load(k, k_stride, first, time, HEAD_DIM, BLOCK_N, BLOCK_D)
    scores = dot(q, tl.trans(block)) * scale
    if DIAGONAL:
        scores = tl.where(rows[:, None] >= keys[None, :], scores, -float("inf"))
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
        kept = _kept(tl.load(seed), rows, first, head, threshold, BLOCK_M, BLOCK_N)
        weights = tl.where(kept, weights * kept_scale, 0.0)
    block = _load(v, v_stride, first, time, HEAD_DIM, BLOCK_N, BLOCK_D)
    sums = dot(cast(weights, v.dtype.element_ty), block, sums * decay[:, None])
    return sums, new, total


@triton.jit
def forward_kernel(
    q, k, v, out, lse, mask, seed,
    q_stride_b, q_stride_t, q_stride_h, k_stride_b, k_stride_t, k_stride_h,
    v_stride_b, v_stride_t, v_stride_h,
    time, heads, scale, threshold, kept_scale,
    HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    begin, b, h = _block_of_head(time, heads, BLOCK_M, True)
    rows = begin + tl.arange(0, BLOCK_M)
    block = _load(
        _head(q, q_stride_b, q_stride_h, b, h), q_stride_t, begin, time, HEAD_DIM, BLOCK_M, BLOCK_D
    )
    k = _head(k, k_stride_b, k_stride_h, b, h)
    v = _head(v, v_stride_b, v_stride_h, b, h)
    if mask is not None:
        mask += b.to(tl.int64) * time
    scale *= LOG2_E
    head = b * heads + h
    sums = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    highest = tl.full((BLOCK_M,), -float("inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    whole = begin // BLOCK_N * BLOCK_N
    for first in range(0, whole, BLOCK_N):
        sums, highest, total = _add_keys(
            sums, highest, total, block, k, k_stride_t, v, v_stride_t, mask, seed, rows, first,
            time, head, scale, threshold, kept_scale, HEAD_DIM, BLOCK_M, BLOCK_N, BLOCK_D, False,
        )  # fmt: skip
    for first in range(whole, tl.minimum(begin + BLOCK_M, time), BLOCK_N):
        sums, highest, total = _add_keys(
            sums, highest, total, block, k, k_stride_t, v, v_stride_t, mask, seed, rows, first,
            time, head, scale, threshold, kept_scale, HEAD_DIM, BLOCK_M, BLOCK_N, BLOCK_D, True,
        )  # fmt: skip
    normalizer = (highest + tl.log2(total)) * LN_2
    normalizer = tl.where(total == 0.0, float("inf"), normalizer)
    sums = tl.where(total[:, None] == 0.0, 0.0, sums / total[:, None])
    stride = heads * HEAD_DIM
    base = out + b.to(tl.int64) * time * stride + h * HEAD_DIM
    _store(base, stride, begin, time, sums, HEAD_DIM, BLOCK_M, BLOCK_D)
    tl.store(lse + head.to(tl.int64) * time + rows, normalizer, mask=rows < time)


@triton.jit
def delta_kernel(
    grad, out, delta,
    grad_stride_b, grad_stride_t, grad_stride_h, out_stride_b, out_stride_t, out_stride_h,
    time, heads,
    HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """delta[b, h, t] = grad[b, t, h] . out[b, t, h]: subtracted from every weight's gradient
    in the derivative of the softmax."""
    begin, b, h = _block_of_head(time, heads, BLOCK_M, False)
    rows = begin + tl.arange(0, BLOCK_M)
    grad = _head(grad, grad_stride_b, grad_stride_h, b, h)
    out = _head(out, out_stride_b, out_stride_h, b, h)
    a = _load(grad, grad_stride_t, begin, time, HEAD_DIM, BLOCK_M, BLOCK_D).to(tl.float32)
    b_ = _load(out, out_stride_t, begin, time, HEAD_DIM, BLOCK_M, BLOCK_D).to(tl.float32)
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
    queries = _load(q, q_stride, first, time, HEAD_DIM, BLOCK_M, BLOCK_D)
    # Infinity makes the weights of rows past the end vanish.
    normalizer = tl.load(lse + rows, mask=rows < time, other=float("inf")) * LOG2_E
    weights = tl.exp2(dot(k, tl.trans(queries)) * scale - normalizer[None, :])
    if DIAGONAL:
        weights = tl.where(rows[None, :] >= keys[:, None], weights, 0.0)
    if visible is not None:
        weights = tl.where(visible[:, None], weights, 0.0)
    block = _load(grad, grad_stride, first, time, HEAD_DIM, BLOCK_M, BLOCK_D)
    inner = tl.load(delta + rows, mask=rows < time, other=0.0)
    grad_weights = dot(v, tl.trans(block))
    dropped = weights
    if seed is not None:
        kept = _kept(tl.load(seed), rows, begin, head, threshold, BLOCK_M, BLOCK_N)
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
    time, heads, scale, threshold, kept_scale,
    HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Gradients of BLOCK_N keys and values, from all queries that see them."""
    begin, b, h = _block_of_head(time, heads, BLOCK_N, False)
    head = b * heads + h
    k = _head(k, k_stride_b, k_stride_h, b, h)
    v = _head(v, v_stride_b, v_stride_h, b, h)
    keys = _load(k, k_stride_t, begin, time, HEAD_DIM, BLOCK_N, BLOCK_D)
    values = _load(v, v_stride_t, begin, time, HEAD_DIM, BLOCK_N, BLOCK_D)
    visible = None
    if mask is not None:
        places = begin + tl.arange(0, BLOCK_N)
        visible = tl.load(mask + b.to(tl.int64) * time + places, mask=places < time, other=0) != 0
    q = _head(q, q_stride_b, q_stride_h, b, h)
    grad = _head(grad, grad_stride_b, grad_stride_h, b, h)
    lse += head.to(tl.int64) * time
    delta += head.to(tl.int64) * time
    sum_k = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    sum_v = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    first_whole = tl.minimum(tl.cdiv(begin + BLOCK_N, BLOCK_M) * BLOCK_M, time)
    for first in range(begin // BLOCK_M * BLOCK_M, first_whole, BLOCK_M):
        sum_k, sum_v = _add_queries(
            sum_k, sum_v, keys, values, q, q_stride_t, grad, grad_stride_t, lse, delta, visible,
            seed, begin, first, time, head, scale * LOG2_E, threshold, kept_scale,
            HEAD_DIM, BLOCK_M, BLOCK_N, BLOCK_D, True,
        )  # fmt: skip
    for first in range(first_whole, time, BLOCK_M):
        sum_k, sum_v = _add_queries(
            sum_k, sum_v, keys, values, q, q_stride_t, grad, grad_stride_t, lse, delta, visible,
            seed, begin, first, time, head, scale * LOG2_E, threshold, kept_scale,
            HEAD_DIM, BLOCK_M, BLOCK_N, BLOCK_D, False,
        )  # fmt: skip
    stride = heads * HEAD_DIM
    offset = b.to(tl.int64) * time * stride + h * HEAD_DIM
    _store(grad_k + offset, stride, begin, time, sum_k * scale, HEAD_DIM, BLOCK_N, BLOCK_D)
    _store(grad_v + offset, stride, begin, time, sum_v, HEAD_DIM, BLOCK_N, BLOCK_D)


@triton.jit
def _add_grad_keys(
    sums, q, grad, normalizer, inner, k, k_stride, v, v_stride, mask, seed, rows, first, time,
    head, scale, threshold, kept_scale,
    HEAD_DIM, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    DIAGONAL: tl.constexpr,
):  # fmt: skip
    """Add the part of BLOCK_N keys to the gradients of BLOCK_M queries."""
    keys = first + tl.arange(0, BLOCK_N)
    block = _load(k, k_stride, first, time, HEAD_DIM, BLOCK_N, BLOCK_D)
    weights = tl.exp2(dot(q, tl.trans(block)) * scale - normalizer[:, None])
    if DIAGONAL:
        weights = tl.where(rows[:, None] >= keys[None, :], weights, 0.0)
    if mask is not None:
        visible = tl.load(mask + keys, mask=keys < time, other=0) != 0
        weights = tl.where(visible[None, :], weights, 0.0)
    values = _load(v, v_stride, first, time, HEAD_DIM, BLOCK_N, BLOCK_D)
    grad_weights = dot(grad, tl.trans(values))
    if seed is not None:
        kept = _kept(tl.load(seed), rows, first, head, threshold, BLOCK_M, BLOCK_N)
        grad_weights = tl.where(kept, grad_weights * kept_scale, 0.0)
    grad_scores = weights * (grad_weights - inner[:, None])
    return dot(cast(grad_scores, block.dtype), block, sums)


@triton.jit
def queries_kernel(
    grad, q, k, v, lse, delta, grad_q, mask, seed,
    grad_stride_b, grad_stride_t, grad_stride_h, q_stride_b, q_stride_t, q_stride_h,
    k_stride_b, k_stride_t, k_stride_h, v_stride_b, v_stride_t, v_stride_h,
    time, heads, scale, threshold, kept_scale,
    HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Gradients of BLOCK_M queries, from all keys that they see."""
    begin, b, h = _block_of_head(time, heads, BLOCK_M, True)
    head = b * heads + h
    rows = begin + tl.arange(0, BLOCK_M)
    q = _head(q, q_stride_b, q_stride_h, b, h)
    grad = _head(grad, grad_stride_b, grad_stride_h, b, h)
    queries = _load(q, q_stride_t, begin, time, HEAD_DIM, BLOCK_M, BLOCK_D)
    given = _load(grad, grad_stride_t, begin, time, HEAD_DIM, BLOCK_M, BLOCK_D)
    at = head.to(tl.int64) * time + rows
    normalizer = tl.load(lse + at, mask=rows < time, other=float("inf")) * LOG2_E
    inner = tl.load(delta + at, mask=rows < time, other=0.0)
    k = _head(k, k_stride_b, k_stride_h, b, h)
    v = _head(v, v_stride_b, v_stride_h, b, h)
    if mask is not None:
        mask += b.to(tl.int64) * time
    sums = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    whole = begin // BLOCK_N * BLOCK_N
    for first in range(0, whole, BLOCK_N):
        sums = _add_grad_keys(
            sums, queries, given, normalizer, inner, k, k_stride_t, v, v_stride_t, mask, seed, rows,
            first, time, head, scale * LOG2_E, threshold, kept_scale,
            HEAD_DIM, BLOCK_M, BLOCK_N, BLOCK_D, False,
        )  # fmt: skip
    for first in range(whole, tl.minimum(begin + BLOCK_M, time), BLOCK_N):
        sums = _add_grad_keys(
            sums, queries, given, normalizer, inner, k, k_stride_t, v, v_stride_t, mask, seed, rows,
            first, time, head, scale * LOG2_E, threshold, kept_scale,
            HEAD_DIM, BLOCK_M, BLOCK_N, BLOCK_D, True,
        )  # fmt: skip
    stride = heads * HEAD_DIM
    base = grad_q + b.to(tl.int64) * time * stride + h * HEAD_DIM
    _store(base, stride, begin, time, sums * scale, HEAD_DIM, BLOCK_M, BLOCK_D)


@triton.jit
def _share(lengths, b, begin, time, entries, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Row b's length before this call, and the range of entries that this program reads."""
    length = tl.load(lengths + b)
    end = tl.minimum(length + tl.minimum(begin + BLOCK_M, time), entries).to(tl.int32)
    share = tl.cdiv(tl.cdiv(end, BLOCK_N), tl.num_programs(1)) * BLOCK_N
    first = tl.program_id(1) * share
    return length, first, tl.minimum(first + share, end)


@triton.jit
def _factors(scales, stride, keys, end):
    """Factors of the int8 entries `keys` of one head."""
    return tl.load(scales + keys.to(tl.int64) * stride, mask=keys < end, other=0.0)


@triton.jit
def one_query_kernel(
    q, k_cache, v_cache, k_scales, v_scales, lengths, out, sums, highests, totals,
    q_stride_b, q_stride_t, q_stride_h, k_stride_b, k_stride_t, k_stride_h,
    v_stride_b, v_stride_t, v_stride_h, k_scales_stride_b, k_scales_stride_t, k_scales_stride_h,
    v_scales_stride_b, v_scales_stride_t, v_scales_stride_h, lengths_stride,
    time, entries, heads, scale,
    HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One query's attention to a share of its row's entries; too small for tensor cores."""
    b, h = tl.program_id(0) // heads, tl.program_id(0) % heads
    columns = tl.arange(0, BLOCK_D)
    inside = columns < HEAD_DIM
    query = tl.load(_head(q, q_stride_b, q_stride_h, b, h) + columns, mask=inside, other=0.0)
    query = query.to(tl.float32) * (scale * LOG2_E)
    k = _head(k_cache, k_stride_b, k_stride_h, b, h)
    v = _head(v_cache, v_stride_b, v_stride_h, b, h)
    _, begin, end = _share(lengths, b.to(tl.int64) * lengths_stride, 0, 1, entries, 1, BLOCK_N)
    sum = tl.zeros((BLOCK_D,), tl.float32)
    highest = tl.full((1,), -float("inf"), tl.float32)
    total = tl.zeros((1,), tl.float32)
    for first in range(begin, end, BLOCK_N):
        keys = first + tl.arange(0, BLOCK_N)
        block = _load(k, k_stride_t, first, end, HEAD_DIM, BLOCK_N, BLOCK_D).to(tl.float32)
        values = _load(v, v_stride_t, first, end, HEAD_DIM, BLOCK_N, BLOCK_D).to(tl.float32)
        scores = tl.sum(block * query[None, :], 1)
        if k_scales is not None:
            at = _head(k_scales, k_scales_stride_b, k_scales_stride_h, b, h)
            scores *= _factors(at, k_scales_stride_t, keys, end)
        scores = tl.where(keys < end, scores, -float("inf"))
        new = tl.maximum(highest, tl.max(scores, 0))
        shift = tl.where(new == -float("inf"), 0.0, new)
        weights = tl.exp2(scores - shift)
        decay = tl.exp2(highest - shift)
        total = total * decay + tl.sum(weights, 0)
        if v_scales is not None:
            at = _head(v_scales, v_scales_stride_b, v_scales_stride_h, b, h)
            weights *= _factors(at, v_scales_stride_t, keys, end)
        sum = sum * decay + tl.sum(values * weights[:, None], 0)
        highest = new
    if sums is None:
        sum = tl.where(total == 0.0, 0.0, sum / total)
        tl.store(
            out + tl.program_id(0).to(tl.int64) * HEAD_DIM + columns,
            cast(sum, out.dtype.element_ty), mask=inside,
        )  # fmt: skip
    else:
        part = tl.program_id(0).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
        tl.store(sums + part * HEAD_DIM + columns, sum, mask=inside)
        tl.store(highests + part + tl.arange(0, 1), highest)
        tl.store(totals + part + tl.arange(0, 1), total)


@triton.jit
def some_queries_kernel(
    q, k_cache, v_cache, k_scales, v_scales, lengths, out, sums, highests, totals,
    q_stride_b, q_stride_t, q_stride_h, k_stride_b, k_stride_t, k_stride_h,
    v_stride_b, v_stride_t, v_stride_h, k_scales_stride_b, k_scales_stride_t, k_scales_stride_h,
    v_scales_stride_b, v_scales_stride_t, v_scales_stride_h, lengths_stride,
    time, entries, heads, scale,
    HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Attention of BLOCK_M queries to a share of their row's entries."""
    begin, b, h = _block_of_head(time, heads, BLOCK_M, True)
    rows = begin + tl.arange(0, BLOCK_M)
    queries = _load(
        _head(q, q_stride_b, q_stride_h, b, h), q_stride_t, begin, time, HEAD_DIM, BLOCK_M, BLOCK_D
    )
    mixed: tl.constexpr = (
        q.dtype.element_ty != k_cache.dtype.element_ty
        or q.dtype.element_ty != v_cache.dtype.element_ty
    )
    if mixed:
        queries = queries.to(tl.float32)
    k = _head(k_cache, k_stride_b, k_stride_h, b, h)
    v = _head(v_cache, v_stride_b, v_stride_h, b, h)
    length, first_entry, end = _share(
        lengths, b.to(tl.int64) * lengths_stride, begin, time, entries, BLOCK_M, BLOCK_N
    )
    newest = length + rows
    sum = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    highest = tl.full((BLOCK_M,), -float("inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    for first in range(first_entry, end, BLOCK_N):
        keys = first + tl.arange(0, BLOCK_N)
        block = _load(k, k_stride_t, first, end, HEAD_DIM, BLOCK_N, BLOCK_D)
        values = _load(v, v_stride_t, first, end, HEAD_DIM, BLOCK_N, BLOCK_D)
        if mixed:
            block = block.to(tl.float32)
            values = values.to(tl.float32)
        if v_scales is not None:
            at = _head(v_scales, v_scales_stride_b, v_scales_stride_h, b, h)
            values *= _factors(at, v_scales_stride_t, keys, end)[:, None]
        scores = dot(queries, tl.trans(block)) * (scale * LOG2_E)
        if k_scales is not None:
            at = _head(k_scales, k_scales_stride_b, k_scales_stride_h, b, h)
            scores *= _factors(at, k_scales_stride_t, keys, end)[None, :]
        visible = (keys[None, :] <= newest[:, None]) & (keys < end)[None, :]
        scores = tl.where(visible, scores, -float("inf"))
        new = tl.maximum(highest, tl.max(scores, 1))
        shift = tl.where(new == -float("inf"), 0.0, new)
        weights = tl.exp2(scores - shift[:, None])
        decay = tl.exp2(highest - shift)
        total = total * decay + tl.sum(weights, 1)
        sum = dot(cast(weights, values.dtype), values, sum * decay[:, None])
        highest = new
    # Partial results are indexed by query and head of the whole batch.
    place = (b.to(tl.int64) * time + rows) * heads + h
    columns = tl.arange(0, BLOCK_D)
    inside = (rows < time)[:, None] & (columns < HEAD_DIM)[None, :]
    if sums is None:
        sum = tl.where(total[:, None] == 0.0, 0.0, sum / total[:, None])
        tl.store(
            out + place[:, None] * HEAD_DIM + columns[None, :],
            cast(sum, out.dtype.element_ty), mask=inside,
        )  # fmt: skip
    else:
        part = place * tl.num_programs(1) + tl.program_id(1)
        tl.store(sums + part[:, None] * HEAD_DIM + columns[None, :], sum, mask=inside)
        tl.store(highests + part, highest, mask=rows < time)
        tl.store(totals + part, total, mask=rows < time)


@triton.jit
def combine_kernel(
    out, sums, highests, totals, shares,
    HEAD_DIM: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Combine the partial results of all shares into the output of one query and head."""
    place = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK_D)
    share = tl.arange(0, BLOCK_S)
    part = place * shares + share
    highest = tl.load(highests + part, mask=share < shares, other=-float("inf"))
    top = tl.max(highest, 0)
    decay = tl.exp2(highest - tl.where(top == -float("inf"), 0.0, top))
    total = tl.sum(tl.load(totals + part, mask=share < shares, other=0.0) * decay, 0)
    inside = (share < shares)[:, None] & (columns < HEAD_DIM)[None, :]
    found = tl.load(sums + part[:, None] * HEAD_DIM + columns[None, :], mask=inside, other=0.0)
    sum = tl.sum(found * decay[:, None], 0)
    sum = tl.where(total == 0.0, 0.0, sum / total)
    at = out + place * HEAD_DIM + columns
    tl.store(at, cast(sum, out.dtype.element_ty), mask=columns < HEAD_DIM)


def _readable(*tensors: Tensor) -> list[Tensor]:
    """The tensors, copied where the last dimension is not contiguous."""
    return [x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous() for x in tensors]


def _strides(*tensors: Tensor) -> list[int]:
    return [stride for tensor in tensors for stride in tensor.stride()[:3]]


def _dropout(call: Arguments) -> tuple[Tensor | None, int, float]:
    """Seed (None without dropout), threshold below which 16 random bits drop a weight, and the
    factor on kept weights."""
    threshold = round(call.dropout_p * 65536)
    if call.seed is None or not threshold:
        return None, 0, 1.0
    return call.seed, threshold, 65536 / (65536 - threshold) if threshold < 65536 else 0.0


def _bytes(mask: Tensor | None) -> Tensor | None:
    return None if mask is None else mask.contiguous().view(torch.uint8)


def forward(call: Arguments) -> tuple[Tensor, Tensor]:
    q, k, v = _readable(call.q, call.k, call.v)
    batch, time, heads, width = q.shape
    out = q.new_empty(q.shape)
    lse = q.new_empty((batch, heads, time), dtype=torch.float32)
    seed, threshold, kept_scale = _dropout(call)
    launch = _settings("attention_forward", q, seed)
    forward_kernel[(triton.cdiv(time, launch["BLOCK_M"]) * batch * heads,)](
        q, k, v, out, lse, _bytes(call.mask), seed, *_strides(q, k, v),
        time, heads, call.scale, threshold, kept_scale,
        HEAD_DIM=width, BLOCK_D=_padded(width), **launch,
    )  # fmt: skip
    return out, lse


def backward(call: Arguments) -> tuple[Tensor, Tensor, Tensor]:
    grad, q, k, v, out = _readable(call.grad, call.q, call.k, call.v, call.out)
    lse, mask, scale = call.lse.contiguous(), _bytes(call.mask), call.scale
    batch, time, heads, width = q.shape
    padded = _padded(width)
    delta = torch.empty_like(lse)
    grad_q, grad_k, grad_v = (q.new_empty(q.shape) for _ in "qkv")
    seed, threshold, kept_scale = _dropout(call)
    launch = settings("attention_delta", q.device)
    delta_kernel[(triton.cdiv(time, launch["BLOCK_M"]) * batch * heads,)](
        grad, out, delta, *_strides(grad, out), time, heads,
        HEAD_DIM=width, BLOCK_D=padded, **launch,
    )  # fmt: skip
    launch = _settings("attention_keys", q, seed)
    keys_kernel[(triton.cdiv(time, launch["BLOCK_N"]) * batch * heads,)](
        grad, q, k, v, lse, delta, grad_k, grad_v, mask, seed, *_strides(grad, q, k, v),
        time, heads, scale, threshold, kept_scale, HEAD_DIM=width, BLOCK_D=padded, **launch,
    )  # fmt: skip
    launch = _settings("attention_queries", q, seed)
    queries_kernel[(triton.cdiv(time, launch["BLOCK_M"]) * batch * heads,)](
        grad, q, k, v, lse, delta, grad_q, mask, seed, *_strides(grad, q, k, v),
        time, heads, scale, threshold, kept_scale, HEAD_DIM=width, BLOCK_D=padded, **launch,
    )  # fmt: skip
    return grad_q, grad_k, grad_v


def with_cache(call: Arguments) -> Tensor:
    (q,) = _readable(call.q)
    k_cache, v_cache, lengths = call.k_cache, call.v_cache, call.lengths
    k_scales, v_scales = call.k_scales, call.v_scales
    batch, time, heads, width = q.shape
    entries = k_cache.shape[1]
    out = q.new_empty(q.shape)
    element_size = max(q.element_size(), k_cache.element_size(), v_cache.element_size())
    strides = _strides(q, k_cache, v_cache)
    if k_scales is None or v_scales is None:
        strides += [0] * 6
    else:
        strides += [*k_scales.stride(), *v_scales.stride()]
        element_size = 4  # int8 is converted to float32 when several queries multiply it
    launch = settings(
        "attention_with_cache", q.device, element_size=element_size, head_dim=width, queries=time
    )
    programs = triton.cdiv(time, launch["BLOCK_M"]) * batch * heads
    # Two programs for each multiprocessor, if each gets at least one block of entries.
    shares = triton.cdiv(2 * multiprocessors(q.device), programs)
    shares = max(1, min(shares, triton.cdiv(entries, launch["BLOCK_N"]), MOST_SHARES))
    sums = highests = totals = None
    if shares > 1:
        parts = (batch * time * heads, shares)
        sums = q.new_empty((*parts, width), dtype=torch.float32)
        highests, totals = (q.new_empty(parts, dtype=torch.float32) for _ in range(2))
    kernel = one_query_kernel if time == 1 else some_queries_kernel
    kernel[(programs, shares)](
        q, k_cache, v_cache, k_scales, v_scales, lengths, out, sums, highests, totals,
        *strides, lengths.stride(0), time, entries, heads, call.scale,
        HEAD_DIM=width, BLOCK_D=_padded(width), **launch,
    )  # fmt: skip
    if shares > 1:
        combine_kernel[(batch * time * heads,)](
            out, sums, highests, totals, shares,
            HEAD_DIM=width, BLOCK_S=triton.next_power_of_2(shares), BLOCK_D=_padded(width),
        )  # fmt: skip
    return out


def _padded(width: int) -> int:
    """A head's width as the matrix products take it: a power of two, at least 16."""
    return max(16, triton.next_power_of_2(width))


def _settings(kernel: str, q: Tensor, seed: Tensor | None) -> dict[str, int]:
    return settings(
        kernel,
        q.device,
        element_size=q.element_size(),
        head_dim=q.shape[-1],
        dropout=int(seed is not None),
    )
