"""Choosing the next token from logits in Triton: one program a row, nothing waits for the device.

top-k and top-p need no sort: both keep the scores from some threshold on. Scores are ordered as
integers (IEEE 754 puts floats and their bits in the same order), and the threshold is found by
bisection, in which sums, of tokens or of their probabilities, decide: about 20 passes over a row of
50257 scores, at most 32. The row, 201 kB in float32, comes from memory once and then from the
multiprocessor's L1 or the L2. Floor: one read of the logits.

Not yet run on a GPU.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..backend import Arguments
from .tuning import settings


@triton.jit
def _order(scores):
    """Integers in the order of float32 scores, -0 and 0 alike; NaN comes last."""
    bits = (scores + 0.0).to(tl.int32, bitcast=True)
    order = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return tl.where(scores == scores, order, 0x7FFFFFFF)


@triton.jit
def _scores(row, stride, first, vocab_size, temperature, BLOCK: tl.constexpr):
    tokens = first + tl.arange(0, BLOCK)
    scores = tl.load(
        row + tokens.to(tl.int64) * stride, mask=tokens < vocab_size, other=-float("inf")
    )
    return tokens, tl.div_rn(scores.to(tl.float32), temperature)


@triton.jit
def penalize_kernel(
    logits, history, token_mask, scores,
    logits_stride_b, logits_stride_v, history_stride_b, history_stride_t,
    mask_stride_b, mask_stride_w,
    vocab_size, length, penalty, size,
    MASKED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A row's logits in float32, with repeated tokens penalized and repeated n-grams banned.

    MASKED: tokens whose bits of `token_mask` are not set are banned, too.
    """
    b = tl.program_id(0).to(tl.int64)
    logits += b * logits_stride_b
    history += b * history_stride_b
    scores += b * vocab_size
    for first in range(0, vocab_size, BLOCK):
        tokens, values = _scores(logits, logits_stride_v, first, vocab_size, 1.0, BLOCK)
        tl.store(scores + tokens, values, mask=tokens < vocab_size)
    tl.debug_barrier()  # the same scores are now written by other threads
    if penalty != 1.0:
        for first in range(0, length, BLOCK):
            place = first + tl.arange(0, BLOCK)
            token = tl.load(history + place * history_stride_t, mask=place < length, other=-1)
            known = (token >= 0) & (token < vocab_size)
            value = tl.load(logits + token * logits_stride_v, mask=known, other=0.0).to(tl.float32)
            value = tl.where(value < 0, value * penalty, tl.div_rn(value, penalty))
            tl.store(scores + token, value, mask=known)
        tl.debug_barrier()
    if size > 0:
        for first in range(0, length - size + 1, BLOCK):
            place = first + tl.arange(0, BLOCK)
            repeats = place <= length - size
            for i in range(0, size - 1):
                at = history + (place + i) * history_stride_t
                suffix = tl.load(history + (length - size + 1 + i) * history_stride_t)
                repeats = repeats & (tl.load(at, mask=repeats, other=-2) == suffix)
            at = history + (place + size - 1) * history_stride_t
            token = tl.load(at, mask=repeats, other=-1)
            known = (token >= 0) & (token < vocab_size)
            tl.store(scores + token, tl.full((BLOCK,), -float("inf"), tl.float32), mask=known)
    if MASKED:
        tl.debug_barrier()
        token_mask += b * mask_stride_b
        for first in range(0, vocab_size, BLOCK):
            tokens = first + tl.arange(0, BLOCK)
            within = tokens < vocab_size
            words = tl.load(token_mask + tokens // 32 * mask_stride_w, mask=within, other=-1)
            banned = within & (((words >> (tokens % 32)) & 1) == 0)
            tl.store(scores + tokens, tl.full((BLOCK,), -float("inf"), tl.float32), mask=banned)


@triton.jit
def greedy_kernel(scores, chosen, stride_b, stride_v, vocab_size, BLOCK: tl.constexpr):
    """Choose the token with the highest score, the first of equal ones."""
    b = tl.program_id(0).to(tl.int64)
    scores += b * stride_b
    highest = tl.full((), -0x80000000, tl.int32)
    best = tl.zeros((), tl.int32)
    for first in range(0, vocab_size, BLOCK):
        tokens, values = _scores(scores, stride_v, first, vocab_size, 1.0, BLOCK)
        order = tl.where(tokens < vocab_size, _order(values), -0x80000000)
        top = tl.max(order, 0)
        place = tl.min(tl.where(order == top, tokens, 0x7FFFFFFF), 0)
        best = tl.where(top > highest, place, best)
        highest = tl.maximum(top, highest)
    tl.store(chosen + b, best.to(tl.int64))


@triton.jit
def _middle(low, high):
    """The mean of two integers of which low < high, rounded down, without overflow."""
    return (low & high) + ((low ^ high) >> 1)


@triton.jit
def _split(scores, stride, vocab_size, temperature, highest, lowest, middle, BLOCK: tl.constexpr):
    """Facts about both sides of the score `middle`: the number of scores above it, the sum of the
    weights from `lowest` to it, the nearest score up to it, the nearest above it."""
    count = tl.zeros((), tl.int32)
    mass = tl.zeros((), tl.float64)
    below = tl.full((), -0x80000000, tl.int32)
    above = tl.full((), 0x7FFFFFFF, tl.int32)
    for first in range(0, vocab_size, BLOCK):
        values = _scores(scores, stride, first, vocab_size, temperature, BLOCK)[1]
        order = _order(values)
        higher = order > middle
        weights = tl.where((order >= lowest) & (order <= middle), tl.exp(values - highest), 0.0)
        count += tl.sum(higher.to(tl.int32), 0)
        mass += tl.sum(weights, 0)
        below = tl.maximum(below, tl.max(tl.where(higher, -0x80000000, order), 0))
        above = tl.minimum(above, tl.min(tl.where(higher, order, 0x7FFFFFFF), 0))
    return count, mass, below, above


@triton.jit
def _search(
    scores, stride, vocab_size, temperature, highest, lowest, high, target,
    WEIGHED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Bisection from `lowest` to `high`, two scores of the row.

    Returns the lowest score with a mass of more than `target` from `lowest` up to it, or else the
    highest score if no other will do; not WEIGHED: the highest with fewer than `target` above it.
    """
    low = lowest
    while low < high:
        middle = _middle(low, high)
        count, mass, below, above = _split(
            scores, stride, vocab_size, temperature, highest, lowest, middle, BLOCK
        )
        up = mass <= target if WEIGHED else count >= target
        # Move the bounds to scores that the row has, so that few steps suffice.
        low = tl.where(up, above, low)
        high = tl.where(up, high, below)
    return low


@triton.jit
def draw_kernel(
    scores, uniform, chosen, stride_b, stride_v, uniform_stride, vocab_size,
    temperature, top_k, top_p, min_p, typical_p, BLOCK: tl.constexpr,
):  # fmt: skip
    """Draw one token a row, in five steps, each of which narrows down the tokens that stay.

    A token stays if its score is above `lowest`, or equal to it with an id of at least
    `first_kept`, its weight exp(score - highest) is at least min_p, and the score is at most
    `farthest` from the expected one.
    """
    b = tl.program_id(0).to(tl.int64)
    scores += b * stride_b
    lowest_order = tl.full((), 0x7FFFFFFF, tl.int32)
    highest_order = tl.full((), -0x80000000, tl.int32)
    highest = tl.full((), -float("inf"), tl.float32)
    for first in range(0, vocab_size, BLOCK):
        tokens, values = _scores(scores, stride_v, first, vocab_size, temperature, BLOCK)
        order = _order(values)
        # Banned tokens are below any threshold.
        allowed = (tokens < vocab_size) & (values != -float("inf"))
        low = tl.min(tl.where(allowed, order, 0x7FFFFFFF), 0)
        lowest_order = tl.minimum(lowest_order, low)
        highest_order = tl.maximum(highest_order, tl.max(order, 0))
        highest = tl.maximum(highest, tl.max(values, 0))
    # All banned, or an infinity or NaN among the scores: there are no probabilities.
    lawful = (highest_order < 0x7F800000) & (highest != -float("inf"))
    if not lawful:
        tl.store(chosen + b, tl.zeros((), tl.int64))
        return
    lowest = lowest_order
    if top_k > 0:
        # The highest score with fewer than top_k above it.
        lowest = _search(
            scores, stride_v, vocab_size, temperature, highest, lowest, highest_order,
            tl.cast(top_k, tl.float64), False, BLOCK,
        )  # fmt: skip
    first_kept = tl.zeros((), tl.int32)
    if top_p < 1.0:
        total = _split(
            scores, stride_v, vocab_size, temperature, highest, lowest, highest_order, BLOCK
        )[1]
        outside = total * (1.0 - top_p)
        # The lowest score with more than 1 - top_p of the mass at or below it.
        low = _search(
            scores, stride_v, vocab_size, temperature, highest, lowest, highest_order,
            outside, True, BLOCK,
        )  # fmt: skip
        # Among tokens with exactly this score, those of low ids may still be outside.
        below = tl.zeros((), tl.float64)
        if low > lowest:
            below = _split(
                scores, stride_v, vocab_size, temperature, highest, lowest, low - 1, BLOCK
            )[1]
        lowest = low
        equal = tl.zeros((), tl.int32)
        weight = tl.zeros((), tl.float32)
        for first in range(0, vocab_size, BLOCK):
            values = _scores(scores, stride_v, first, vocab_size, temperature, BLOCK)[1]
            at = _order(values) == lowest
            equal += tl.sum(at.to(tl.int32), 0)
            weight = tl.maximum(weight, tl.max(tl.where(at, tl.exp(values - highest), 0.0), 0))
        left_out = tl.floor((outside - below) / tl.maximum(weight, 1e-45).to(tl.float64))
        left_out = tl.minimum(left_out, (equal - 1).to(tl.float64)).to(tl.int32)
        passed = tl.zeros((), tl.int32)
        for first in range(0, vocab_size, BLOCK):
            tokens, values = _scores(scores, stride_v, first, vocab_size, temperature, BLOCK)
            at = (_order(values) == lowest).to(tl.int32)
            rank = passed + tl.cumsum(at, 0)
            last = tl.max(tl.where((at == 1) & (rank <= left_out), tokens + 1, 0), 0)
            first_kept = tl.maximum(first_kept, last)
            passed += tl.sum(at, 0)
    expected = tl.zeros((), tl.float32)
    farthest = tl.full((), float("inf"), tl.float32)
    if typical_p < 1.0:
        sum = tl.zeros((), tl.float64)
        moment = tl.zeros((), tl.float64)
        for first in range(0, vocab_size, BLOCK):
            tokens, values = _scores(scores, stride_v, first, vocab_size, temperature, BLOCK)
            weights = _kept_weights(
                tokens, values, highest, lowest, first_kept, min_p, expected, farthest
            )
            sum += tl.sum(weights, 0)
            moment += tl.sum(tl.where(weights > 0, weights * (values - highest), 0.0), 0)
        expected = highest + (moment / sum).to(tl.float32)
        # The lowest distance up to which the mass reaches typical_p, by bisection of its bits.
        low = tl.zeros((), tl.int32)
        high = tl.full((), 0x7F800000, tl.int32)
        while low < high:
            middle = low + (high - low) // 2
            limit = middle.to(tl.float32, bitcast=True)
            mass = tl.zeros((), tl.float64)
            for first in range(0, vocab_size, BLOCK):
                tokens, values = _scores(scores, stride_v, first, vocab_size, temperature, BLOCK)
                weights = _kept_weights(
                    tokens, values, highest, lowest, first_kept, min_p, expected, limit
                )
                mass += tl.sum(weights, 0)
            reaches = mass >= sum * typical_p
            high = tl.where(reaches, middle, high)
            low = tl.where(reaches, low, middle + 1)
        farthest = low.to(tl.float32, bitcast=True)
    total = tl.zeros((), tl.float64)
    for first in range(0, vocab_size, BLOCK):
        tokens, values = _scores(scores, stride_v, first, vocab_size, temperature, BLOCK)
        weights = _kept_weights(
            tokens, values, highest, lowest, first_kept, min_p, expected, farthest
        )
        total += tl.sum(weights, 0)
    target = tl.load(uniform + b * uniform_stride).to(tl.float64) * total
    before = tl.zeros((), tl.float64)
    token = tl.full((), -1, tl.int32)
    for first in range(0, vocab_size, BLOCK):
        tokens, values = _scores(scores, stride_v, first, vocab_size, temperature, BLOCK)
        weights = _kept_weights(
            tokens, values, highest, lowest, first_kept, min_p, expected, farthest
        )
        mass = tl.sum(weights, 0)
        if (token < 0) & (before + mass > target):
            cumulative = before + tl.cumsum(weights, 0)
            reached = (cumulative > target) & (weights > 0)
            found = tl.min(tl.where(reached, tokens, 0x7FFFFFFF), 0)
            # The two sums may round differently at the block's end.
            last = tl.max(tl.where(weights > 0, tokens, -1), 0)
            token = tl.minimum(found, last)
        before += mass
    tl.store(chosen + b, token.to(tl.int64))


@triton.jit
def _kept_weights(tokens, values, highest, lowest, first_kept, min_p, expected, farthest):
    order = _order(values)
    weights = tl.exp(values - highest)
    kept = (order > lowest) | ((order == lowest) & (tokens >= first_kept))
    typical = tl.abs(values - expected) <= farthest
    return tl.where(kept & typical & (weights >= min_p), weights, 0.0)


def sample(call: Arguments) -> Tensor:
    logits, history, uniform, token_mask = call.logits, call.history, call.uniform, call.token_mask
    rows, vocab_size = logits.shape
    launch = settings("sample", logits.device, vocab_size=vocab_size)
    scores = logits
    size = call.no_repeat_ngram_size if call.no_repeat_ngram_size <= history.shape[1] else 0
    if call.repetition_penalty != 1.0 or size > 0 or token_mask is not None:
        scores = logits.new_empty((rows, vocab_size), dtype=torch.float32)
        penalize_kernel[(rows,)](
            logits, history, token_mask, scores, *logits.stride(), *history.stride(),
            *((0, 0) if token_mask is None else token_mask.stride()),
            vocab_size, history.shape[1], call.repetition_penalty, size,
            MASKED=token_mask is not None, **settings("penalize", logits.device),
        )  # fmt: skip
    chosen = logits.new_empty(rows, dtype=torch.int64)
    if uniform is None:
        greedy_kernel[(rows,)](scores, chosen, *scores.stride(), vocab_size, **launch)
    else:
        draw_kernel[(rows,)](
            scores, uniform, chosen, *scores.stride(), uniform.stride(0), vocab_size,
            call.temperature, min(call.top_k, vocab_size), call.top_p, call.min_p,
            call.typical_p, **launch,
        )  # fmt: skip
    return chosen
