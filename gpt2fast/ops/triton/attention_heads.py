"""Rows of one head, as the kernels of attention read and write them, and their launches' arguments.

A head's width is padded to a power of two.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .language import cast
from .tuning import settings

LOG2_E = tl.constexpr(1.4426950408889634)
"""Factor that brings scores into units of log2: exp2 is the instruction."""


@triton.jit
def load_rows(base, stride, first, time, HEAD_DIM, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr):
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
def store_rows(
    base, stride, first, time, value, HEAD_DIM, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr
):
    rows = tl.arange(0, BLOCK)
    columns = tl.arange(0, BLOCK_D)
    pointers = base + tl.cast(first, tl.int64) * stride
    pointers += rows[:, None] * stride + columns[None, :]
    inside = ((first + rows)[:, None] < time) & (columns[None, :] < HEAD_DIM)
    tl.store(pointers, cast(value, base.dtype.element_ty), mask=inside)


@triton.jit
def head_of(base, stride_b, stride_h, b, h):
    return base + b.to(tl.int64) * stride_b + h.to(tl.int64) * stride_h


@triton.jit
def whole_keys(begin, time, BLOCK_N: tl.constexpr, CAUSAL: tl.constexpr):
    """The end of the blocks of keys that all queries from `begin` on see whole."""
    if CAUSAL:
        return begin // BLOCK_N * BLOCK_N
    else:
        return time // BLOCK_N * BLOCK_N


@triton.jit
def last_key(begin, time, BLOCK_M: tl.constexpr, CAUSAL: tl.constexpr):
    """The end of the keys that any of BLOCK_M queries from `begin` on sees."""
    if CAUSAL:
        return tl.minimum(begin + BLOCK_M, time)
    else:
        return time


@triton.jit
def visible_places(rows, keys, time, CAUSAL: tl.constexpr):
    """True where a query in `rows` may see a key, both of a shape that broadcasts."""
    if CAUSAL:
        return rows >= keys
    else:
        return keys < time


@triton.jit
def block_of_head(time, heads, BLOCK: tl.constexpr, LAST_FIRST: tl.constexpr):
    """This program's first row, its row of the batch, and its head."""
    blocks = tl.cdiv(time, BLOCK)
    block = tl.program_id(0) % blocks
    if LAST_FIRST:  # later blocks have more work, so they start first
        block = blocks - 1 - block
    head = tl.program_id(0) // blocks
    return block * BLOCK, head // heads, head % heads


def readable(*tensors: Tensor) -> list[Tensor]:
    """The tensors, copied where the last dimension is not contiguous."""
    return [x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous() for x in tensors]


def strides_of(*tensors: Tensor) -> list[int]:
    return [stride for tensor in tensors for stride in tensor.stride()[:3]]


def mask_bytes(mask: Tensor | None) -> Tensor | None:
    return None if mask is None else mask.contiguous().view(torch.uint8)


def padded_width(width: int) -> int:
    """A head's width as the matrix products take it: a power of two, at least 16."""
    return max(16, triton.next_power_of_2(width))


def head_settings(kernel: str, q: Tensor, seed: Tensor | None, **key: int) -> dict[str, int]:
    """Settings of a kernel for heads like q's; `key` has sizes of its own table."""
    return settings(
        kernel,
        q.device,
        element_size=q.element_size(),
        head_dim=q.shape[-1],
        dropout=int(seed is not None),
        **key,
    )
