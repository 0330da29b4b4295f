"""GPT-2's feed-forward layer and its activation in Triton, forward and backward.

bias_gelu, bytes of an element in bfloat16: forward 2 read and 2 written, backward 4 read and 2
written. Memory is the floor.

gelu_mlp: 4 * rows * C * C_inner FLOPs forward, twice that backward; the matrix products are the
floor. The activation costs no pass of its own: the product that precedes it, forward and backward,
ends with it. Forward, that product writes both what GELU takes (kept for the backward pass) and
what it gives; backward, it writes the gradient and once more what GELU gives, which the gradient
of w_proj needs. Not yet run on a GPU.

gelu(z) = z * sigmoid(2 u) with u = sqrt(2 / pi) * (z + 0.044715 z^3): the tanh form without a tanh,
which Triton's language lacks, and without its cancellation where z is far below zero.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..backend import Arguments
from ..native import rows as as_rows
from .language import cast, dot
from .reduction import row_groups, sum_partials, sum_rows
from .tuning import settings

# Programs that a matrix product should at least have: two for each multiprocessor of an H200.
_PROGRAMS = 264
# To get there, sums over k are split, but not into parts shorter than this.
_SHORTEST_PART = 1024

_A = tl.constexpr(0.7978845608028654)
_B = tl.constexpr(0.044715)


@triton.jit
def _sigmoid_of_gelu(z):
    return 1.0 / (1.0 + tl.exp((z + z * z * z * _B) * (-2.0 * _A)))


@triton.jit
def gelu(z):
    """GELU of float32 values, tanh form."""
    return z * _sigmoid_of_gelu(z)


@triton.jit
def gelu_and_slope(z):
    """GELU of float32 values and its derivative."""
    sigmoid = _sigmoid_of_gelu(z)
    slope = sigmoid + z * sigmoid * (1.0 - sigmoid) * (1.0 + z * z * (3.0 * _B)) * (2.0 * _A)
    return z * sigmoid, slope


@triton.jit
def bias_gelu_forward(
    x,
    bias,
    out,
    rows,
    columns,
    stride,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """GELU of x + bias: a tile of BLOCK_ROWS rows and BLOCK_COLUMNS columns a program."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)[:, None]
    column = tl.program_id(1) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)[None, :]
    mask = (row < rows) & (column < columns)
    shift = tl.load(bias + column, mask=column < columns, other=0.0).to(tl.float32)
    z = tl.load(x + row * stride + column, mask=mask, other=0.0).to(tl.float32) + shift
    tl.store(out + row * columns + column, cast(gelu(z), out.dtype.element_ty), mask=mask)


def bias_gelu(call: Arguments) -> Tensor:
    x, bias = call.x, call.bias
    flat = as_rows(x)
    rows, columns = flat.shape
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    launch = settings("bias_gelu_forward", x.device, columns=columns)
    grid = (triton.cdiv(rows, launch["BLOCK_ROWS"]), triton.cdiv(columns, launch["BLOCK_COLUMNS"]))
    bias_gelu_forward[grid](flat, bias.contiguous(), out, rows, columns, flat.stride(0), **launch)
    return out


@triton.jit
def bias_gelu_gradient(
    grad,
    x,
    bias,
    grad_x,
    partials,
    rows,
    columns,
    group,
    grad_stride,
    x_stride,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """`group` rows and a block of columns a program, which leaves a row of sums in `partials`."""
    program = tl.program_id(1).to(tl.int64)
    column = tl.program_id(0) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)[None, :]
    inside = column < columns
    shift = tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)
    total = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), tl.float32)
    end = tl.minimum((program + 1) * group, rows)
    for start in range(0, group, BLOCK_ROWS):
        row = program * group + start + tl.arange(0, BLOCK_ROWS)[:, None]
        mask = (row < end) & inside
        z = tl.load(x + row * x_stride + column, mask=mask, other=0.0).to(tl.float32) + shift
        grad_z = tl.load(grad + row * grad_stride + column, mask=mask, other=0.0).to(tl.float32)
        _, slope = gelu_and_slope(z)
        grad_z *= slope
        total += grad_z
        out = cast(grad_z, grad_x.dtype.element_ty)
        tl.store(grad_x + row * columns + column, out, mask=mask)
    tl.store(partials + program * columns + column, tl.sum(total, 0, keep_dims=True), mask=inside)


def bias_gelu_backward(call: Arguments) -> tuple[Tensor, Tensor]:
    x, bias = call.x, call.bias
    flat_grad, flat = as_rows(call.grad), as_rows(x)
    rows, columns = flat.shape
    grad_x = torch.empty_like(x, memory_format=torch.contiguous_format)
    launch = settings("bias_gelu_gradient", x.device, columns=columns)
    column_blocks = triton.cdiv(columns, launch["BLOCK_COLUMNS"])
    group, groups = row_groups(rows, launch["BLOCK_ROWS"], column_blocks)
    partials = x.new_empty((groups, columns), dtype=torch.float32)
    bias_gelu_gradient[(column_blocks, groups)](
        flat_grad,
        flat,
        bias.contiguous(),
        grad_x,
        partials,
        rows,
        columns,
        group,
        flat_grad.stride(0),
        flat.stride(0),
        **launch,
    )
    return grad_x, sum_partials(partials, bias.dtype)


@triton.jit
def _finish(
    total, row, first, corner, out, bias, inner, activated, partials, m, n, END: tl.constexpr
):
    """Epilogue of the product in the tile whose columns begin at `first`."""
    M: tl.constexpr = total.shape[0]
    N: tl.constexpr = total.shape[1]
    column = first + tl.arange(0, N)
    mask = (row[:, None] < m) & (column[None, :] < n)
    at = tl.arange(0, M)[:, None] * n + tl.arange(0, N)[None, :]
    if END != "nothing":
        shift = tl.load(bias + column, mask=column < n, other=0.0).to(tl.float32)[None, :]
    if END == "bias":
        total += shift
    if END == "gelu":
        value = gelu(total + shift)
        tl.store(activated + corner + at, cast(value, activated.dtype.element_ty), mask=mask)
    if END == "gelu gradient":
        z = tl.load(inner + corner + at, mask=mask, other=0.0).to(tl.float32) + shift
        value, slope = gelu_and_slope(z)
        tl.store(activated + corner + at, cast(value, activated.dtype.element_ty), mask=mask)
        total *= slope
        tl.store(partials + column, tl.sum(total, 0), mask=column < n)
    tl.store(out + corner + at, cast(total, out.dtype.element_ty), mask=mask)


@triton.jit
def matmul_kernel(
    a,
    b,
    out,
    bias,
    inner,
    activated,
    partials,
    m,
    n,
    k,
    part,
    a_stride_m,
    a_stride_k,
    b_stride_k,
    b_stride_n,
    END: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """out = a @ b, an (BLOCK_M, BLOCK_N) tile a program; inner and activated are contiguous (m, n).

    Each of out's (parts, m, n) sums `part` of the k products.

    END is the epilogue:
    "nothing"
    "bias": bias is added to each row
    "gelu": out is written as it is, and gelu(out + bias) to activated
    "gelu gradient": out is multiplied with GELU's slope at inner + bias, which gives activated as
        well; the tile's column sums go to partials (tiles of rows, n).

    Tiles are taken in bands of GROUP_M rows of tiles, column after column: programs that run at one
    time then read few rows of a and few columns of b, and these stay in the L2 cache.
    """
    program = tl.program_id(0)
    tiles_m = tl.cdiv(m, BLOCK_M)
    tiles_n = tl.cdiv(n, BLOCK_N)
    first = program // (GROUP_M * tiles_n) * GROUP_M
    height = tl.minimum(tiles_m - first, GROUP_M)
    tile_m = first + program % (GROUP_M * tiles_n) % height
    tile_n = program % (GROUP_M * tiles_n) // height

    row = tile_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tile_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    depth = tl.arange(0, BLOCK_K)
    begin = tl.program_id(1).to(tl.int64) * part
    a += begin * a_stride_k + row[:, None] * a_stride_m + depth[None, :] * a_stride_k
    b += begin * b_stride_k + depth[:, None] * b_stride_k + column[None, :] * b_stride_n
    rest = tl.minimum(k - begin, part).to(tl.int32)
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, rest, BLOCK_K):
        mask_a = row[:, None] < m
        mask_b = column[None, :] < n
        if not EVEN_K:
            mask_a &= depth[None, :] < rest - start
            mask_b &= depth[:, None] < rest - start
        total = dot(tl.load(a, mask=mask_a, other=0.0), tl.load(b, mask=mask_b, other=0.0), total)
        a += a_stride_k * BLOCK_K
        b += b_stride_k * BLOCK_K

    corner = tile_m.to(tl.int64) * BLOCK_M * n + tile_n * BLOCK_N
    partials += tile_m.to(tl.int64) * n
    out += tl.program_id(1).to(tl.int64) * m * n
    if END == "gelu gradient":
        # Half a tile at a time: a whole one would need too many registers.
        halves = tl.permute(tl.reshape(total, (BLOCK_M, 2, BLOCK_N // 2)), (0, 2, 1))
        left, right = tl.split(halves)
        _finish(
            left, row, tile_n * BLOCK_N, corner, out, bias, inner, activated, partials, m, n, END
        )
        half = BLOCK_N // 2
        _finish(
            right,
            row,
            tile_n * BLOCK_N + half,
            corner + half,
            out,
            bias,
            inner,
            activated,
            partials,
            m,
            n,
            END,
        )
    else:
        _finish(
            total, row, tile_n * BLOCK_N, corner, out, bias, inner, activated, partials, m, n, END
        )


def _is_unaligned(x: Tensor) -> bool:
    """True if elements of a matrix must be loaded one by one, each at an address of its own."""
    width, stride = (x.shape[1], x.stride(0)) if x.stride(1) == 1 else (x.shape[0], x.stride(1))
    return min(x.stride()) != 1 or any(n % 16 for n in (width, stride, x.data_ptr()))


def _matmul(
    a: Tensor,
    b: Tensor,
    end: str = "nothing",
    bias: Tensor | None = None,
    inner: Tensor | None = None,
    activated: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """a @ b with the epilogue `end`; also the `partials` of `matmul_kernel`."""
    (m, k), n = a.shape, b.shape[1]
    # The epilogue needs registers, too.
    table = "matmul" if end in ("nothing", "bias") else "matmul_gelu"
    unaligned = n % 16 > 0 or _is_unaligned(a) or _is_unaligned(b)
    launch = settings(table, a.device, element_size=a.element_size(), unaligned=unaligned)
    tiles_m, tiles_n = triton.cdiv(m, launch["BLOCK_M"]), triton.cdiv(n, launch["BLOCK_N"])
    # Weight gradients have few tiles and long sums.
    parts = 1
    if end == "nothing":
        parts = max(1, min(_PROGRAMS // (tiles_m * tiles_n), k // _SHORTEST_PART))
    part = triton.cdiv(triton.cdiv(k, launch["BLOCK_K"]), parts) * launch["BLOCK_K"]
    parts = triton.cdiv(k, part)
    out = a.new_empty((parts, m, n), dtype=torch.float32 if parts > 1 else a.dtype)
    partials = a.new_empty((tiles_m if end == "gelu gradient" else 0, n), dtype=torch.float32)
    matmul_kernel[(tiles_m * tiles_n, parts)](
        a,
        b,
        out,
        bias,
        inner,
        activated,
        partials,
        m,
        n,
        k,
        part,
        *a.stride(),
        *b.stride(),
        END=end,
        EVEN_K=k % launch["BLOCK_K"] == 0,
        **launch,
    )
    if parts > 1:
        return sum_partials(out.view(parts, -1), a.dtype).view(m, n), partials
    return out[0], partials


def gelu_mlp(call: Arguments) -> tuple[Tensor, Tensor]:
    x, w_fc, b_fc = call.x, call.w_fc, call.b_fc
    flat = as_rows(x)
    activated = x.new_empty((len(flat), w_fc.shape[1]))
    inner, _ = _matmul(flat, w_fc, "gelu", b_fc.contiguous(), activated=activated)
    out, _ = _matmul(activated, call.w_proj, "bias", call.b_proj.contiguous())
    if call.keep == "sum":
        inner += b_fc
    elif call.keep == "nothing":
        inner = inner.new_empty((0, inner.shape[1]))
    return out.view(*x.shape[:-1], -1), inner


def gelu_mlp_backward(call: Arguments) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    x, b_fc = call.x, call.b_fc
    grad, flat, inner = as_rows(call.grad), as_rows(x), call.inner.contiguous()
    bias = torch.zeros_like(b_fc) if call.kept == "sum" else b_fc.contiguous()
    activated = torch.empty_like(inner)
    grad_inner, partials = _matmul(grad, call.w_proj.t(), "gelu gradient", bias, inner, activated)
    grad_x, _ = _matmul(grad_inner, call.w_fc.t())
    grad_w_fc, _ = _matmul(flat.t(), grad_inner)
    grad_w_proj, _ = _matmul(activated.t(), grad)
    return (
        grad_x.view(x.shape),
        grad_w_fc,
        sum_partials(partials, b_fc.dtype),
        grad_w_proj,
        sum_rows(grad, grad.dtype),
    )
