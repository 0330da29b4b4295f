"""Residual add and layer normalization in Triton, forward and backward.

Bytes of an element in bfloat16: forward 4 read (x, residual) and 4 written (normed, summed);
backward 6 read (two gradients, the sum) and 2 written. Some ten operations an element: memory is
the floor. Not yet run on a GPU.

A program holds whole rows in registers, from the one read to the one write. Rows wider than
`_WIDEST` are read again instead, a block at a time.

Backward: each program takes a group of neighboring rows, adds up what they give to the gradients
of weight and bias, and leaves one row of partial sums; `sum_partials` adds those in a fixed order.
No atomics: equal calls give equal bits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..backend import Arguments
from ..native import rows as as_rows
from .language import cast
from .reduction import row_groups, sum_partials
from .tuning import settings

_WIDEST = 8192


@triton.jit
def _load_sum(
    x,
    residual,
    row,
    column,
    x_stride,
    residual_stride,
    mask,
    HAS_RESIDUAL: tl.constexpr,
):
    """A tile of x + residual in float32, rounded to residual's dtype."""
    total = tl.load(x + row * x_stride + column, mask=mask, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        stream = tl.load(residual + row * residual_stride + column, mask=mask, other=0.0)
        total += stream.to(tl.float32)
        total = cast(total, residual.dtype.element_ty).to(tl.float32)
    return total


@triton.jit
def layer_norm_forward(
    x,
    residual,
    weight,
    bias,
    normed,
    summed,
    mean,
    rstd,
    rows,
    columns,
    x_stride,
    residual_stride,
    eps,
    HAS_RESIDUAL: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """BLOCK_ROWS rows of at most BLOCK_COLUMNS columns a program."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)[:, None]
    column = tl.arange(0, BLOCK_COLUMNS)[None, :]
    mask = (row < rows) & (column < columns)
    total = _load_sum(x, residual, row, column, x_stride, residual_stride, mask, HAS_RESIDUAL)
    if HAS_RESIDUAL:
        rounded = cast(total, summed.dtype.element_ty)
        tl.store(summed + row * columns + column, rounded, mask=mask)
    average = tl.sum(total, 1, keep_dims=True) / columns
    deviation = tl.where(mask, total - average, 0.0)
    variance = tl.sum(deviation * deviation, 1, keep_dims=True) / columns
    scale = tl.rsqrt(variance + eps)
    gain = tl.load(weight + column, mask=column < columns, other=0.0).to(tl.float32)
    shift = tl.load(bias + column, mask=column < columns, other=0.0).to(tl.float32)
    out = cast(deviation * scale * gain + shift, normed.dtype.element_ty)
    tl.store(normed + row * columns + column, out, mask=mask)
    tl.store(mean + row, average, mask=row < rows)
    tl.store(rstd + row, scale, mask=row < rows)


@triton.jit
def wide_layer_norm_forward(
    x,
    residual,
    weight,
    bias,
    normed,
    summed,
    mean,
    rstd,
    columns,
    x_stride,
    residual_stride,
    eps,
    HAS_RESIDUAL: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """A row a program, in blocks of BLOCK_COLUMNS.

    Statistics of the blocks are joined by Chan et al. (1979), so that large offsets do not cancel.
    The second pass adds x and residual again: without a barrier, threads would not see each
    other's writes to `summed`.
    """
    row = tl.program_id(0).to(tl.int64)
    average = 0.0
    squares = 0.0
    for start in range(0, columns, BLOCK_COLUMNS):
        column = start + tl.arange(0, BLOCK_COLUMNS)
        mask = column < columns
        total = _load_sum(x, residual, row, column, x_stride, residual_stride, mask, HAS_RESIDUAL)
        if HAS_RESIDUAL:
            rounded = cast(total, summed.dtype.element_ty)
            tl.store(summed + row * columns + column, rounded, mask=mask)
        width = tl.minimum(columns - start, BLOCK_COLUMNS).to(tl.float32)
        block_average = tl.sum(total, 0) / width
        deviation = tl.where(mask, total - block_average, 0.0)
        difference = block_average - average
        share = width / (start + width)
        average += difference * share
        squares += tl.sum(deviation * deviation, 0) + difference * difference * share * start
    scale = tl.rsqrt(squares / columns + eps)
    tl.store(mean + row, average)
    tl.store(rstd + row, scale)
    for start in range(0, columns, BLOCK_COLUMNS):
        column = start + tl.arange(0, BLOCK_COLUMNS)
        mask = column < columns
        total = _load_sum(x, residual, row, column, x_stride, residual_stride, mask, HAS_RESIDUAL)
        gain = tl.load(weight + column, mask=mask, other=0.0).to(tl.float32)
        shift = tl.load(bias + column, mask=mask, other=0.0).to(tl.float32)
        out = cast((total - average) * scale * gain + shift, normed.dtype.element_ty)
        tl.store(normed + row * columns + column, out, mask=mask)


def forward(call: Arguments) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x, residual, eps = call.x, call.residual, call.eps
    flat = as_rows(x)
    stream = flat if residual is None else as_rows(residual)
    rows, columns = flat.shape
    dtype = torch.float32
    normed = torch.empty_like(x, memory_format=torch.contiguous_format)
    summed = (
        x.new_empty(0)
        if residual is None
        else torch.empty_like(residual, memory_format=torch.contiguous_format)
    )
    mean, rstd = (x.new_empty((*x.shape[:-1], 1), dtype=dtype) for _ in range(2))
    weight, bias = call.weight.contiguous(), call.bias.contiguous()
    tensors = (flat, stream, weight, bias, normed, summed, mean, rstd)
    strides = (flat.stride(0), stream.stride(0))
    if columns > _WIDEST:
        wide_layer_norm_forward[(rows,)](
            *tensors,
            columns,
            *strides,
            eps,
            HAS_RESIDUAL=residual is not None,
            **settings("wide_layer_norm_forward", x.device),
        )
    else:
        width = triton.next_power_of_2(columns)
        launch = settings("layer_norm_forward", x.device, columns=width)
        layer_norm_forward[(triton.cdiv(rows, launch["BLOCK_ROWS"]),)](
            *tensors,
            rows,
            columns,
            *strides,
            eps,
            HAS_RESIDUAL=residual is not None,
            BLOCK_COLUMNS=width,
            **launch,
        )
    return normed, summed, mean, rstd


@triton.jit
def layer_norm_backward(
    grad_normed,
    grad_summed,
    summed,
    mean,
    rstd,
    weight,
    grad_input,
    partials,
    rows,
    columns,
    group,
    grad_normed_stride,
    grad_summed_stride,
    summed_stride,
    HAS_SUMMED: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """`group` rows a program, BLOCK_ROWS at a time, of at most BLOCK_COLUMNS columns.

    `partials` is (2, programs, columns): sums for the gradients of weight and bias.
    """
    program = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK_COLUMNS)[None, :]
    inside = column < columns
    gain = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    grad_weight = tl.zeros((1, BLOCK_COLUMNS), tl.float32)
    grad_bias = tl.zeros((1, BLOCK_COLUMNS), tl.float32)
    end = tl.minimum((program + 1) * group, rows)
    for start in range(0, group, BLOCK_ROWS):
        row = program * group + start + tl.arange(0, BLOCK_ROWS)[:, None]
        mask = (row < end) & inside
        total = tl.load(summed + row * summed_stride + column, mask=mask, other=0.0)
        grad = tl.load(grad_normed + row * grad_normed_stride + column, mask=mask, other=0.0)
        grad = grad.to(tl.float32)
        average = tl.load(mean + row, mask=row < end, other=0.0)
        scale = tl.load(rstd + row, mask=row < end, other=0.0)
        standard = tl.where(mask, (total.to(tl.float32) - average) * scale, 0.0)
        grad_weight += tl.sum(grad * standard, 0, keep_dims=True)
        grad_bias += tl.sum(grad, 0, keep_dims=True)
        grad *= gain
        along = tl.sum(grad * standard, 1, keep_dims=True) / columns
        out = scale * (grad - tl.sum(grad, 1, keep_dims=True) / columns - standard * along)
        if HAS_SUMMED:
            other = tl.load(grad_summed + row * grad_summed_stride + column, mask=mask, other=0.0)
            out += other.to(tl.float32)
        out = cast(out, grad_input.dtype.element_ty)
        tl.store(grad_input + row * columns + column, out, mask=mask)
    partials += program * columns + column
    tl.store(partials, grad_weight, mask=inside)
    tl.store(partials + tl.num_programs(0) * columns, grad_bias, mask=inside)


@triton.jit
def wide_layer_norm_backward(
    grad_normed,
    grad_summed,
    summed,
    mean,
    rstd,
    weight,
    grad_input,
    columns,
    grad_normed_stride,
    grad_summed_stride,
    summed_stride,
    HAS_SUMMED: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """Gradient of the input alone: a row a program, in blocks of BLOCK_COLUMNS."""
    row = tl.program_id(0).to(tl.int64)
    average = tl.load(mean + row)
    scale = tl.load(rstd + row)
    summed += row * summed_stride
    grad_normed += row * grad_normed_stride
    over_grad = 0.0
    along = 0.0
    for start in range(0, columns, BLOCK_COLUMNS):
        column = start + tl.arange(0, BLOCK_COLUMNS)
        mask = column < columns
        total = tl.load(summed + column, mask=mask, other=0.0).to(tl.float32)
        grad = tl.load(grad_normed + column, mask=mask, other=0.0).to(tl.float32)
        grad *= tl.load(weight + column, mask=mask, other=0.0).to(tl.float32)
        over_grad += tl.sum(grad, 0)
        along += tl.sum(grad * (total - average) * scale, 0)
    over_grad /= columns
    along /= columns
    for start in range(0, columns, BLOCK_COLUMNS):
        column = start + tl.arange(0, BLOCK_COLUMNS)
        mask = column < columns
        total = tl.load(summed + column, mask=mask, other=0.0).to(tl.float32)
        grad = tl.load(grad_normed + column, mask=mask, other=0.0).to(tl.float32)
        grad *= tl.load(weight + column, mask=mask, other=0.0).to(tl.float32)
        out = scale * (grad - over_grad - (total - average) * scale * along)
        if HAS_SUMMED:
            other = tl.load(grad_summed + row * grad_summed_stride + column, mask=mask, other=0.0)
            out += other.to(tl.float32)
        out = cast(out, grad_input.dtype.element_ty)
        tl.store(grad_input + row * columns + column, out, mask=mask)


@triton.jit
def wide_parameter_gradients(
    grad_normed,
    summed,
    mean,
    rstd,
    partials,
    rows,
    columns,
    group,
    grad_normed_stride,
    summed_stride,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """Partial sums for the gradients of weight and bias: `group` rows, a block of columns."""
    program = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)[None, :]
    inside = column < columns
    grad_weight = tl.zeros((1, BLOCK_COLUMNS), tl.float32)
    grad_bias = tl.zeros((1, BLOCK_COLUMNS), tl.float32)
    end = tl.minimum((program + 1) * group, rows)
    for start in range(0, group, BLOCK_ROWS):
        row = program * group + start + tl.arange(0, BLOCK_ROWS)[:, None]
        mask = (row < end) & inside
        total = tl.load(summed + row * summed_stride + column, mask=mask, other=0.0)
        grad = tl.load(grad_normed + row * grad_normed_stride + column, mask=mask, other=0.0)
        grad = grad.to(tl.float32)
        average = tl.load(mean + row, mask=row < end, other=0.0)
        scale = tl.load(rstd + row, mask=row < end, other=0.0)
        standard = (total.to(tl.float32) - average) * scale
        grad_weight += tl.sum(grad * standard, 0, keep_dims=True)
        grad_bias += tl.sum(grad, 0, keep_dims=True)
    partials += program * columns + column
    tl.store(partials, grad_weight, mask=inside)
    tl.store(partials + tl.num_programs(0) * columns, grad_bias, mask=inside)


def backward(call: Arguments) -> tuple[Tensor, Tensor, Tensor]:
    grad_summed, summed, weight = call.grad_summed, call.summed, call.weight
    grad, total = as_rows(call.grad_normed), as_rows(summed)
    other = grad if grad_summed is None else as_rows(grad_summed)
    rows, columns = total.shape
    grad_input = torch.empty_like(summed, memory_format=torch.contiguous_format)
    mean, rstd = call.mean.contiguous(), call.rstd.contiguous()
    tensors = (grad, other, total, mean, rstd, weight.contiguous(), grad_input)
    strides = (grad.stride(0), other.stride(0), total.stride(0))
    wide = columns > _WIDEST
    width = triton.next_power_of_2(columns)
    launch = (
        settings("wide_parameter_gradients", summed.device)
        if wide
        else settings("layer_norm_backward", summed.device, columns=width)
    )
    column_blocks = triton.cdiv(columns, launch["BLOCK_COLUMNS"]) if wide else 1
    group, groups = row_groups(rows, launch["BLOCK_ROWS"], column_blocks)
    partials = summed.new_empty((2, groups, columns), dtype=torch.float32)
    if wide:
        wide_layer_norm_backward[(rows,)](
            *tensors,
            columns,
            *strides,
            HAS_SUMMED=grad_summed is not None,
            **settings("wide_layer_norm_backward", summed.device),
        )
        wide_parameter_gradients[(groups, column_blocks)](
            grad,
            total,
            mean,
            rstd,
            partials,
            rows,
            columns,
            group,
            grad.stride(0),
            total.stride(0),
            **launch,
        )
    else:
        layer_norm_backward[(groups,)](
            *tensors,
            partials,
            rows,
            columns,
            group,
            *strides,
            HAS_SUMMED=grad_summed is not None,
            BLOCK_COLUMNS=width,
            **launch,
        )
    grad_weight, grad_bias = (sum_partials(each, weight.dtype) for each in partials)
    return grad_input, grad_weight, grad_bias
