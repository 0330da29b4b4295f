"""Masks of tokens: only what they allow is chosen, as if all other scores were -inf."""

from __future__ import annotations

import math

import pytest
import torch

from comparison import BACKENDS, backend, seeded, strided
from gpt2fast import ops
from gpt2fast.errors import ArgumentError
from gpt2fast.ops.packed import MatrixFormat, PackedWeights
from gpt2fast.ops.sampling import process
from op_arguments import CPU_BACKENDS, LACKS, SHAPE, arguments
from token_masks import assert_follows, tokens_of, words_of

SIZES = [1, 31, 32, 33, 63, 64, 65, 700, 2049, 50257]
INTERPRETED = ("triton", "simulator")
"""Backends that take minutes for a vocabulary of GPT-2's size."""
SHARES = [0.0, 0.02, 0.5, 1.0]
OPTIONS = [
    {},
    {"temperature": 0.7, "top_k": 5},
    {"top_p": 0.9},
    {"min_p": 0.05, "typical_p": 0.8},
    {"repetition_penalty": 1.4, "no_repeat_ngram_size": 2},
    {"repetition_penalty": 0.7, "temperature": 1.3, "top_k": 40, "top_p": 0.95},
]


def masked_rows(vocab, share, rows=4):
    """Logits, tokens that are allowed, a history, and random numbers."""
    generator = seeded(vocab)
    logits = torch.randn(rows, vocab, generator=generator) * 3
    allowed = torch.rand(rows, vocab, generator=generator) < share
    # One at least: the first, the last, any, and any.
    for row, token in enumerate([0, vocab - 1, vocab // 2, vocab // 3]):
        allowed[row, token] = True
    history = torch.randint(max(1, vocab // 8), (rows, 30), generator=generator)
    return logits, allowed, history, torch.rand(rows, generator=generator)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("vocab", SIZES)
@pytest.mark.parametrize("share", SHARES)
def test_a_masked_token_has_no_score(name, vocab, share):
    """The very tokens that the same kernels choose where torch has masked the logits."""
    if vocab > 10_000 and name in INTERPRETED and share != 0.02:
        pytest.skip("one share of so many tokens is enough here")
    logits, allowed, history, uniform = masked_rows(vocab, share)
    masked = logits.masked_fill(~allowed, -math.inf)
    mask = words_of(allowed)
    with backend(name):
        for options in OPTIONS:
            for numbers in (None, uniform):
                found = ops.sample(logits, history, numbers, token_mask=mask, **options)
                assert torch.equal(found, ops.sample(masked, history, numbers, **options)), options
                possible = process(masked, history, **options).isfinite()
                if bool(possible.any(-1).all()):  # else the n-grams ban what the mask allows
                    assert allowed.gather(1, found[:, None]).all(), options


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("vocab", [1, 31, 33, 1000, 50257])
def test_draws_invert_the_allowed_distribution(name, vocab):
    logits, allowed, history, uniform = masked_rows(vocab, 0.4)
    with backend(name):
        found = ops.sample(logits, history, uniform, token_mask=words_of(allowed))
    exact = logits.double().masked_fill(~allowed, -math.inf).softmax(-1)
    cumulative = exact.cumsum(-1)
    up_to = cumulative.gather(1, found[:, None])[:, 0]
    before = up_to - exact.gather(1, found[:, None])[:, 0]
    assert (before <= uniform + 1e-6).all() and (uniform <= up_to + 1e-6).all()


@pytest.mark.parametrize("name", BACKENDS)
def test_draws_follow_the_renormalized_distribution(name):
    draws = 400 if name in INTERPRETED else 200_000
    vocab = 67
    logits, allowed, _, _ = masked_rows(vocab, 0.4, rows=4)
    logits, allowed = logits[2:3] / 3, allowed[2:3]
    uniform = torch.rand(draws, generator=seeded(1))
    none = torch.empty(draws, 0, dtype=torch.int64)
    mask = words_of(allowed).expand(draws, -1)
    with backend(name):
        found = ops.sample(logits.expand(draws, -1), none, uniform, token_mask=mask)
    counts = torch.bincount(found, minlength=vocab)
    kept = allowed[0]
    assert not counts[~kept].any()
    expected = logits[0].double().masked_fill(~kept, -math.inf).softmax(-1) * draws
    assert_follows(counts[kept], expected[kept])


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("vocab", [33, 257])
def test_views_of_masks_and_logits(name, vocab):
    logits, allowed, history, uniform = masked_rows(vocab, 0.3)
    mask = words_of(allowed)
    columns = torch.zeros(mask.shape[1], len(mask), dtype=torch.int32)
    columns.t().copy_(mask)
    larger = torch.zeros(len(mask), mask.shape[1] + 3, dtype=torch.int32)
    larger[:, 2:-1] = mask
    same = mask[:1].expand(len(mask), -1)
    with backend(name):
        for numbers in (None, uniform):
            expected = ops.sample(logits, history, numbers, token_mask=mask)
            for view in (columns.t(), larger[:, 2:-1], strided(mask)):
                for each in (logits, strided(logits)):
                    assert torch.equal(
                        ops.sample(each, history, numbers, token_mask=view), expected
                    )
            assert torch.equal(
                ops.sample(logits, history, numbers, token_mask=same),
                ops.sample(logits, history, numbers, token_mask=same.contiguous()),
            )


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("vocab", [1, 31, 33, 50257])
def test_bits_beyond_the_vocabulary_count_for_nothing(name, vocab):
    logits, allowed, history, uniform = masked_rows(vocab, 0.3)
    with backend(name):
        for numbers in (None, uniform):
            found = [
                ops.sample(logits, history, numbers, token_mask=words_of(allowed, beyond))
                for beyond in (0, 1)
            ]
            assert torch.equal(*found)


@pytest.mark.parametrize("name", BACKENDS)
def test_what_is_masked_may_be_no_number(name):
    logits, allowed, history, uniform = masked_rows(100, 0.4)
    for nonsense in (math.nan, math.inf, -math.inf):
        broken = logits.masked_fill(~allowed, nonsense)
        with backend(name):
            for numbers in (None, uniform):
                assert torch.equal(
                    ops.sample(broken, history, numbers, token_mask=words_of(allowed)),
                    ops.sample(logits, history, numbers, token_mask=words_of(allowed)),
                )


@pytest.mark.parametrize("name", CPU_BACKENDS)
@pytest.mark.parametrize("vocab", [1, 31, 32, 33, 64, 65])
@pytest.mark.parametrize("beyond", [0, 1])
def test_a_row_without_a_token_is_an_error(name, vocab, beyond):
    logits, allowed, history, _ = masked_rows(vocab, 0.3)
    allowed[2] = False
    with backend(name), pytest.raises(ArgumentError, match=r"token_mask\[2\] allows no token"):
        ops.sample(logits, history, token_mask=words_of(allowed, beyond))


@pytest.mark.parametrize("name", BACKENDS)
def test_masks_of_another_form_are_refused(name):
    logits, allowed, history, _ = masked_rows(33, 0.3)
    mask = words_of(allowed)
    bad = [mask.long(), mask.bool(), mask[:, :1], mask[:3], mask[0], torch.cat([mask, mask], 1)]
    with backend(name):
        for each in bad:
            with pytest.raises(ArgumentError, match="token_mask must be"):
                ops.sample(logits, history, token_mask=each)


@pytest.mark.parametrize("name", CPU_BACKENDS)
@pytest.mark.parametrize("allowed_ids", [40, 33, 32, 7])
def test_a_step_chooses_among_what_its_mask_allows(name, allowed_ids):
    if "packed_next" in LACKS.get(name, ()):
        pytest.skip("it has no such kernel")
    given = arguments()["packed_next"]
    given["weights"] = PackedWeights(
        SHAPE, dict.fromkeys(SHAPE.matrices(), MatrixFormat("float32"))
    )
    allowed = torch.rand(2, allowed_ids, generator=seeded(5)) < 0.3
    allowed[:, -1] = True
    mask = words_of(allowed)
    given |= {"token_mask": mask, "vocab_size": allowed_ids}
    choice = [n for n in given if n not in ("weights", "k_cache", "v_cache", "vocab_size")]
    choice = [n for n in choice if n not in ("tokens", "positions", "lengths")]
    with backend(name):
        logits, found = ops.packed_next(**given)
        expected = ops.sample(logits[:, :allowed_ids], **{name: given[name] for name in choice})
        assert torch.equal(found, expected)
        for row, token in enumerate(found.tolist()):
            assert token in tokens_of(mask[row], allowed_ids)
        with pytest.raises(ArgumentError, match=r"token_mask\[1\] allows no token"):
            ops.packed_next(**{**given, "token_mask": mask * torch.tensor([[1], [0]]).int()})
        none = words_of(allowed & torch.tensor([[True], [False]]), beyond=1)
        with pytest.raises(ArgumentError, match=r"token_mask\[1\] allows no token"):
            ops.packed_next(**{**given, "token_mask": none})
        with pytest.raises(ArgumentError, match="token_mask must be"):
            ops.packed_next(**{**given, "token_mask": torch.cat([mask, mask], 1)})


def test_masks_are_traced():
    logits, allowed, history, uniform = masked_rows(70, 0.3)
    mask = words_of(allowed)
    options = (0.8, 20, 0.9, 0.05, 0.9, 1.2, 2)
    given = (logits, history, uniform, mask, *options)
    torch.library.opcheck(torch.ops.gpt2fast.sample.default, given)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def chosen(logits, mask):
        return ops.sample(logits * 1.0, history, uniform, token_mask=mask, top_k=9)

    expected = ops.sample(logits, history, uniform, token_mask=mask, top_k=9)
    assert torch.equal(chosen(logits, mask), expected)
