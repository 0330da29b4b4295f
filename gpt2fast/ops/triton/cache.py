"""Writing, reordering and releasing the rows of a key-value cache, in Triton.

Every entry is read once and written once: the floor is 2 B of traffic for each byte that moves, and
nothing is copied in between. An int8 cache takes 1.06 bytes an element, its factors among them, and
a program has whole heads, since a factor needs all their elements. A reordering reads a slice of
all rows before it writes that slice of any: no two programs share a slice, so that rows may repeat
and trade places.

Not yet run on a GPU.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..backend import Arguments
from .language import cast, rounded
from .tuning import settings


@triton.jit
def append_kernel(
    k, v, k_cache, v_cache, lengths, counts,
    k_stride_b, k_stride_t, k_stride_h, k_stride_d, v_stride_b, v_stride_t, v_stride_h, v_stride_d,
    k_cache_stride_b, k_cache_stride_t, k_cache_stride_h, k_cache_stride_d,
    v_cache_stride_b, v_cache_stride_t, v_cache_stride_h, v_cache_stride_d,
    lengths_stride, counts_stride, time, entries, elements,
    HEAD_DIM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Store part of one new entry, its key and its value."""
    b = (tl.program_id(0) // time).to(tl.int64)
    t = tl.program_id(0) % time
    count = time
    if counts is not None:
        count = tl.load(counts + b * counts_stride)
    place = tl.load(lengths + b * lengths_stride) + t
    element = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    h, d = element // HEAD_DIM, element % HEAD_DIM
    stored = (element < elements) & (t < count) & (place >= 0) & (place < entries)
    new = tl.load(
        k + b * k_stride_b + t.to(tl.int64) * k_stride_t + h * k_stride_h + d * k_stride_d,
        mask=stored, other=0.0,
    ).to(tl.float32)  # fmt: skip
    at = k_cache + b * k_cache_stride_b + place * k_cache_stride_t
    at += h * k_cache_stride_h + d * k_cache_stride_d
    tl.store(at, cast(new, k_cache.dtype.element_ty), mask=stored)
    new = tl.load(
        v + b * v_stride_b + t.to(tl.int64) * v_stride_t + h * v_stride_h + d * v_stride_d,
        mask=stored, other=0.0,
    ).to(tl.float32)  # fmt: skip
    at = v_cache + b * v_cache_stride_b + place * v_cache_stride_t
    at += h * v_cache_stride_h + d * v_cache_stride_d
    tl.store(at, cast(new, v_cache.dtype.element_ty), mask=stored)


@triton.jit
def _append_int8(
    new, cache, scales, b, t, h, place, stored,
    new_stride_b, new_stride_t, new_stride_h, new_stride_d,
    cache_stride_b, cache_stride_t, cache_stride_h, cache_stride_d,
    scales_stride_b, scales_stride_t, scales_stride_h,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Store keys or values of some heads as int8, as ops/int8_cache.py defines it."""
    d = tl.arange(0, BLOCK_D)
    inside = stored[:, None] & (d < HEAD_DIM)[None, :]
    at = new + b * new_stride_b + t.to(tl.int64) * new_stride_t
    at += h[:, None] * new_stride_h + d[None, :] * new_stride_d
    x = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    # A maximum may ignore NaN.
    largest = tl.max(tl.where(x == x, tl.abs(x), float("inf")), 1)
    inverse = tl.div_rn(tl.full(largest.shape, 127.0, tl.float32), tl.maximum(largest, 1e-30))
    # Infinity times the inverse, 0, is NaN, which has no integer.
    integers = rounded(x * inverse[:, None])
    integers = tl.where(integers == integers, tl.clamp(integers, -127.0, 127.0), 0.0)
    at = cache + b * cache_stride_b + place * cache_stride_t
    at += h[:, None] * cache_stride_h + d[None, :] * cache_stride_d
    tl.store(at, integers.to(tl.int8), mask=inside)
    unknown = tl.max((x != x).to(tl.int32), 1) != 0
    factor = tl.div_rn(largest, tl.full(largest.shape, 127.0, tl.float32))
    factor = tl.where(unknown, float("nan"), factor)
    at = scales + b * scales_stride_b + place * scales_stride_t + h * scales_stride_h
    tl.store(at, factor, mask=stored)


@triton.jit
def append_int8_kernel(
    k, v, k_cache, v_cache, k_scales, v_scales, lengths, counts,
    k_stride_b, k_stride_t, k_stride_h, k_stride_d, v_stride_b, v_stride_t, v_stride_h, v_stride_d,
    k_cache_stride_b, k_cache_stride_t, k_cache_stride_h, k_cache_stride_d,
    v_cache_stride_b, v_cache_stride_t, v_cache_stride_h, v_cache_stride_d,
    k_scales_stride_b, k_scales_stride_t, k_scales_stride_h,
    v_scales_stride_b, v_scales_stride_t, v_scales_stride_h,
    lengths_stride, counts_stride, time, entries, heads,
    HEAD_DIM: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Store BLOCK_H heads of one new entry, its key and its value."""
    b = (tl.program_id(0) // time).to(tl.int64)
    t = tl.program_id(0) % time
    count = time
    if counts is not None:
        count = tl.load(counts + b * counts_stride)
    place = tl.load(lengths + b * lengths_stride) + t
    h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    stored = (h < heads) & (t < count) & (place >= 0) & (place < entries)
    _append_int8(
        k, k_cache, k_scales, b, t, h, place, stored,
        k_stride_b, k_stride_t, k_stride_h, k_stride_d,
        k_cache_stride_b, k_cache_stride_t, k_cache_stride_h, k_cache_stride_d,
        k_scales_stride_b, k_scales_stride_t, k_scales_stride_h, HEAD_DIM, BLOCK_D,
    )  # fmt: skip
    _append_int8(
        v, v_cache, v_scales, b, t, h, place, stored,
        v_stride_b, v_stride_t, v_stride_h, v_stride_d,
        v_cache_stride_b, v_cache_stride_t, v_cache_stride_h, v_cache_stride_d,
        v_scales_stride_b, v_scales_stride_t, v_scales_stride_h, HEAD_DIM, BLOCK_D,
    )  # fmt: skip


def append(call: Arguments) -> None:
    k, v, k_cache, v_cache = call.k, call.v, call.k_cache, call.v_cache
    lengths, counts, k_scales, v_scales = call.lengths, call.counts, call.k_scales, call.v_scales
    batch, time, heads, width = k.shape
    if not k.numel():
        return
    elements = heads * width
    launch = settings("append_to_cache", k.device, elements=elements)
    if k_scales is not None and v_scales is not None:
        padded = triton.next_power_of_2(width)
        block = max(1, min(launch["BLOCK"] // padded, triton.next_power_of_2(heads)))
        append_int8_kernel[(batch * time, triton.cdiv(heads, block))](
            k, v, k_cache, v_cache, k_scales, v_scales, lengths, counts,
            *k.stride(), *v.stride(), *k_cache.stride(), *v_cache.stride(),
            *k_scales.stride(), *v_scales.stride(),
            lengths.stride(0), 0 if counts is None else counts.stride(0),
            time, k_cache.shape[1], heads,
            HEAD_DIM=width, BLOCK_H=block, BLOCK_D=padded, num_warps=launch["num_warps"],
        )  # fmt: skip
        return
    append_kernel[(batch * time, triton.cdiv(elements, launch["BLOCK"]))](
        k, v, k_cache, v_cache, lengths, counts,
        *k.stride(), *v.stride(), *k_cache.stride(), *v_cache.stride(),
        lengths.stride(0), 0 if counts is None else counts.stride(0),
        time, k_cache.shape[1], elements, HEAD_DIM=width, **launch,
    )  # fmt: skip


@triton.jit
def reorder_kernel(
    cache, rows, stride_b, stride_t, stride_h, stride_d, rows_stride, count, batch, elements,
    HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Reorder BLOCK elements of every row."""
    row = tl.arange(0, ROWS)
    source = tl.load(rows + row.to(tl.int64) * rows_stride, mask=row < count, other=0)
    # Rows that stay where they are need not move.
    moves = (row < count) & (source != row) & (source >= 0) & (source < batch)
    element = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    t, h, d = element // (HEADS * HEAD_DIM), element // HEAD_DIM % HEADS, element % HEAD_DIM
    at = cache + (t * stride_t + h * stride_h + d * stride_d)[None, :]
    inside = moves[:, None] & (element < elements)[None, :]
    values = tl.load(at + (source * stride_b)[:, None], mask=inside, other=0)
    # Without a barrier a thread could overwrite what another has yet to read.
    tl.debug_barrier()
    tl.store(at + (row.to(tl.int64) * stride_b)[:, None], values, mask=inside)


def reorder(call: Arguments) -> None:
    rows = call.rows
    for cache in (call.k_cache, call.v_cache):
        batch, entries, heads, width = cache.shape
        elements = entries * heads * width
        if not (elements and len(rows)):
            continue
        launch = settings("reorder_cache", cache.device, rows=len(rows))
        reorder_kernel[(triton.cdiv(elements, launch["BLOCK"]),)](
            _bits(cache), rows, *cache.stride(), rows.stride(0), len(rows), batch, elements,
            HEADS=heads, HEAD_DIM=width, **launch,
        )  # fmt: skip


def _bits(cache: Tensor) -> Tensor:
    """The cache as integers: its entries are moved, not read as numbers."""
    return cache.view({1: torch.int8, 2: torch.int16, 4: torch.int32}[cache.element_size()])


@triton.jit
def release_kernel(lengths, rows, lengths_stride, rows_stride, count, batch, BLOCK: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    row = tl.load(rows + place * rows_stride, mask=place < count, other=-1)
    zeros = tl.zeros((BLOCK,), tl.int64)
    tl.store(lengths + row * lengths_stride, zeros, mask=(row >= 0) & (row < batch))


def release(call: Arguments) -> None:
    lengths, rows = call.lengths, call.rows
    if not len(rows):
        return
    launch = settings("release_rows", lengths.device)
    release_kernel[(triton.cdiv(len(rows), launch["BLOCK"]),)](
        lengths, rows, lengths.stride(0), rows.stride(0), len(rows), len(lengths), **launch
    )
