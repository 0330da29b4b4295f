"""The Triton kernels choose the reference's tokens, in every way of choosing."""

from __future__ import annotations

import math

import pytest
import torch

from comparison import TRITON_BACKENDS, backend, seeded
from gpt2fast import ops
from gpt2fast.ops import sampling as processors
from test_sampling import (
    DRAWS,
    KINDS,
    assert_draws_as_the_reference,
    logits_of,
    random_history,
    random_scores,
)
from tolerance import assert_equal


@pytest.mark.parametrize("name", TRITON_BACKENDS)
@pytest.mark.parametrize("options", DRAWS, ids=str)
@pytest.mark.parametrize(
    "kind",
    [
        pytest.param(kind, marks=[] if kind in ("normal", "equal") else pytest.mark.slow)
        for kind in KINDS
    ],
)
def test_draws_the_references_tokens(name, kind, options):
    generator = seeded(9)
    for rows, vocab in [(3, 700), (2, 63), (1, 1), (2, 17)]:
        uniform = torch.rand(rows, generator=generator)
        uniform[0] = 0.0
        history = random_history(rows, max(vocab, 8))
        logits = logits_of(kind, rows, vocab)
        assert_draws_as_the_reference(logits, history, uniform, options, name)


@pytest.mark.parametrize("name", TRITON_BACKENDS)
@pytest.mark.parametrize(
    "options",
    [
        pytest.param(options, marks=[] if len(options) == 3 else pytest.mark.slow)
        for options in DRAWS
    ],
    ids=str,
)
def test_draws_the_references_tokens_of_a_large_vocabulary(name, options):
    logits = torch.cat([logits_of(kind, 1, 50257) for kind in ("normal", "flat", "equal")])
    uniform = torch.rand(3, generator=seeded(2))
    assert_draws_as_the_reference(logits, random_history(3, 50257), uniform, options, name)


@pytest.mark.parametrize("name", TRITON_BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_reads_views_of_logits_and_random_numbers(name, dtype):
    logits = (torch.randn(3, 257) * 4).to(dtype)
    uniform = torch.rand(3, 9)[:, 4]
    history = random_history(3, 200, 31)[:, ::2]
    for options in DRAWS[1::4]:
        assert_draws_as_the_reference(logits[:, 1:200:2], history, uniform, options, name)
    with backend(name):
        greedy = ops.sample(logits[:, :251], history)
    assert_equal(greedy, logits[:, :251].float().argmax(-1))


@pytest.mark.parametrize("name", TRITON_BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_finds_the_first_of_the_highest(name, dtype):
    for vocab in (1, 5, 64, 777, 5000):
        logits = torch.randint(vocab // 3 + 2, (10, vocab)).to(dtype)
        logits[0] = -math.inf
        logits[2:4, vocab // 2 :] = math.inf
        logits[4:7, vocab // 3] = math.nan
        logits[5, vocab // 4] = math.inf
        logits[6:8, -1] = math.nan
        logits[8] = 0.0
        logits[8, vocab // 2] = -0.0
        with backend(name):
            chosen = ops.sample(logits, torch.empty(10, 0).long())
        assert_equal(chosen, logits.float().argmax(-1))


@pytest.mark.parametrize("name", TRITON_BACKENDS)
@pytest.mark.parametrize(
    "options",
    [
        {"repetition_penalty": 1.8, "no_repeat_ngram_size": 2},
        {"no_repeat_ngram_size": 1},
        {"repetition_penalty": 0.7},
    ],
    ids=str,
)
def test_greedy_takes_the_highest_score_after_the_penalties(name, options):
    scores = random_scores(6, 200)
    history = scores.topk(3).indices
    history[:2, 0] = -1
    expected = processors.process(scores, history, **options).argmax(-1)
    with backend(name):
        assert_equal(ops.sample(scores, history, None, **options), expected)
