"""Token and position embedding in Triton, forward and a deterministic backward.

Forward, bytes of an element in bfloat16: 4 read (two table rows), 2 written. Memory is the floor.

Backward: tokens are sorted on the device, stably, so that the gradients of one token become
neighbors. A program takes BLOCK_ENTRIES neighbors and adds those with equal keys, all at once, as
a product with a matrix of zeros and ones. A run of equal keys that lies within a program's entries
is finished. Of one that crosses an end, a sum in float32 goes to the next launch, which does the
same with these sums; there are two for each program at most. So a token that fills the whole batch
is no slower than others: it takes log(N) launches, as they do. N and the keys fix the order of
every sum; no atomics. The version before walked its entries one after another, and so waited for
memory as often as it had entries.

Bytes: the gradient is read once and the table's gradient written twice, with zeros first: a table
mostly has more rows than a batch has tokens. The sort reads and writes N keys some four times.
Not yet run on a GPU.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..backend import Arguments
from ..native import rows as as_rows
from .language import cast, dot
from .reduction import sum_rows
from .tuning import settings


@triton.jit
def embedding_forward(
    tokens,
    positions,
    wte,
    wpe,
    out,
    rows,
    columns,
    time,
    wte_stride,
    wpe_stride,
    vocab_size,
    n_positions,
    astray,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """Embed BLOCK_ROWS tokens, BLOCK_COLUMNS columns, a program; token n is at positions[n % time].

    astray[0] becomes 1 where an index is outside of its table.
    """
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = tl.program_id(1) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)[None, :]
    token = tl.load(tokens + row, mask=row < rows, other=0)[:, None]
    position = tl.load(positions + row % time, mask=row < rows, other=0)[:, None]
    within = (token >= 0) & (token < vocab_size) & (position >= 0) & (position < n_positions)
    tl.store(astray + 0 * row[:, None], 1, mask=(row[:, None] < rows) & (within == 0))
    mask = (row[:, None] < rows) & within & (column < columns)
    total = tl.load(wte + token * wte_stride + column, mask=mask, other=0.0).to(tl.float32)
    total += tl.load(wpe + position * wpe_stride + column, mask=mask, other=0.0).to(tl.float32)
    total = cast(total, out.dtype.element_ty)
    tl.store(out + row[:, None] * columns + column, total, mask=mask)


def forward(call: Arguments) -> Tensor:
    tokens, positions = call.tokens, call.positions
    wte, wpe = as_rows(call.wte), as_rows(call.wpe)
    columns = wte.shape[1]
    out = wte.new_empty((*tokens.shape, columns))
    astray = tokens.new_zeros(1, dtype=torch.int32)
    launch = settings("embedding_forward", wte.device, columns=columns)
    grid = (
        triton.cdiv(tokens.numel(), launch["BLOCK_ROWS"]),
        triton.cdiv(columns, launch["BLOCK_COLUMNS"]),
    )
    embedding_forward[grid](
        tokens.contiguous(),
        positions.contiguous(),
        wte,
        wpe,
        out,
        tokens.numel(),
        columns,
        positions.numel(),
        wte.stride(0),
        wpe.stride(0),
        len(wte),
        len(wpe),
        astray,
        **launch,
    )
    # On a GPU this assertion fails on the device, as in torch's look-up: no wait for the result.
    torch._assert_async(
        astray == 0, f"an index is outside of {len(wte)} tokens, {len(wpe)} positions"
    )
    return out


@triton.jit
def _sum_equal(equal, values):
    """(E, E) zeros and ones times (E, C): for each entry the sum of those with the same key.

    Zero times infinity or NaN is NaN, which would reach rows of other keys. So values that are not
    finite are counted by kind instead, and added by their counts (E is less than 128).
    """
    wide = values.to(tl.float32)
    finite = tl.abs(wide) < float("inf")
    total = dot(
        cast(equal.to(tl.float32), values.dtype),
        cast(tl.where(finite, wide, 0.0), values.dtype),
    )
    kind = tl.where(wide == float("inf"), 1.0, tl.where(wide == float("-inf"), 128.0, 16384.0))
    kinds = dot(equal.to(tl.float16), tl.where(finite, 0.0, kind).to(tl.float16)).to(tl.int32)
    total += tl.where(kinds % 128 > 0, float("inf"), 0.0)
    total += tl.where(kinds // 128 % 128 > 0, float("-inf"), 0.0)
    return total + tl.where(kinds // 16384 > 0, float("nan"), 0.0)


@triton.jit
def add_runs(
    values,
    order,
    keys,
    sorted_keys,
    out,
    partials,
    partial_keys,
    entries,
    span,
    n,
    columns,
    stride,
    ORDERED: tl.constexpr,
    BLOCK_ENTRIES: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """Add rows of values with equal keys, BLOCK_ENTRIES of them and BLOCK_COLUMNS columns each.

    Args:
        order: the row of `values` for each key; not read if they are ORDERED.
        keys: (entries,) ascending; negative ones are skipped.
        sorted_keys: (n,), of which a program's entries cover `span`: they tell whether its first
            and last run go on in other programs.
        out: (keys, columns).
        partials, partial_keys: (2 * programs, columns) and (2 * programs,): for each program the
            sum of its first run, if an earlier program began it, and of its last, if it goes on
            in a later one.
    """
    program = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    inside = column[None, :] < columns
    entry = program * BLOCK_ENTRIES + tl.arange(0, BLOCK_ENTRIES)
    key = tl.load(keys + entry, mask=entry < entries, other=-1).to(tl.int64)
    row = entry
    if not ORDERED:
        row = tl.load(order + entry, mask=entry < entries, other=0)
    counts = key >= 0
    at = row[:, None] * stride + column[None, :]
    value = tl.load(values + at, mask=counts[:, None] & inside, other=0.0)
    equal = key[:, None] == key[None, :]
    total = _sum_equal(equal, value)
    followers = tl.sum((equal & (entry[None, :] > entry[:, None])).to(tl.int32), 1)
    last = counts & (followers == 0)

    before = tl.load(sorted_keys + program * span - 1, mask=program > 0, other=-1)
    end = (program + 1) * span
    after = tl.load(sorted_keys + end, mask=end < n, other=-1)
    begun = key == before
    crossing = begun | (key == after)
    at = key[:, None] * columns + column[None, :]
    finished = (last & (crossing == 0))[:, None] & inside
    tl.store(out + at, cast(total, out.dtype.element_ty), mask=finished)
    slot = 2 * program + tl.where(begun, 0, 1)
    at = slot[:, None] * columns + column[None, :]
    tl.store(partials + at, total, mask=(last & crossing)[:, None] & inside)
    tl.store(partial_keys + slot, key, mask=last & crossing)


def _add_rows(values: Tensor, indices: Tensor, size: int, dtype: torch.dtype) -> Tensor:
    """(size, columns): row i is the sum of the rows of values whose index is i."""
    columns = values.shape[1]
    out = values.new_zeros((size, columns), dtype=dtype)
    # Fewer bits in a key mean fewer passes of the sort.
    sorted_keys, order = torch.sort(indices.to(torch.int32), stable=True)
    inside = (sorted_keys[0] >= 0) & (sorted_keys[-1] < size)
    torch._assert_async(inside, f"an index is outside of a table of {size} rows")
    launch = settings("add_runs", values.device, columns=columns)
    keys, ordered, span = sorted_keys, False, launch["BLOCK_ENTRIES"]
    while True:
        programs = triton.cdiv(len(keys), launch["BLOCK_ENTRIES"])
        crossing = 2 * programs if programs > 1 else 0
        partials = values.new_empty((crossing, columns), dtype=torch.float32)
        partial_keys = keys.new_full((crossing,), -1)
        add_runs[(programs, triton.cdiv(columns, launch["BLOCK_COLUMNS"]))](
            values,
            order,
            keys,
            sorted_keys,
            out,
            partials,
            partial_keys,
            len(keys),
            span,
            len(sorted_keys),
            columns,
            values.stride(0),
            ORDERED=ordered,
            **launch,
        )
        if programs == 1:
            return out
        values, keys, ordered = partials, partial_keys, True
        span *= launch["BLOCK_ENTRIES"] // 2


def backward(call: Arguments) -> tuple[Tensor, Tensor]:
    grad, tokens, positions = call.grad, call.tokens, call.positions
    flat = as_rows(grad)
    grad_wte = _add_rows(flat, tokens.reshape(-1), call.vocab_size, grad.dtype)
    if positions.numel() != tokens.numel():  # shared by the batch
        flat = sum_rows(flat.reshape(tokens.shape[:-1].numel(), -1), torch.float32).view(
            -1, flat.shape[1]
        )
    return grad_wte, _add_rows(flat, positions.reshape(-1), call.n_positions, grad.dtype)
