"""Attention of new queries to a cache in Triton (Dao, 2023).

Floor, with few queries: 2 length D elements are read a head and row; the split over programs keeps
all multiprocessors reading.

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
    load_rows,
    padded_width,
    readable,
    strides_of,
)
from .language import cast, dot
from .tuning import multiprocessors, settings

MOST_SHARES = 64
"""Programs that may share the entries of one row and head."""


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
    query = tl.load(head_of(q, q_stride_b, q_stride_h, b, h) + columns, mask=inside, other=0.0)
    query = query.to(tl.float32) * (scale * LOG2_E)
    k = head_of(k_cache, k_stride_b, k_stride_h, b, h)
    v = head_of(v_cache, v_stride_b, v_stride_h, b, h)
    _, begin, end = _share(lengths, b.to(tl.int64) * lengths_stride, 0, 1, entries, 1, BLOCK_N)
    sum = tl.zeros((BLOCK_D,), tl.float32)
    highest = tl.full((1,), -float("inf"), tl.float32)
    total = tl.zeros((1,), tl.float32)
    for first in range(begin, end, BLOCK_N):
        keys = first + tl.arange(0, BLOCK_N)
        block = load_rows(k, k_stride_t, first, end, HEAD_DIM, BLOCK_N, BLOCK_D).to(tl.float32)
        values = load_rows(v, v_stride_t, first, end, HEAD_DIM, BLOCK_N, BLOCK_D).to(tl.float32)
        scores = tl.sum(block * query[None, :], 1)
        if k_scales is not None:
            at = head_of(k_scales, k_scales_stride_b, k_scales_stride_h, b, h)
            scores *= _factors(at, k_scales_stride_t, keys, end)
        scores = tl.where(keys < end, scores, -float("inf"))
        new = tl.maximum(highest, tl.max(scores, 0))
        shift = tl.where(new == -float("inf"), 0.0, new)
        weights = tl.exp2(scores - shift)
        decay = tl.exp2(highest - shift)
        total = total * decay + tl.sum(weights, 0)
        if v_scales is not None:
            at = head_of(v_scales, v_scales_stride_b, v_scales_stride_h, b, h)
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
    begin, b, h = block_of_head(time, heads, BLOCK_M, True)
    rows = begin + tl.arange(0, BLOCK_M)
    q = head_of(q, q_stride_b, q_stride_h, b, h)
    queries = load_rows(q, q_stride_t, begin, time, HEAD_DIM, BLOCK_M, BLOCK_D)
    mixed: tl.constexpr = (
        q.dtype.element_ty != k_cache.dtype.element_ty
        or q.dtype.element_ty != v_cache.dtype.element_ty
    )
    if mixed:
        queries = queries.to(tl.float32)
    k = head_of(k_cache, k_stride_b, k_stride_h, b, h)
    v = head_of(v_cache, v_stride_b, v_stride_h, b, h)
    length, first_entry, end = _share(
        lengths, b.to(tl.int64) * lengths_stride, begin, time, entries, BLOCK_M, BLOCK_N
    )
    newest = length + rows
    sum = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    highest = tl.full((BLOCK_M,), -float("inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    for first in range(first_entry, end, BLOCK_N):
        keys = first + tl.arange(0, BLOCK_N)
        block = load_rows(k, k_stride_t, first, end, HEAD_DIM, BLOCK_N, BLOCK_D)
        values = load_rows(v, v_stride_t, first, end, HEAD_DIM, BLOCK_N, BLOCK_D)
        if mixed:
            block = block.to(tl.float32)
            values = values.to(tl.float32)
        if v_scales is not None:
            at = head_of(v_scales, v_scales_stride_b, v_scales_stride_h, b, h)
            values *= _factors(at, v_scales_stride_t, keys, end)[:, None]
        scores = dot(queries, tl.trans(block)) * (scale * LOG2_E)
        if k_scales is not None:
            at = head_of(k_scales, k_scales_stride_b, k_scales_stride_h, b, h)
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


def with_cache(call: Arguments) -> Tensor:
    (q,) = readable(call.q)
    k_cache, v_cache, lengths = call.k_cache, call.v_cache, call.lengths
    k_scales, v_scales = call.k_scales, call.v_scales
    batch, time, heads, width = q.shape
    entries = k_cache.shape[1]
    out = q.new_empty(q.shape)
    element_size = max(q.element_size(), k_cache.element_size(), v_cache.element_size())
    strides = strides_of(q, k_cache, v_cache)
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
        HEAD_DIM=width, BLOCK_D=padded_width(width), **launch,
    )  # fmt: skip
    if shares > 1:
        combine_kernel[(batch * time * heads,)](
            out, sums, highests, totals, shares,
            HEAD_DIM=width, BLOCK_S=triton.next_power_of_2(shares), BLOCK_D=padded_width(width),
        )  # fmt: skip
    return out
