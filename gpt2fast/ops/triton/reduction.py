"""Sums over the rows of a matrix in a fixed order, without atomics.

Rows are cut into groups of neighbors, a program leaves one row of float32 sums for each, and a
second launch adds these. The cut depends on the shape alone: equal calls give equal bits.

Bytes: every element is read once; partial sums are a small share. Not yet run on a GPU.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .language import cast
from .tuning import settings

# Enough programs to fill any GPU, few enough that their partial sums are little to read.
_MOST_GROUPS = 1024


def row_groups(rows: int, step: int, column_blocks: int = 1) -> tuple[int, int]:
    """Rows in a group, a multiple of `step`, and the number of groups.

    Args:
        column_blocks: programs that share a group's columns.
    """
    most = _MOST_GROUPS if column_blocks == 1 else max(1, 2 * _MOST_GROUPS // column_blocks)
    group = step * triton.cdiv(triton.cdiv(rows, step), most)
    return group, triton.cdiv(rows, group)


@triton.jit
def sum_rows_kernel(
    x,
    out,
    rows,
    columns,
    group,
    stride,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """out[g, :] = sum of the g-th `group` rows of x."""
    program = tl.program_id(1).to(tl.int64)
    column = tl.program_id(0) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)[None, :]
    inside = column < columns
    total = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), tl.float32)
    end = tl.minimum((program + 1) * group, rows)
    for start in range(0, group, BLOCK_ROWS):
        row = program * group + start + tl.arange(0, BLOCK_ROWS)[:, None]
        values = tl.load(x + row * stride + column, mask=(row < end) & inside, other=0.0)
        total += values.to(tl.float32)
    result = cast(tl.sum(total, 0, keep_dims=True), out.dtype.element_ty)
    tl.store(out + program * columns + column, result, mask=inside)


def _launch(x: Tensor, out: Tensor, group: int, launch: dict[str, int]) -> None:
    rows, columns = x.shape
    grid = (triton.cdiv(columns, launch["BLOCK_COLUMNS"]), out.numel() // columns)
    sum_rows_kernel[grid](x, out, rows, columns, group, x.stride(0), **launch)


def sum_partials(partials: Tensor, dtype: torch.dtype) -> Tensor:
    """Sum of at most a few hundred rows, in one launch."""
    out = partials.new_empty(partials.shape[1], dtype=dtype)
    launch = settings("sum_partials", partials.device, rows=len(partials))
    _launch(partials, out, len(partials), launch)
    return out


def sum_rows(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Sum of the rows of x, whose columns are contiguous, in two launches."""
    launch = settings("sum_rows", x.device)
    column_blocks = triton.cdiv(x.shape[1], launch["BLOCK_COLUMNS"])
    group, groups = row_groups(len(x), launch["BLOCK_ROWS"], column_blocks)
    if groups == 1:
        return sum_partials(x, dtype)
    partials = x.new_empty((groups, x.shape[1]), dtype=torch.float32)
    _launch(x, partials, group, launch)
    return sum_partials(partials, dtype)
