"""AdamW over many tensors in Triton: a launch for every `_TENSORS` tensors of the same dtypes.

Bytes of a parameter in float32: 16 read (parameter, gradient, two moments), 12 written; in bfloat16
8 and 6, or 14 and 14 over float32 moments and masters. Memory is the floor. Not yet run on a GPU.

A program takes `CHUNK` elements of one tensor. Addresses and sizes are arguments of the launch, so
there is no table to copy to the device or to keep alive, and a CUDA graph captures the call; a
program finds its tensor by counting chunks.
"""

from __future__ import annotations

from collections import defaultdict

import triton
import triton.language as tl
from torch import Tensor

from ..backend import Arguments
from .language import cast
from .tuning import settings

_TENSORS = 32
# Most elements of a tensor in one launch; 2 n + 3 of them has to be below 2^31.
_LONGEST = 1 << 29


@triton.jit
def adamw_kernel(
    parameters,
    grads,
    exp_avgs,
    exp_avg_sqs,
    masters,
    sizes,
    decay,
    beta1,
    beta2,
    rest1,
    rest2,
    step_size,
    correction2,
    eps,
    ALIGNED: tl.constexpr,
    MASTERS: tl.constexpr,
    TENSORS: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Update CHUNK elements of one of TENSORS tensors a program, BLOCK at a time.

    Args:
        parameters (Triton's launcher has a `params` of its own), grads, exp_avgs, exp_avg_sqs,
            sizes: tuples. A size n is passed as 2 n + 3, because Triton compiles a kernel anew
            where a number is 1 or a multiple of 16.
        decay, rest1, rest2: 1 - lr * weight_decay, 1 - beta1, 1 - beta2.
        step_size, correction2: lr / (1 - beta1^step), 1 / (1 - beta2^step).
        ALIGNED: addresses and sizes are multiples of 16.
        MASTERS: the masters are updated, and the parameters are their rounded copies.
    """
    program = tl.program_id(0)
    param, grad, exp_avg, exp_avg_sq = parameters[0], grads[0], exp_avgs[0], exp_avg_sqs[0]
    master = masters[0]
    size = (sizes[0] - 3) // 2
    first = 0
    begin = tl.cdiv(size, CHUNK)
    for i in tl.static_range(1, TENSORS):
        reached = program >= begin
        elements = (sizes[i] - 3) // 2
        param = tl.where(reached, parameters[i], param)
        grad = tl.where(reached, grads[i], grad)
        exp_avg = tl.where(reached, exp_avgs[i], exp_avg)
        exp_avg_sq = tl.where(reached, exp_avg_sqs[i], exp_avg_sq)
        master = tl.where(reached, masters[i], master)
        size = tl.where(reached, elements, size)
        first = tl.where(reached, begin, first)
        begin += tl.cdiv(elements, CHUNK)
    if ALIGNED:
        size = tl.multiple_of(size, 16)
    for start in range(0, CHUNK, BLOCK):
        at = (program - first) * CHUNK + start + tl.arange(0, BLOCK)
        mask = at < size
        if MASTERS:
            p = tl.load(master + at, mask=mask, other=0.0)
        else:
            p = tl.load(param + at, mask=mask, other=0.0).to(tl.float32)
        g = tl.load(grad + at, mask=mask, other=0.0).to(tl.float32)
        m = tl.load(exp_avg + at, mask=mask, other=0.0).to(tl.float32)
        v = tl.load(exp_avg_sq + at, mask=mask, other=0.0).to(tl.float32)
        m = beta1 * m + rest1 * g
        v = beta2 * v + rest2 * g * g
        p = decay * p - step_size * m / (tl.sqrt(v * correction2) + eps)
        if MASTERS:
            tl.store(master + at, p, mask=mask)
        tl.store(param + at, cast(p, param.dtype.element_ty), mask=mask)
        tl.store(exp_avg + at, cast(m, exp_avg.dtype.element_ty), mask=mask)
        tl.store(exp_avg_sq + at, cast(v, exp_avg_sq.dtype.element_ty), mask=mask)


def adamw(call: Arguments) -> None:
    beta1, beta2 = call.beta1, call.beta2
    scalars = (
        1.0 - call.lr * call.weight_decay,
        beta1,
        beta2,
        1.0 - beta1,
        1.0 - beta2,
        call.lr / (1.0 - beta1**call.step),
        1.0 / (1.0 - beta2**call.step),
        call.eps,
    )
    alike = defaultdict(list)
    updated = call.masters or call.params
    for tensors in zip(
        call.params, call.grads, call.exp_avgs, call.exp_avg_sqs, updated, strict=True
    ):
        pieces = [tensor.contiguous().view(-1).split(_LONGEST) for tensor in tensors]
        for piece in zip(*pieces, strict=True):
            size = piece[0].numel()
            aligned = size % 16 == 0 and all(tensor.data_ptr() % 16 == 0 for tensor in piece)
            if size:
                alike[(aligned, *(tensor.dtype for tensor in piece))].append(piece)
    for (aligned, *_), pieces in alike.items():
        # Triton compiles a kernel for each pattern of aligned and unaligned tensors. Unaligned
        # ones go one at a time, so that there are few patterns.
        most = _TENSORS if aligned else 1
        for i in range(0, len(pieces), most):
            _launch(pieces[i : i + most], scalars, aligned, bool(call.masters))


def _launch(
    pieces: list[tuple[Tensor, ...]], scalars: tuple[float, ...], aligned: bool, masters: bool
) -> None:
    launch = settings("adamw", pieces[0][0].device)
    sizes = [piece[0].numel() for piece in pieces]
    programs = sum(triton.cdiv(size, launch["CHUNK"]) for size in sizes)
    # Few lengths of groups, for the same reason: empty tensors fill them up.
    tensors = triton.next_power_of_2(len(pieces))
    pieces = pieces + [pieces[0]] * (tensors - len(pieces))
    sizes += [0] * (tensors - len(sizes))
    adamw_kernel[(programs,)](
        *zip(*pieces, strict=True),
        tuple(2 * size + 3 for size in sizes),
        *scalars,
        ALIGNED=aligned,
        MASTERS=masters,
        TENSORS=tensors,
        **launch,
    )
