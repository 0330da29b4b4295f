"""Output projection and cross-entropy in Triton: a chunk of logits becomes losses and gradient.

Bytes of a logit in bfloat16: 2 read twice and 2 written. The second time, a row (100 kB of GPT-2's
vocabulary) comes from the L2 cache: memory sees 2 read and 2 written. Not yet run on a GPU.

The matrix products around it are cuBLAS's: nothing can be fused into them. The first would have to
end with the softmax of whole rows, but a program holds one tile of a row, and the gradient needs
the sum over all of them.

Rows of logits begin at multiples of `_ALIGNMENT` elements, for cuBLAS's fastest kernels and for
wide loads here, which take the room between two rows along: of GPT-2's 50257 columns, every other
row would begin at an odd address.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..backend import Arguments
from ..cross_entropy import _chunked, _count
from .language import cast
from .tuning import settings

_ALIGNMENT = tl.constexpr(64)


@triton.jit
def cross_entropy_kernel(
    logits,
    targets,
    losses,
    count,
    rows,
    columns,
    stride,
    ignore_index,
    GRADIENT: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """Losses of BLOCK_ROWS rows; GRADIENT: (softmax - one-hot) / count in place of the logits.

    Rows have room for a multiple of _ALIGNMENT columns. Rows whose target is ignored are not read.
    The greatest logit and the sum of exponentials are kept in float32 while the row goes by,
    BLOCK_COLUMNS at a time.
    """
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)[:, None]
    target = tl.load(targets + row, mask=row < rows, other=ignore_index)
    counted = (row < rows) & (target != ignore_index)
    logits += row * stride
    known = counted & (target >= 0) & (target < columns)
    picked = tl.load(logits + target, mask=known, other=0.0).to(tl.float32)
    room = tl.cdiv(columns, _ALIGNMENT) * _ALIGNMENT
    greatest = tl.full((BLOCK_ROWS, 1), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_ROWS, 1), tl.float32)
    for start in range(0, columns, BLOCK_COLUMNS):
        column = start + tl.arange(0, BLOCK_COLUMNS)[None, :]
        logit = tl.load(logits + column, mask=counted & (column < room), other=0.0).to(tl.float32)
        logit = tl.where(counted & (column < columns), logit, float("-inf"))
        greater = tl.maximum(greatest, tl.max(logit, 1, keep_dims=True))
        # -inf minus itself is NaN
        base = tl.where(greater == float("-inf"), 0.0, greater)
        total = total * tl.exp(greatest - base) + tl.sum(tl.exp(logit - base), 1, keep_dims=True)
        greatest = greater
    lse = greatest + tl.log(total)
    tl.store(losses + row, tl.where(counted, lse - picked, 0.0), mask=row < rows)
    if GRADIENT:
        scale = 1.0 / tl.maximum(tl.load(count), 1).to(tl.float32)
        for start in range(0, columns, BLOCK_COLUMNS):
            column = start + tl.arange(0, BLOCK_COLUMNS)[None, :]
            mask = counted & (column < room)
            logit = tl.load(logits + column, mask=mask, other=0.0).to(tl.float32)
            grad = (tl.exp(logit - lse) - (column == target).to(tl.float32)) * scale
            grad = cast(tl.where(counted, grad, 0.0), logits.dtype.element_ty)
            tl.store(logits + column, grad, mask=(row < rows) & (column < room))


def forward(call: Arguments) -> tuple[Tensor, Tensor, Tensor]:
    targets, ignore_index, vocab_size = call.targets, call.ignore_index, len(call.weight)
    known = ((targets >= 0) & (targets < vocab_size)) | (targets == ignore_index)
    # On a GPU this assertion fails on the device, as in torch's loss: no wait for the result.
    torch._assert_async(known.all(), f"a target is outside of the {vocab_size} classes")
    count = _count(call)  # stays on the device

    def turn(logits: Tensor, targets: Tensor, losses: Tensor) -> Tensor:
        width = triton.next_power_of_2(vocab_size)
        launch = settings("cross_entropy", logits.device, columns=width)
        cross_entropy_kernel[(triton.cdiv(len(logits), launch["BLOCK_ROWS"]),)](
            logits,
            targets.contiguous(),
            losses,
            count,
            *logits.shape,
            logits.stride(0),
            ignore_index,
            GRADIENT=call.hidden_grad or call.weight_grad,
            **launch,
        )
        return logits

    losses, grad_hidden, grad_weight = _chunked(turn, Tensor.add_, call, alignment=_ALIGNMENT.value)
    return losses.sum() / count, grad_hidden, grad_weight
