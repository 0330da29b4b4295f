"""Options that ops do not have (bias, bad words, cutoffs, penalties, lengths) in `GPT2.generate`,
against transformers and plain loops."""

from __future__ import annotations

import copy
import itertools
import math
import random
import time
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from gpt2fast import GPT2
from gpt2fast.errors import GenerationError
from gpt2fast.inference import processors
from gpt2fast.inference.callables import NONE
from gpt2fast.inference.decoding import decode
from gpt2fast.inference.engine import DecodeState
from gpt2fast.inference.processors import Processors, SequenceBias
from gpt2fast.inference.stopping import StopCriteria
from gpt2fast.sampling import STEPWISE, SamplingOptions
from small_generators import small_model
from tolerance import assert_equal

SIZE = 61
END = 7
SAMPLING: dict[str, Any] = {"do_sample": True, "seed": 5, "top_k": 30}
EVERY: dict[str, Any] = {
    "logit_bias": {3: 4.0, 9: -2.5, END: 6.0},
    "bad_words_ids": [[5], [11, 4], [30, 2, 8], [END]],
    "min_new_tokens": 9,
    "frequency_penalty": 0.7,
    "presence_penalty": -0.4,
    "epsilon_cutoff": 0.01,
    "eta_cutoff": 0.02,
    "repetition_penalty": 1.2,
}


@pytest.fixture(scope="module")
def pair() -> tuple[Any, Any]:
    ours = small_model(seed=4).eval()
    theirs = ours.to_hf()
    assert isinstance(theirs, transformers.GPT2LMHeadModel)
    return ours, theirs


def biases(given: dict[int, float]) -> list[list[Any]]:
    """A logit_bias as transformers' sequence_bias."""
    return [[[token], bias] for token, bias in given.items()]


def words(draw: random.Random) -> list[list[int]]:
    """Sequences that a text of so few tokens runs into: one, two and three tokens, and the end."""
    return [
        [draw.randrange(SIZE) for _ in range(length)] for length in [1] * 6 + [2] * 200 + [3] * 60
    ] + [[END]]


@pytest.mark.parametrize("form", ["float32", "packed"])
@pytest.mark.parametrize("seed", range(12))
def test_greedy_and_beam_tokens_equal_transformers(pair, seed, form):
    ours, theirs = pair
    ours = ours.pack() if form == "packed" else ours
    draw = random.Random(seed)
    torch.manual_seed(seed)
    input_ids = torch.randint(SIZE, (draw.randint(1, 3), 5))
    options: dict[str, Any] = {"max_new_tokens": draw.choice([6, 20])}
    changed: dict[str, Any] = {}
    if draw.random() < 0.6:
        options["bad_words_ids"] = words(draw)
    if draw.random() < 0.6:
        options["min_new_tokens"] = draw.randint(0, options["max_new_tokens"])
    if draw.random() < 0.6:
        bias = {draw.randrange(SIZE): draw.uniform(-4, 4) for _ in range(9)}
        changed["logit_bias"] = bias | {END: 3.0}
    if draw.random() < 0.3:
        options["repetition_penalty"] = 1.3
    for beams in ({}, {"num_beams": 3, "num_return_sequences": 2, "length_penalty": 0.5}):
        shared = {**options, **beams, "eos_token_id": [END, 13], "pad_token_id": 0}
        also = {"sequence_bias": biases(changed["logit_bias"])} if changed else {}
        expected = theirs.generate(
            input_ids, attention_mask=torch.ones_like(input_ids), do_sample=False, **shared, **also
        )
        assert_equal(ours.generate(input_ids, **shared, **changed), expected)


def test_each_option_changes_the_text(pair):
    """So that the test above compares texts that differ from those without the options."""
    ours, _ = pair
    input_ids = torch.tensor([[1, 2, 3], [40, 50, 60]])
    for extra in ({}, {"num_beams": 3}):
        plain = ours.generate(input_ids, max_new_tokens=20, **extra)
        bad = plain[0, 4:6].tolist()
        options: list[dict[str, Any]] = [
            {"bad_words_ids": [bad]},
            {"logit_bias": {bad[0]: -30.0}},
            {"frequency_penalty": 2.0},
            {"presence_penalty": -2.0},
            *([] if extra else [{"min_new_tokens": 18, "eos_token_id": bad[0]}]),
        ]
        for option in options:
            base = {"eos_token_id": option.get("eos_token_id", END), "max_new_tokens": 20, **extra}
            other = ours.generate(input_ids, **{**base, **option})
            assert other.tolist() != ours.generate(input_ids, **base).tolist(), option


@pytest.mark.parametrize("beams", [1, 4])
def test_bad_words_never_occur_and_no_text_ends_too_soon(pair, beams):
    ours, _ = pair
    draw = random.Random(1)
    bad = words(draw)
    input_ids = torch.randint(SIZE, (4, 3), generator=torch.Generator().manual_seed(1))
    options = {"logit_bias": {END: 50.0}, "bad_words_ids": bad, "num_beams": beams}
    found = ours.generate(input_ids, max_new_tokens=24, min_new_tokens=10, **options)
    assert found.shape[1] == 3 + 11 and (found[:, -1] == END).all()
    assert (found[:, 3:13] != END).all()
    for row in found.tolist():
        for word in bad[:-1]:
            places = range(3 - len(word) + 1, len(row) - len(word) + 1)
            assert not any(row[place : place + len(word)] == word for place in places)


@pytest.mark.parametrize("how", [{}, SAMPLING], ids=["greedy", "drawn"])
def test_a_row_without_a_token_left_is_an_error(pair, how):
    every = [[token] for token in range(SIZE) if token != END]
    options = {"bad_words_ids": every, "max_new_tokens": 9, **how}
    ids = torch.tensor([[1, 2]])
    assert pair[0].generate(ids, **options).tolist() == [[1, 2, END]]
    with pytest.raises(GenerationError, match="no token is left to choose after 0 .*min_new_tok"):
        pair[0].generate(ids, min_new_tokens=3, **options)


def test_stop_sequences_wait_for_min_new_tokens(pair):
    ours, _ = pair
    ids = torch.tensor([[1, 2, 3]])
    free = ours.generate(ids, max_new_tokens=20, eos_token_id=None)[0, 3:].tolist()
    for stop in ([free[2]], free[1:3]):
        soon = ours.generate(ids, max_new_tokens=20, eos_token_id=None, stop=[stop])
        assert soon.shape[1] <= 3 + 3
        options = {"max_new_tokens": 20, "eos_token_id": None, "stop": [stop]}
        late = ours.generate(ids, min_new_tokens=8, **options)[0, 3:].tolist()
        pieces = [late[place : place + len(stop)] for place in range(8 - len(stop) + 1)]
        assert len(late) >= 9 and stop not in pieces


@pytest.mark.parametrize("value", [0.0005, 0.003, 0.02, 0.3, 0.95])
def test_cutoffs_give_the_scores_of_transformers(value):
    generator = torch.Generator().manual_seed(3)
    for spread in (0.3, 1.0, 3.0, 8.0):
        scores = torch.randn(7, 211, generator=generator) * spread
        scores[2, 50:] = -math.inf
        scores[3, 1:] = -math.inf
        scores[4] = 0.0
        epsilon = transformers.EpsilonLogitsWarper(value)
        eta = transformers.EtaLogitsWarper(value)
        assert_equal(processors.cut_epsilon(scores, value), epsilon(None, scores.clone()))
        assert_equal(processors.cut_eta(scores, value), eta(None, scores.clone()))


def test_cutoffs_come_after_the_other_warpers(pair):
    """Scores of transformers' own list of processors, in which ours draws."""
    ours, theirs = pair
    input_ids = torch.tensor([[1, 2, 3], [4, 5, 6]])
    choice = {"temperature": 1.7, "top_k": 25, "top_p": 0.97, "min_p": 0.002, "typical_p": 0.95}
    cut = {"epsilon_cutoff": 0.03, "eta_cutoff": 0.05}
    config = transformers.GenerationConfig(
        do_sample=True, **choice, **cut, eos_token_id=END, pad_token_id=0, max_new_tokens=1,
        return_dict_in_generate=True, output_scores=True, output_logits=True,
    )  # fmt: skip
    result = theirs.generate(
        input_ids, generation_config=config, attention_mask=torch.ones_like(input_ids)
    )
    kept = result.scores[0] > -math.inf
    without = ours.generate(input_ids, max_new_tokens=1, do_sample=True, seed=1, **choice,
                            num_return_sequences=400)  # fmt: skip
    drawn = ours.generate(input_ids, max_new_tokens=1, do_sample=True, seed=1, **choice, **cut,
                          num_return_sequences=400)  # fmt: skip
    for row in range(2):
        rows = slice(row * 400, (row + 1) * 400)
        allowed = set(kept[row].nonzero().flatten().tolist())
        seen = set(drawn[rows, -1].tolist())
        assert seen <= allowed and len(seen) > 0.7 * len(allowed)
        assert not set(without[rows, -1].tolist()) <= allowed
    # The cutoffs do nothing to the likeliest token.
    assert_equal(
        ours.generate(input_ids, max_new_tokens=9, **cut),
        ours.generate(input_ids, max_new_tokens=9),
    )


def test_penalties_of_generated_tokens_are_those_of_the_formula():
    draw = np.random.default_rng(4)
    scores = draw.normal(size=(5, 40)).astype(np.float32)
    generated = draw.integers(40, size=(5, 60))
    for frequency, presence in itertools.product((0.0, 0.5, -1.5), (0.0, 2.0, -0.3)):
        expected = scores.astype(np.float64)
        for row, tokens in enumerate(generated):
            for token in set(tokens.tolist()):
                count = int((tokens == token).sum())
                expected[row, token] -= frequency * count + presence
        found = processors.penalize_generated(
            torch.from_numpy(scores), torch.from_numpy(generated), frequency, presence
        )
        assert np.abs(found.double().numpy() - expected).max() <= 1e-5
    none = torch.empty(5, 0, dtype=torch.int64)
    assert_equal(
        processors.penalize_generated(torch.from_numpy(scores), none, 1.0, 1.0),
        torch.from_numpy(scores),
    )


def penalized(model: GPT2, prompt: list[int], new: int, frequency: float, presence: float):
    """Greedy tokens by the formula of OpenAI's API, which counts the new tokens alone."""
    tokens: list[int] = []
    for _ in range(new):
        with torch.no_grad():
            logits = model(torch.tensor([[*prompt, *tokens]])).logits[0, -1].double().numpy()
        counts = np.bincount(np.array(tokens, dtype=np.int64), minlength=SIZE)
        logits = logits - counts * frequency - (counts > 0) * presence
        tokens.append(int(logits.argmax()))
    return tokens


def test_penalties_count_new_tokens_alone_in_ragged_batches(pair):
    ours, _ = pair
    prompts = [[3, 3, 3, 3, 9], [8, 1], [40]]
    input_ids, mask = torch.zeros(3, 5, dtype=torch.int64), torch.zeros(3, 5, dtype=torch.int64)
    for row, prompt in enumerate(prompts):
        input_ids[row, 5 - len(prompt) :] = torch.tensor(prompt)
        mask[row, 5 - len(prompt) :] = 1
    options = {"frequency_penalty": 1.1, "presence_penalty": 0.6, "eos_token_id": None}
    found = ours.generate(input_ids, mask, max_new_tokens=20, **options)
    for row, prompt in enumerate(prompts):
        assert found[row, 5:].tolist() == penalized(ours, prompt, 20, 1.1, 0.6)


@pytest.mark.parametrize("how", [{}, SAMPLING, {"num_beams": 3}], ids=["greedy", "drawn", "beams"])
def test_rows_of_a_batch_give_what_each_gives_alone_with_every_option(pair, how):
    ours, _ = pair
    prompts = [[5, 6, 11, 9, 1, 30, 2], [30, 2], [11]]
    width = 7
    input_ids = torch.full((3, width), 11)
    mask = torch.zeros(3, width, dtype=torch.int64)
    for row, prompt in enumerate(prompts):
        input_ids[row, width - len(prompt) :] = torch.tensor(prompt)
        mask[row, width - len(prompt) :] = 1
    options = {**EVERY, **how, "max_new_tokens": 20, "pad_token_id": 0}
    together = ours.generate(input_ids, mask, **options)
    cached = ours.generate(input_ids, mask, use_cache=False, **options)
    assert_equal(together, cached)
    assert_equal(ours.pack().generate(input_ids, mask, **options), together)
    for row, prompt in enumerate(prompts):
        alone = ours.generate(torch.tensor([prompt]), **options)[0, len(prompt) :]
        assert_equal(together[row, width : width + len(alone)], alone)


def test_rows_that_slide_are_penalized_for_all_that_was_generated(pair):
    ours, _ = pair
    options = SamplingOptions(max_new_tokens=120, presence_penalty=2.0, frequency_penalty=2.0)
    criteria = StopCriteria([])
    texts = [
        [step.tokens[0] for step in decode(model, [[4, 5]], [120], options, criteria, slides=True)]
        for model in (ours, ours.pack())
    ]
    assert texts[0] == texts[1]
    # No logit of this model is so far above the others that a token comes often.
    assert max(texts[0].count(token) for token in texts[0]) <= 120 // SIZE + 4
    plain = decode(
        ours, [[4, 5]], [120], SamplingOptions(max_new_tokens=120), criteria, slides=True
    )
    tokens = [step.tokens[0] for step in plain]
    assert max(tokens.count(token) for token in tokens) > 120 // SIZE + 4


def test_max_length_counts_each_rows_own_prompt(pair):
    ours, theirs = pair
    ids = torch.tensor([[1, 2, 3, 4], [9, 8, 7, 6]])
    for beams in ({}, {"num_beams": 3}, {"num_beams": 3, "early_stopping": "never"}):
        expected = theirs.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_length=15, **beams
        )
        assert_equal(ours.generate(ids, max_length=15, **beams), expected)
        mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
        both = ours.generate(ids, mask, max_length=15, eos_token_id=None, pad_token_id=0, **beams)
        assert both.shape[1] == 4 + 13
        for row, begin in ((0, 2), (1, 0)):
            alone = ours.generate(ids[row : row + 1, begin:], max_length=15, eos_token_id=None,
                                  **beams)  # fmt: skip
            assert alone.shape[1] == 15
            assert_equal(both[row, 4 : 4 + 15 - (4 - begin)], alone[0, 4 - begin :])


def test_max_time_ends_texts_where_they_are(pair, monkeypatch):
    ours, _ = pair
    ids = torch.tensor([[1, 2, 3], [4, 5, 6]])
    full = ours.generate(ids, max_new_tokens=20, eos_token_id=None)
    assert_equal(ours.generate(ids, max_new_tokens=20, max_time=1e6, eos_token_id=None), full)
    now = iter(range(10**9))
    monkeypatch.setattr(time, "perf_counter", lambda: float(next(now)))
    part = ours.generate(ids, max_new_tokens=20, max_time=20.0, eos_token_id=None)
    assert 4 < part.shape[1] < 23
    assert_equal(part, full[:, : part.shape[1]])
    options = SamplingOptions(max_new_tokens=20, max_time=20.0)
    steps = list(decode(ours, [[1, 2, 3], [4]], [20, 20], options, StopCriteria([])))
    assert steps[-1].reasons == ["time", "time"] and 1 < len(steps) < 20
    beams = ours.generate(ids, max_new_tokens=20, max_time=20.0, eos_token_id=None, num_beams=2)
    assert 4 < beams.shape[1] < 23


def test_a_step_without_such_options_is_the_same_op_as_before(pair):
    ours, _ = pair
    criteria = StopCriteria([END])
    plain = {"min_new_tokens": 0, "epsilon_cutoff": 0.0, "frequency_penalty": 0.0, "logit_bias": {}}
    unused = {"bad_words_ids": [[END]], "max_length": None, "max_time": 3.0, "eta_cutoff": None}
    options = SamplingOptions(do_sample=True, repetition_penalty=1.5, **plain, **unused)
    assert not Processors(options, criteria, NONE, SIZE, ours.device).stepwise
    greedy = SamplingOptions(epsilon_cutoff=0.5, eta_cutoff=0.5)
    assert not Processors(greedy, criteria, NONE, SIZE, ours.device).stepwise
    for name in STEPWISE.keys() - {"penalty_alpha"}:  # chooses among tokens that were processed
        some = SamplingOptions(do_sample=True, **{name: 0.5})
        assert Processors(some, criteria, NONE, SIZE, ours.device).stepwise


def test_steps_with_such_options_are_taken_one_by_one(pair, monkeypatch):
    """A captured step of a GPU chooses with the ops' processors alone: it is not asked then."""
    ours, _ = pair
    asked = []
    monkeypatch.setattr(DecodeState, "run_ahead", lambda *a, **b: asked.append(b) or None)
    ids = torch.tensor([[1, 2, 3]])
    for name in EVERY.keys() & STEPWISE.keys():
        ours.generate(ids, max_new_tokens=12, do_sample=True, seed=1, **{name: EVERY[name]})
    assert not asked
    for options in ({"max_time": 1e5}, {"repetition_penalty": 1.2}):
        ours.generate(ids, max_new_tokens=12, do_sample=True, seed=1, **options)
        assert len(asked) == 1, options
        asked.clear()


def test_a_bias_of_sequences_is_that_of_transformers():
    generator = torch.Generator().manual_seed(9)
    history = torch.randint(4, (6, 9), generator=generator)
    scores = torch.randn(6, 4, generator=generator)
    given = {
        tokens: float(number) - 7.5
        for length in (1, 2, 3)
        for number, tokens in enumerate(itertools.product(range(4), repeat=length))
    }
    theirs = transformers.SequenceBiasLogitsProcessor(copy.deepcopy(given))
    for columns in (9, 2, 1):
        seen = history[:, :columns]
        found = SequenceBias(given, torch.device("cpu"))(scores, seen)
        assert_equal(found, theirs(seen, scores))


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({"logit_bias": {3: 101}}, ["logit_bias of the token 3 is 101", "from -100 to 100"]),
        ({"logit_bias": {3: "x"}}, ["logit_bias of the token 3 is 'x'", "bad_words_ids bans"]),
        ({"logit_bias": {-3: 1}}, ["logit_bias has the key -3", "at least 0"]),
        ({"logit_bias": {"a": 1}}, ["logit_bias has the key 'a'"]),
        ({"logit_bias": [3]}, ["logit_bias is [3]", "must map"]),
        ({"logit_bias": {61: 1.0}}, ["logit_bias has the token id 61", "from 0 to 60"]),
        ({"bad_words_ids": [[3, 61]]}, ["bad_words_ids has the token id 61", "from 0 to 60"]),
        ({"bad_words_ids": "the"}, ["bad_words_ids is 'the'", "lists of token ids"]),
        ({"bad_words_ids": [[]]}, ["bad_words_ids has the item []", "at least one"]),
        ({"bad_words_ids": [3]}, ["bad_words_ids has the item 3"]),
        ({"bad_words_ids": [[True]]}, ["bad_words_ids has the item [True]"]),
        ({"min_new_tokens": 30}, ["min_new_tokens is 30", "max_new_tokens (20)"]),
        ({"min_new_tokens": -1}, ["min_new_tokens is -1", "at least 0"]),
        ({"min_new_tokens": 1.5}, ["min_new_tokens is 1.5"]),
        ({"epsilon_cutoff": 1.0}, ["epsilon_cutoff is 1.0", "below 1"]),
        ({"eta_cutoff": -0.1}, ["eta_cutoff is -0.1", "at least 0"]),
        ({"frequency_penalty": 2.1}, ["frequency_penalty is 2.1", "from -2 to 2"]),
        ({"presence_penalty": math.nan}, ["presence_penalty is nan", "from -2 to 2"]),
        ({"max_length": 9, "max_new_tokens": 4}, ["max_new_tokens is 4", "is 9", "leave one"]),
        ({"max_length": 3}, ["row 0", "3 tokens", "max_length", "is 3", "max_new_tokens"]),
        ({"max_length": 49}, ["n_positions=48", "max_length=48"]),
        ({"max_time": 0}, ["max_time is 0", "above 0"]),
        ({"max_time": math.inf}, ["max_time is inf"]),
    ],
    ids=str,
)
def test_a_bad_value_is_named_with_limit_and_way_out(pair, options, parts):
    with pytest.raises(GenerationError) as error:
        pair[0].generate(torch.tensor([[1, 2, 3]]), **options)
    for part in parts:
        assert part in str(error.value)
