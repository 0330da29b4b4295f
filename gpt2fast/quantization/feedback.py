"""Rounding that makes up for itself: GPTQ (Frantar et al., 2022) with searched scales.

A matrix serves its outputs, so what counts is not the error of a weight, but

    sum over n of  e[:, n]^T H e[:, n],      e = weight - dequantized,  H = X^T X / rows

with X the inputs that the matrix really gets. The rows of the matrix are rounded one after the
other, and what a row misses is made up for by those still to come, as far as they can:

    U = chol(H^-1)^T         err = (w[k] - round(w[k])) / U[k, k]         w[j] -= U[k, j] * err

Then the sum of err^2 is the error above. That is also how a scale is chosen: every group of inputs
is rounded under each of some candidates, with feedback inside the group, and a column keeps the one
with the smallest sum. Candidates put the group's largest weight at either end of the range and
beyond it; a scale may be negative, because 4 bits reach further down (-8) than up (7).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import WeightsError
from ..ops.packed import QuantizedMatrix
from .rounding import RANGE, inverse, stored

DAMPING = 0.1
"""Added to H's diagonal, as a share of its mean: the calibration has not seen every input. (The
paper's 0.01 is for 256,000 tokens; with 4,096 this mostly did better, by little more than the
choice of the seed changes.)"""

# Columns worked on at once: a group of them, under all candidates, stays in the processor's cache.
_COLUMNS = 1024
# The largest weight of a group, as a share of the end of the range it is put at.
_SHARES = {4: (1.1, 1.0, 0.93, 0.87, 0.81, 0.75, 0.68, 0.6), 8: (1.0,)}


def round_with_feedback(weight: Tensor, hessian: Tensor, bits: int, group: int) -> QuantizedMatrix:
    """Round a matrix so that its outputs suffer least.

    Args:
        weight: (K, N), any floating-point dtype.
        hessian: (K, K) float32, X^T X over rows of inputs X, up to a factor.
        bits: 8 or 4.
        group: inputs that share a scale.
    """
    inputs, outputs = weight.shape
    factor = _factor(hessian)
    q = torch.empty(inputs, outputs, dtype=torch.int8)
    scales = torch.empty(-(-inputs // group), outputs, dtype=torch.float16)
    for begin in range(0, outputs, _COLUMNS):
        columns = slice(begin, begin + _COLUMNS)
        rest = weight[:, columns].detach().float().contiguous()
        for index, first in enumerate(range(0, inputs, group)):
            last = min(first + group, inputs)
            corner = factor[first:last, first:last]
            chosen = _best_scales(rest[first:last], corner, bits)
            q[first:last, columns], missed = _round_group(rest[first:last], chosen, corner, bits)
            scales[index, columns] = chosen.half()
            rest[last:].addmm_(factor[first:last, last:].t(), missed, alpha=-1)
    return QuantizedMatrix(q, scales, bits, group)


def _factor(hessian: Tensor) -> Tensor:
    """U, upper triangular, with U^T U = H^-1 of the damped H."""
    diagonal = hessian.diagonal()
    mean = float(diagonal.mean())
    if not 0 <= mean < float("inf"):
        raise WeightsError(
            "the weights cannot be quantized: the calibration gave activations that are not "
            "finite; look for what is wrong with the model, or use method='nearest'"
        )
    damping = DAMPING * mean or 1.0
    while True:
        damped = hessian + torch.diag(torch.full_like(diagonal, damping))
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not failed:
                return upper
        damping *= 10  # far from singular in the end


def _best_scales(group: Tensor, corner: Tensor, bits: int) -> Tensor:
    """(n,) scale of each column of `group` (g, n)."""
    low, high = RANGE[bits]
    top = group.gather(0, group.abs().argmax(0, keepdim=True))[0]
    ends = (low, high) if bits == 4 else (high,)
    shares = torch.tensor([share / end for end in ends for share in _SHARES[bits]])
    candidates = stored(shares[:, None] * top)
    if len(candidates) == 1:
        return candidates[0]
    tried = group.repeat(1, len(candidates))
    _, missed = _round_group(tried, candidates.flatten(), corner, bits)
    losses = missed.square_().sum(0).view(candidates.shape)
    return candidates.gather(0, losses.argmin(0, keepdim=True))[0]


def _round_group(group: Tensor, scales: Tensor, corner: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """(g, n) integers, and what each row has missed, in units of `corner`'s diagonal."""
    rest, missed, q = group.clone(), torch.empty_like(group), torch.empty_like(group)
    inverses = inverse(scales)
    low, high = RANGE[bits]
    for row in range(len(group)):
        torch.mul(rest[row], inverses, out=q[row]).round_().clamp_(low, high)
        torch.addcmul(rest[row], q[row], scales, value=-1, out=missed[row])
        missed[row] /= corner[row, row]
        rest[row + 1 :].addr_(corner[row, row + 1 :], missed[row], alpha=-1)
    return q, missed
