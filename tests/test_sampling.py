"""Logits processors, the draw, and the options that steer them."""

from __future__ import annotations

import inspect
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from comparison import BACKENDS, CUDA_BACKENDS, backend, seeded
from gpt2fast import ops
from gpt2fast.errors import GenerationError
from gpt2fast.inference.sampling import Draw, uniforms
from gpt2fast.ops import sampling as processors
from gpt2fast.ops.native import unavailable
from gpt2fast.sampling import PROCESSORS, SamplingOptions
from tolerance import assert_equal

needs_native = pytest.mark.skipif(unavailable() is not None, reason=str(unavailable()))

OFF = dict(
    temperature=1.0,
    top_k=0,
    top_p=1.0,
    min_p=0.0,
    typical_p=1.0,
    repetition_penalty=1.0,
    no_repeat_ngram_size=0,
)


def random_scores(rows=6, vocab=50, banned=0.0, seed=0):
    generator = seeded(seed)
    scores = torch.randn(rows, vocab, generator=generator) * 4
    return scores.masked_fill(torch.rand(rows, vocab, generator=generator) < banned, -math.inf)


def random_history(rows=6, vocab=50, length=30, seed=0):
    # Few distinct tokens, so that n-grams do repeat.
    generator = seeded(seed)
    return torch.randint(vocab // 8, (rows, length), generator=generator)


def reference_processors(**options):
    from transformers.generation import logits_process as theirs

    classes = {
        "repetition_penalty": theirs.RepetitionPenaltyLogitsProcessor,
        "no_repeat_ngram_size": theirs.NoRepeatNGramLogitsProcessor,
        "temperature": theirs.TemperatureLogitsWarper,
        "top_k": theirs.TopKLogitsWarper,
        "top_p": theirs.TopPLogitsWarper,
        "min_p": theirs.MinPLogitsWarper,
        "typical_p": theirs.TypicalLogitsWarper,
    }
    return theirs.LogitsProcessorList(
        [make(options[name]) for name, make in classes.items() if name in options]
    )


ONE_BY_ONE = [
    {"repetition_penalty": 1.3},
    {"repetition_penalty": 0.7},
    {"no_repeat_ngram_size": 1},
    {"no_repeat_ngram_size": 2},
    {"no_repeat_ngram_size": 3},
    {"no_repeat_ngram_size": 31},
    {"temperature": 0.35},
    {"temperature": 2.5},
    {"top_k": 1},
    {"top_k": 7},
    {"top_k": 1000},
    {"top_p": 0.0},
    {"top_p": 0.4},
    {"top_p": 0.95},
    {"min_p": 0.05},
    {"min_p": 1.0},
    {"typical_p": 0.05},
    {"typical_p": 0.5},
    {"typical_p": 0.95},
]
CHAINED = [
    {"temperature": 1.3, "top_k": 30, "top_p": 0.97, "min_p": 0.01, "typical_p": 0.7},
    {"temperature": 0.8, "top_k": 50, "top_p": 0.95},
    {"repetition_penalty": 1.2, "temperature": 0.7, "top_k": 20, "top_p": 0.8, "min_p": 0.1},
    {"repetition_penalty": 1.2, "no_repeat_ngram_size": 2, "temperature": 1.4, "top_p": 0.9},
    {"no_repeat_ngram_size": 1, "top_k": 4, "min_p": 0.3},
]


@pytest.mark.parametrize("banned", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("options", ONE_BY_ONE + CHAINED, ids=str)
def test_processors_equal_transformers(options, banned):
    scores, history = random_scores(banned=banned), random_history()
    expected = reference_processors(**options)(history, scores.clone())
    actual = processors.process(scores, history, **options)
    assert_equal(actual, expected)


def test_processors_equal_transformers_on_ties():
    scores = torch.randint(4, (8, 40), generator=seeded(1)).float()
    for options in ({"top_k": 5}, {"min_p": 0.6}, {"typical_p": 0.3}):
        expected = reference_processors(**options)(None, scores.clone())
        assert_equal(processors.process(scores, scores.long(), **options), expected)
    # Which of equal scores top-p keeps, transformers leaves to an unstable sort: as many of them.
    for options in ({"top_p": 0.5}, {"top_k": 5, "top_p": 0.5}):
        expected = reference_processors(**options)(None, scores.clone())
        actual = processors.process(scores, scores.long(), **options)
        assert_equal(actual.sort(-1).values, expected.sort(-1).values)


@pytest.mark.parametrize("op", [ops.sample, ops.packed_next])
def test_help_names_the_processors(op):
    parameters = inspect.signature(op).parameters
    assert {name: parameters[name].default for name in OFF} == OFF


def test_top_p_keeps_the_later_ones_of_equal_scores():
    kept = processors.keep_top_p(torch.tensor([[1.0, 0.0, 1.0, 0.0, 1.0]]), 0.5)
    assert kept.isfinite().tolist() == [[False, False, True, False, True]]


def test_processing_leaves_its_input_alone():
    scores, history = random_scores(), random_history()
    before = scores.clone()
    for options in CHAINED:
        processors.process(scores, history, **options)
    assert_equal(scores, before)


@pytest.mark.parametrize("length", [1, 2, 30])
@pytest.mark.parametrize(
    "options",
    [{"repetition_penalty": 1.5}, {"no_repeat_ngram_size": 2}, {"no_repeat_ngram_size": 4}],
    ids=str,
)
def test_padding_before_a_history_changes_nothing(options, length):
    scores, history = random_scores(), random_history(length=length)
    padded = torch.cat([torch.full((6, 5), -1), history], dim=1)
    assert torch.equal(
        processors.process(scores, padded, **options),
        processors.process(scores, history, **options),
    )


def test_every_processor_starts_switched_off():
    scores, history = random_scores(), random_history()
    assert_equal(processors.process(scores, history), scores)
    assert_equal(processors.process(scores, history, **OFF), scores)


def test_greedy_takes_the_highest_score_after_the_penalties():
    scores = random_scores()
    history = scores.topk(3).indices
    options = {"repetition_penalty": 1.8, "no_repeat_ngram_size": 2}
    expected = processors.process(scores, history, **options).argmax(-1)
    assert_equal(ops.sample(scores, history, None, **options), expected)
    assert not torch.equal(expected, scores.argmax(-1))


def test_draws_follow_the_distribution():
    logits = torch.tensor([[2.0, 0.0, -math.inf, 1.0, -1.0]])
    draws = 40_000
    uniform = torch.rand(draws, generator=seeded(0))
    tokens = ops.sample(logits.expand(draws, -1), torch.empty(draws, 0).long(), uniform)
    counts = torch.bincount(tokens, minlength=5)
    expected = logits.softmax(-1)[0] * draws
    kept = expected > 0
    chi_square = ((counts - expected)[kept] ** 2 / expected[kept]).sum()
    assert counts[2] == 0
    assert chi_square < 16.27  # 3 degrees of freedom: exceeded once in 1000


@pytest.mark.parametrize("uniform", [0.0, 0.25, 0.5, 1 - 2**-24])
def test_a_banned_token_is_never_drawn(uniform):
    scores = random_scores(64, 1000, banned=0.9, seed=3)
    tokens = ops.sample(scores, torch.empty(64, 0).long(), torch.full((64,), uniform), top_k=3)
    kept = processors.process(scores, torch.empty(64, 0).long(), top_k=3)
    assert torch.isfinite(kept.gather(1, tokens[:, None])).all()


def test_draw_inverts_the_cumulative_distribution():
    logits = torch.tensor([0.1, 0.2, 0.3, 0.4]).log().expand(6, -1)
    uniform = torch.tensor([0.0, 0.09, 0.11, 0.29, 0.31, 0.99])
    tokens = ops.sample(logits, torch.empty(6, 0).long(), uniform)
    assert tokens.tolist() == [0, 0, 1, 1, 2, 3]


def test_a_row_with_every_token_banned_gives_token_zero():
    scores = torch.full((2, 9), -math.inf)
    history = torch.zeros(2, 3).long()
    for uniform in (None, torch.rand(2)):
        chosen = ops.sample(scores, history, uniform, top_k=4, top_p=0.9, min_p=0.1)
        assert chosen.tolist() == [0, 0]


def test_a_row_does_not_depend_on_its_neighbors():
    scores, history = random_scores(), random_history()
    uniform = torch.rand(6, generator=seeded(5))
    options = CHAINED[1]
    together = ops.sample(scores, history, uniform, **options)
    for row in range(6):
        alone = ops.sample(
            scores[row : row + 1], history[row : row + 1], uniform[row : row + 1], **options
        )
        assert alone.item() == together[row].item()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_low_precision_logits_are_processed_in_float32(dtype):
    scores, history = random_scores().to(dtype), random_history()
    uniform = torch.rand(6, generator=seeded(5))
    tokens = ops.sample(scores, history, uniform, **CHAINED[1])
    assert_equal(tokens, ops.sample(scores.float(), history, uniform, **CHAINED[1]))


def test_sample_is_a_proper_torch_op():
    options = (0.8, 20, 0.9, 0.05, 0.9, 1.2, 2)
    arguments = (random_scores(), random_history(), torch.rand(6), None, *options)
    torch.library.opcheck(torch.ops.gpt2fast.sample.default, arguments)


def logits_of(kind, rows, vocab):
    generator = seeded(vocab)
    noise = torch.randn(rows, vocab, generator=generator)
    if kind == "flat":
        return noise * 0.02
    if kind == "peaked":
        return noise * 12.0
    if kind == "equal":
        return (noise * 2.0).round()
    if kind == "banned":
        return (noise * 3.0).masked_fill(noise > 0.3, -math.inf)
    if kind == "outliers":
        # Masks that are merely very low, and one token far above the others.
        noise = (noise * 3.0).masked_fill(noise < -0.3, torch.finfo(torch.float32).min)
        noise[:, vocab // 2] = 1e4
        noise[::2, vocab // 2] = 15.0
        return noise
    return noise * 3.0


KINDS = ["normal", "flat", "peaked", "equal", "banned", "outliers"]
DRAWS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.7},
    {"top_k": 1},
    {"top_k": 50, "temperature": 0.8},
    {"top_k": 700},
    {"top_p": 0.9},
    {"top_p": 0.999, "temperature": 1.5},
    {"top_p": 0.0},
    {"min_p": 0.1},
    {"min_p": 1.0},
    {"typical_p": 0.2},
    {"typical_p": 0.9, "temperature": 1.2},
    {"top_p": 0.9, "min_p": 0.05, "typical_p": 0.6},
    {"top_k": 40, "typical_p": 0.8},
    {"top_k": 50, "top_p": 0.9},
    {"top_k": 400, "top_p": 0.97, "min_p": 0.02},
    {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
    {"repetition_penalty": 0.8, "temperature": 0.6, "top_k": 40, "top_p": 0.95},
]


def assert_draws_as_the_reference(logits, history, uniform, options, name="native"):
    """The same tokens, but where a random number lies within rounding of an edge between two."""
    with backend(name):
        ours = ops.sample(logits, history, uniform, **options)
    with backend("reference"):
        theirs = ops.sample(logits, history, uniform, **options)
    different = (ours != theirs).nonzero()[:, 0]
    assert len(different) <= 0.02 * len(ours)
    scores = processors.process(logits[different].float(), history[different], **options)
    cumulative = scores.double().softmax(-1).cumsum(-1)
    ours, theirs = ours[different, None], theirs[different, None]
    edges = cumulative.gather(1, torch.minimum(ours, theirs))[:, 0]
    assert (scores.gather(1, ours) > -math.inf).all()
    assert torch.all((edges - uniform[different].double()).abs() < 1e-6)


@needs_native
@pytest.mark.parametrize("options", DRAWS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_native_draws_the_references_tokens(kind, options):
    generator = seeded(9)
    for rows, vocab in [(200, 1000), (40, 63), (40, 64), (40, 1), (40, 17)]:
        uniform = torch.rand(rows, generator=generator)
        uniform[0] = 0.0
        history = random_history(rows, max(vocab, 8))
        assert_draws_as_the_reference(logits_of(kind, rows, vocab), history, uniform, options)


@needs_native
@pytest.mark.parametrize("options", DRAWS, ids=str)
def test_native_draws_the_references_tokens_of_a_large_vocabulary(options):
    logits = torch.cat([logits_of(kind, 8, 50257) for kind in ("normal", "flat", "equal")])
    uniform = torch.rand(24, generator=seeded(2))
    assert_draws_as_the_reference(logits, random_history(24, 50257), uniform, options)


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_native_reads_views_of_logits_and_random_numbers(dtype):
    logits = (torch.randn(300, 257) * 4).to(dtype)
    uniform = torch.rand(300, 9)[:, 4]
    history = random_history(300, 200, 31)[:, ::2]
    for options in DRAWS:
        assert_draws_as_the_reference(logits[:, :251], history, uniform, options)
        assert_draws_as_the_reference(logits[:, 1:200:2], history, uniform, options)
    with backend("native"):
        greedy = ops.sample(logits[:, :251], history)
    assert_equal(greedy, logits[:, :251].float().argmax(-1))


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_native_finds_the_first_of_the_highest(dtype):
    for vocab in (1, 5, 64, 777, 5000):
        logits = torch.randint(vocab // 3 + 2, (50, vocab)).to(dtype)
        logits[:10] = -math.inf
        logits[20:30, vocab // 2 :] = math.inf
        logits[30:40, vocab // 3] = math.nan
        logits[35:40, vocab // 4] = math.inf
        logits[38:, -1] = math.nan
        with backend("native"):
            chosen = ops.sample(logits, torch.empty(50, 0).long())
        assert_equal(chosen, logits.float().argmax(-1))


@pytest.mark.parametrize("name", BACKENDS)
def test_a_row_without_probabilities_gives_token_zero(name):
    logits = torch.randn(6, 300)
    logits[0, 200] = math.nan
    logits[1, 10] = math.inf
    logits[2] = -math.inf
    logits[3, 299] = math.nan
    history, uniform = torch.zeros(6, 0).long(), torch.full((6,), 0.5)
    with backend(name):
        for options in (
            {},
            {"top_k": 3},
            {"top_p": 0.8},
            {"min_p": 0.1},
            {"typical_p": 0.5},
            {"temperature": 0.5},
        ):
            chosen = ops.sample(logits, history, uniform, **options)
            assert chosen[:4].tolist() == [0, 0, 0, 0]
            assert (chosen[4:] > 0).all()


@pytest.mark.parametrize("name", CUDA_BACKENDS)
@pytest.mark.parametrize("options", DRAWS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_cuda_draws_the_references_tokens(name, kind, options):
    generator = seeded(9)
    for rows, vocab in [(12, 1000), (6, 63), (6, 64), (3, 1), (4, 17), (3, 5000)]:
        uniform = torch.rand(rows, generator=generator)
        uniform[0] = 0.0
        history = random_history(rows, max(vocab, 8))
        logits = logits_of(kind, rows, vocab)
        assert_draws_as_the_reference(logits, history, uniform, options, name)


@pytest.mark.parametrize("name", CUDA_BACKENDS)
@pytest.mark.parametrize("options", DRAWS, ids=str)
def test_cuda_draws_the_references_tokens_of_a_large_vocabulary(name, options):
    logits = torch.cat([logits_of(kind, 1, 50257) for kind in ("normal", "flat", "equal")])
    uniform = torch.rand(3, generator=seeded(2))
    history = random_history(3, 50257)
    assert_draws_as_the_reference(logits, history, uniform, options, name)


@pytest.mark.parametrize("name", CUDA_BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_cuda_reads_views_of_logits_and_random_numbers(name, dtype):
    logits = (torch.randn(8, 257) * 4).to(dtype)
    uniform = torch.rand(8, 9)[:, 4]
    history = random_history(8, 200, 31)[:, ::2]
    for options in DRAWS[-3:]:
        for view in (logits[:, :251], logits[:, 1:200:2]):
            assert_draws_as_the_reference(view, history, uniform, options, name)


@pytest.mark.parametrize("name", CUDA_BACKENDS)
@pytest.mark.parametrize("options", [{}, DRAWS[-2]], ids=str)
def test_cuda_finds_the_first_of_the_highest(name, options):
    history = random_history(8, 6000, 40)
    for vocab in (1, 5, 64, 777, 5000):
        logits = torch.randint(vocab // 3 + 2, (8, vocab)).float()
        logits[1] = -math.inf
        logits[2, vocab // 2 :] = math.inf
        logits[3, vocab // 3] = math.nan
        logits[4, [vocab // 4, vocab // 3]] = torch.tensor([math.inf, math.nan])
        logits[5] = -0.0
        logits[5, vocab // 2] = 0.0
        with backend(name):
            chosen = ops.sample(logits, history, **options)
        with backend("reference"):
            assert_equal(chosen, ops.sample(logits, history, **options))


@needs_native
def test_native_spreads_rows_over_threads():
    logits, uniform = logits_of("normal", 9, 20000), torch.rand(9)
    options = {"top_k": 50, "top_p": 0.9}
    history = torch.empty(9, 0).long()
    with backend("native"):
        alone = ops.sample(logits, history, uniform, **options)
        torch.set_num_threads(2)
        try:
            for _ in range(20):
                assert_equal(ops.sample(logits, history, uniform, **options), alone)
        finally:
            torch.set_num_threads(1)


def test_random_numbers_depend_on_seed_sample_and_step_only():
    def numbers_of(seed, samples, steps=600):
        found = torch.empty(len(samples), 0)
        blocks = uniforms([Draw(seed, sample) for sample in samples])
        while found.shape[1] < steps:
            found = torch.cat([found, next(blocks)], dim=1)
        return found[:, :steps]

    numbers = numbers_of(7, range(5))
    assert_equal(numbers_of(7, range(1, 3)), numbers[1:3])
    assert not torch.equal(numbers_of(8, range(5)), numbers)
    assert not torch.equal(numbers_of(7 + 2**32, range(5)), numbers)
    assert len(numbers.unique()) > 2980
    assert numbers.min() >= 0
    assert numbers.max() < 1


def test_whole_numbers_too_large_for_an_op_mean_no_limit():
    options = SamplingOptions(
        do_sample=True, max_new_tokens=10**30, top_k=10**30, no_repeat_ngram_size=10**30
    )
    scores, history = random_scores(), random_history()
    chosen = ops.sample(scores, history, torch.rand(6), **options.processors())
    assert chosen.shape == (6,)
    kept = processors.process(scores, history, **options.processors())
    assert_equal(kept, scores)


@pytest.mark.parametrize(
    ("name", "value", "limit"),
    [
        ("max_new_tokens", -1, "at least 0"),
        ("max_new_tokens", 2.5, "whole number"),
        ("temperature", math.nan, "at least 0"),
        ("temperature", math.inf, "finite"),
        ("temperature", -0.1, "0 means greedy"),
        ("temperature", 1e-30, "take 0"),
        ("temperature", "hot", "number"),
        ("top_k", -3, "at least 0"),
        ("top_k", True, "whole number"),
        ("top_p", 1.01, "from 0 to 1"),
        ("top_p", math.nan, "from 0 to 1"),
        ("min_p", -0.5, "from 0 to 1"),
        ("typical_p", 0.0, "above 0 and at most 1"),
        ("typical_p", 1.5, "above 0 and at most 1"),
        ("repetition_penalty", 0.0, "above 0"),
        ("no_repeat_ngram_size", -2, "at least 0"),
        ("num_beams", 0, "at least 1"),
        ("num_beams", None, "at least 1"),
        ("length_penalty", math.nan, "finite"),
        ("length_penalty", 300.0, "from -10 to 10"),
        ("early_stopping", "sometimes", "'never'"),
        ("num_return_sequences", 0, "at least 1"),
        ("num_return_sequences", 10**30, "at most 2147483647"),
        ("seed", -1, "at least 0"),
    ],
)
def test_a_bad_option_is_named_with_its_value_and_limit(name, value, limit):
    with pytest.raises(GenerationError) as error:
        SamplingOptions(**{name: value})
    assert name in str(error.value)
    assert repr(value) in str(error.value)
    assert limit in str(error.value)


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 2, "do_sample": True},
        {"num_beams": 2, "num_return_sequences": 3},
        {"num_return_sequences": 2},
        {"num_return_sequences": 2, "do_sample": True, "temperature": 0},
    ],
    ids=str,
)
def test_contradicting_options_are_refused(options):
    with pytest.raises(GenerationError):
        SamplingOptions(**options)


def test_the_kernels_take_the_options_that_python_has():
    header = (Path(__file__).parents[1] / "csrc" / "common" / "sampling.h").read_text("utf-8")
    found = re.findall(r"^ +OPTION\((\w+), (\w+), ([\d.]+)\)", header, re.MULTILINE)
    kinds = {int: "int64_t", float: "double"}
    assert found == [(kinds[p.kind], name, str(p.neutral)) for name, p in PROCESSORS.items()]
    assert inspect.signature(processors.process).parameters.keys() >= PROCESSORS.keys()


def test_an_unknown_processor_is_refused():
    with pytest.raises(TypeError, match="no processor 'top_x'; did you mean top_"):
        ops.sample(random_scores(), random_history(), top_x=1)


def test_none_and_neutral_values_switch_processors_off():
    neutral = SamplingOptions(
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        min_p=0.0,
        typical_p=1.0,
        repetition_penalty=1.0,
    )
    off = SamplingOptions(
        do_sample=True, temperature=None, top_k=None, top_p=None, min_p=None,
        typical_p=None, repetition_penalty=None, no_repeat_ngram_size=None,
    )  # fmt: skip
    assert neutral.processors() == off.processors() == OFF
