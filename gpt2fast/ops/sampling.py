"""Choosing the next token from logits: processors in transformers' order, then a draw.

    scores = penalties(allowed logits, history) -> temperature -> top-k -> top-p -> min-p
             -> typical-p
    token  = the first whose cumulative probability exceeds uniform * total, in vocabulary order

The draw inverts the cumulative distribution, so a token depends on its own row and its own uniform
number alone: not on the batch around it, the device's generator, or the order of the calls.
Temperature: Ackley et al., 1985; top-k: Fan et al., 2018; repetition penalty: Keskar et al., 2019;
top-p: Holtzman et al., 2020; min-p: Nguyen et al., 2024;
typical-p: Meister et al., 2022, equation 10; n-gram blocking: Paulus et al., 2018.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from operator import attrgetter
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..errors import ArgumentError
from ..sampling import PROCESSORS, SCHEMA, processor_arguments
from .backend import Arguments, Op
from .cuda import by_device, cuda, kernels
from .native import native
from .requirements import (
    check_above,
    check_at_least,
    check_dim,
    check_floating,
    check_fractions,
    check_integers,
    check_shape,
    check_share,
)
from .support import Tensors
from .triton import triton

_Function = TypeVar("_Function", bound=Callable[..., Any])


def names_processors(function: _Function) -> _Function:
    """Let `help` and editors name the processors, which `function` takes as `**processors`."""
    signature = inspect.signature(function)
    parameters = list(signature.parameters.values())[:-1]
    for name, option in PROCESSORS.items():
        kind, annotation = inspect.Parameter.KEYWORD_ONLY, option.kind.__name__
        parameters.append(
            inspect.Parameter(name, kind, default=option.neutral, annotation=annotation)
        )
    vars(function)["__signature__"] = signature.replace(parameters=parameters)
    if function.__doc__ is not None:  # not under python -OO
        function.__doc__ = function.__doc__.replace("processors: ", f"{', '.join(PROCESSORS)}: ")
    return function


def ban_masked(scores: Tensor, token_mask: Tensor) -> Tensor:
    """Ban every token whose bit is not set; `sample` describes the mask."""
    token = torch.arange(scores.shape[-1], device=scores.device)
    allowed = token_mask[:, token // 32] >> (token % 32).to(token_mask.dtype) & 1
    return scores.masked_fill(allowed == 0, -math.inf)


def penalize_repetition(scores: Tensor, history: Tensor, penalty: float) -> Tensor:
    """Divide the positive and multiply the negative scores of tokens in `history` by `penalty`."""
    penalized = torch.where(scores < 0, scores * penalty, scores / penalty)
    return torch.where(_present(scores, history), penalized, scores)


def ban_repeated_ngrams(scores: Tensor, history: Tensor, size: int) -> Tensor:
    """Ban every token that would complete an n-gram of `size` tokens that `history` holds."""
    if history.shape[1] < size:
        return scores
    windows = history.unfold(1, size, 1)
    suffix = history[:, history.shape[1] - size + 1 :]
    repeats = (windows[..., :-1] == suffix[:, None]).all(-1)
    banned = _present(scores, windows[..., -1].where(repeats, -1))
    return scores.masked_fill(banned, -math.inf)


def scale_temperature(scores: Tensor, temperature: float) -> Tensor:
    """Divide by `temperature` (> 0): below 1 sharpens the distribution, above 1 flattens it."""
    return scores / temperature


def keep_top_k(scores: Tensor, k: int) -> Tensor:
    """Ban all but the `k` highest scores of each row; scores equal to the k-th stay as well."""
    kth = scores.topk(min(k, scores.shape[-1])).values[..., -1:]
    return scores.masked_fill(scores < kth, -math.inf)


def keep_top_p(scores: Tensor, p: float) -> Tensor:
    """Keep the smallest set of likeliest tokens with a total probability of `p`, at least one.

    Of equal scores at the edge of the set, those of lower token ids are left out first.
    """
    ascending, order = scores.sort(dim=-1, stable=True)
    outside = ascending.softmax(-1).cumsum(-1) <= 1 - p
    outside[..., -1] = False
    return scores.masked_fill(outside.scatter(-1, order, outside), -math.inf)


def keep_min_p(scores: Tensor, p: float) -> Tensor:
    """Ban the tokens less likely than `p` times the likeliest one."""
    probabilities = scores.softmax(-1)
    limit = p * probabilities.amax(-1, keepdim=True)
    return scores.masked_fill(probabilities < limit, -math.inf)


def keep_typical_p(scores: Tensor, p: float) -> Tensor:
    """Keep the fewest tokens of a total probability of `p` whose surprise is near its expectation.

    A token's surprise is -log(probability), and its expectation the entropy. Their distance equals
    that of the token's score from the expected score.
    """
    probabilities = scores.softmax(-1)
    parts = (probabilities * scores).masked_fill(probabilities == 0, 0.0)  # not 0 * -inf
    expected = parts.sum(-1, keepdim=True)
    distances = (scores - expected).abs()
    ascending, order = distances.sort(-1)
    nearer = (probabilities.gather(-1, order).cumsum(-1) < p).sum(-1, keepdim=True)
    farthest = ascending.gather(-1, nearer.clamp(max=scores.shape[-1] - 1))
    return scores.masked_fill(distances > farthest, -math.inf)


def process(
    scores: Tensor,
    history: Tensor,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    typical_p: float = 1.0,
    repetition_penalty: float = 1.0,
    no_repeat_ngram_size: int = 0,
) -> Tensor:
    """Apply all processors in transformers' order; `SamplingOptions` explains them.

    Each default switches its processor off, and is its neutral value there.

    Args:
        scores: (B, V) float32.
        history: (B, S) int64, each row's tokens up to the last column; -1 is padding before them.

    Returns:
        (B, V) float32; -inf marks a banned token.
    """
    if repetition_penalty != 1.0:
        scores = penalize_repetition(scores, history, repetition_penalty)
    if no_repeat_ngram_size > 0:
        scores = ban_repeated_ngrams(scores, history, no_repeat_ngram_size)
    if temperature != 1.0:
        scores = scale_temperature(scores, temperature)
    if top_k > 0:
        scores = keep_top_k(scores, top_k)
    if top_p < 1.0:
        scores = keep_top_p(scores, top_p)
    if min_p > 0.0:
        scores = keep_min_p(scores, min_p)
    if typical_p < 1.0:
        scores = keep_typical_p(scores, typical_p)
    return scores


def _present(scores: Tensor, tokens: Tensor) -> Tensor:
    """(B, V) bool: true for the tokens that each row of `tokens` (B, N) holds; -1 is padding."""
    vocab_size = scores.shape[-1]
    absent = scores.new_zeros(scores.shape[0], vocab_size + 1, dtype=torch.bool)
    # The column past the vocabulary takes the padding; it is cut off again.
    columns = tokens.where(tokens >= 0, vocab_size).clamp(max=vocab_size)
    return absent.scatter(1, columns, True)[:, :vocab_size]


@names_processors
def sample(
    logits: Tensor,
    history: Tensor,
    uniform: Tensor | None = None,
    *,
    token_mask: Tensor | None = None,
    **processors: float,
) -> Tensor:
    """Choose one token a row. Nothing waits for the device.

    Args:
        logits: (B, V), any floating-point type; computed in float32.
        history: (B, S) int64, each row's tokens up to the last column, after -1 as padding. Read
            by `repetition_penalty` and `no_repeat_ngram_size` only; (B, 0) will do without them.
        uniform: (B,) float32 in [0, 1), the random number of each row; None takes the highest
            score, and applies only the processors that read the history. On a GPU a number
            outside of the range gives some token of the vocabulary.
        token_mask: (B, ceil(V / 32)) int32: token i of a row is allowed if bit i % 32 of its word
            i // 32 is set. The score of any other is -inf, before all processors; bits from V on
            do not count. None allows all. A row that allows none is an error on the CPU.
        processors: those of `process`, neutral where not given.

    Returns:
        (B,) int64. Of a row whose every token is banned: 0. Not differentiable.
    """
    return _sample.call(logits, history, uniform, token_mask, *processor_arguments(processors))


choice = attrgetter(*PROCESSORS)
"""The processors of a call, in the order of `SCHEMA`."""
_POSITIVE = [name for name, option in PROCESSORS.items() if option.above]
_SHARES = [name for name, option in PROCESSORS.items() if option.high == 1]
_COUNTS = [name for name, option in PROCESSORS.items() if option.kind is int]


def check_choice(call: Arguments, rows: int, vocab_size: int) -> None:
    """Check the arguments, other than logits, of an op that chooses tokens for `rows` rows."""
    history, uniform, token_mask = call.history, call.uniform, call.token_mask
    check_integers(history=history)
    check_dim("history", history, 2, says="(B, S)")
    check_shape("history", history, rows, history.shape[1], says="(B, S)")
    if uniform is not None:
        check_floating(uniform=uniform)
        check_shape("uniform", uniform, rows, says="(B,)")
    if token_mask is not None:
        if token_mask.dtype != torch.int32:
            raise ArgumentError(f"token_mask must be int32, not {token_mask.dtype}")
        check_shape("token_mask", token_mask, rows, -(-vocab_size // 32), says="(B, ceil(V / 32))")
    check_above(0, **{name: getattr(call, name) for name in _POSITIVE})
    check_share(**{name: getattr(call, name) for name in _SHARES})
    check_at_least(0, **{name: getattr(call, name) for name in _COUNTS})


def check_choice_values(call: Arguments, vocab_size: int) -> None:
    """Check the values of the same arguments."""
    if call.uniform is not None:
        check_fractions("uniform", call.uniform)
    if call.token_mask is not None:
        _check_allowed(call.token_mask, vocab_size)


def _check_allowed(token_mask: Tensor, vocab_size: int) -> None:
    """Check that each row of a mask on the CPU allows a token."""
    if token_mask.device.type != "cpu":
        return
    used = (1 << vocab_size % 32) - 1 or -1  # bits of the last word that are a token's
    allows = token_mask[:, :-1].any(-1) | ((token_mask[:, -1] & used) != 0)
    if not bool(allows.all()):
        row = int(allows.int().argmin())
        raise ArgumentError(f"token_mask[{row}] allows no token")


def _check(call: Arguments) -> None:
    logits = call.logits
    check_floating(logits=logits)
    if logits.dim() != 2 or not logits.shape[1]:
        raise ArgumentError(f"logits must be (B, V) with V > 0, not {tuple(logits.shape)}")
    check_choice(call, *logits.shape)


def sample_reference(
    logits: Tensor,
    history: Tensor,
    uniform: Tensor | None,
    token_mask: Tensor | None,
    *choice: float,
) -> Tensor:
    """`sample` in plain torch."""
    scores = logits.float()
    if token_mask is not None:
        scores = ban_masked(scores, token_mask)
    processors: dict[str, Any] = dict(zip(PROCESSORS, choice, strict=True))
    if uniform is None:
        for name, option in PROCESSORS.items():
            if not option.reads_history:
                del processors[name]
        return process(scores, history, **processors).argmax(-1)
    scores = process(scores, history, **processors)
    probabilities = scores.softmax(-1)
    # In float64, rounding cannot move `uniform * total` up to the total, in any order of summation,
    # and a banned token is never chosen.
    cumulative = probabilities.cumsum(-1, dtype=torch.float64)
    reached = (cumulative > uniform.double()[:, None] * cumulative[:, -1:]) & (probabilities > 0)
    return reached.int().argmax(-1)


def _native(call: Arguments) -> Tensor:
    # The kernels sum weights in their own order: a token differs from the reference's only where a
    # random number lies within rounding, about 1e-7, of the edge between two tokens.
    logits, token_mask = call.logits, call.token_mask
    if logits.stride(1) != 1:
        logits = logits.contiguous()
    if token_mask is not None and token_mask.stride(1) != 1:
        token_mask = token_mask.contiguous()
    return kernels(logits).sample(*call._replace(logits=logits, token_mask=token_mask))


def refuses_uniform(call: Arguments) -> str | None:
    """A reason why compiled kernels cannot use these random numbers, or None."""
    if call.uniform is None or call.uniform.dtype == torch.float32:
        return None
    return f"the compiled kernels take float32 random numbers, not {call.uniform.dtype}"


_MOST_ROWS = 65535


def _cuda_refuses(call: Arguments) -> str | None:
    if call.logits.shape[0] > _MOST_ROWS:
        return f"the CUDA kernel takes up to {_MOST_ROWS} rows, not {call.logits.shape[0]}"
    return refuses_uniform(call)


_sample = Op(
    "sample",
    f"(Tensor logits, Tensor history, Tensor? uniform, Tensor? token_mask, {SCHEMA}) -> Tensor",
    check=_check,
    values=lambda call: check_choice_values(call, call.logits.shape[1]),
    native=by_device(
        cpu=native(Tensors("logits", may_be_empty=True), refuses=refuses_uniform)(_native),
        cuda=cuda(Tensors("logits"), refuses=_cuda_refuses)(_native),
    ),
    triton=triton(
        "sampling", "sample", Tensors("logits"), Tensors("history", "uniform", may_be_empty=True)
    ),
    reference=sample_reference,
)
_sample.refuse_gradient("a chosen token does not change smoothly with the logits")


@_sample.register_fake
def _(call: Arguments) -> Tensor:
    return call.logits.new_empty(call.logits.shape[0], dtype=torch.int64)
