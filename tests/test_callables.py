"""Processors of scores and stopping criteria of the user's own, and transformers'."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from gpt2fast import GPT2, GPT2Config
from gpt2fast.errors import GenerationError
from gpt2fast.inference.generator import Generator
from gpt2fast.tokenizer import CharTokenizer
from tolerance import assert_equal

SIZES: dict[str, Any] = {
    "vocab_size": 53, "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 48,
    "initializer_range": 0.3, "bos_token_id": None, "eos_token_id": 2,
}  # fmt: skip


LETTERS = "".join(chr(48 + number) for number in range(53))


@pytest.fixture(scope="module")
def models() -> tuple[Any, Any]:
    torch.manual_seed(2)
    ours = GPT2(GPT2Config(**SIZES)).eval()
    return ours, ours.to_hf()


class _Favor(transformers.LogitsProcessor):
    """Makes the token after the last one likelier, in place."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        rows = torch.arange(len(scores))
        scores[rows, (input_ids[:, -1] + 1) % 53] += 3.0
        return scores


class _Stop(transformers.StoppingCriteria):
    def __call__(self, input_ids: Tensor, scores: Any, **options: Any) -> Tensor:
        return (input_ids[:, -1] % 7 == 0) & (input_ids.shape[1] > 8)


def processors(draw: random.Random) -> list[Any]:
    every = [
        _Favor(),
        transformers.MinNewTokensLengthLogitsProcessor(6, 5, 2),
        transformers.NoBadWordsLogitsProcessor([[5], [9, 11], [17]], eos_token_id=2),
        transformers.SequenceBiasLogitsProcessor([[[8], 4.0], [[3, 4], -2.0]]),
        transformers.EpsilonLogitsWarper(0.02),
        transformers.EtaLogitsWarper(0.02),
        transformers.SuppressTokensLogitsProcessor([1, 3, 30]),
        transformers.RepetitionPenaltyLogitsProcessor(1.7),
    ]
    return draw.sample(every, draw.randint(1, 3))


@pytest.mark.parametrize("part", range(4))
@pytest.mark.parametrize("form", ["float32", "packed"])
def test_texts_are_those_of_transformers(models, part, form):
    ours, theirs = models
    ours = ours.pack() if form == "packed" else ours
    draw = random.Random(part)
    for _ in range(10):
        tokens = torch.randint(3, 53, (draw.randint(1, 3), 6))
        options: dict[str, Any] = {"max_new_tokens": draw.randint(1, 20)}
        options |= draw.choice([{}, {"num_beams": 3}, {"repetition_penalty": 1.3}])
        # Of a processor that is asked for by an option as well, transformers takes one.
        twice = transformers.RepetitionPenaltyLogitsProcessor
        called = [
            each
            for each in processors(draw)
            if "repetition_penalty" not in options or type(each) is not twice
        ]
        criteria = draw.choice([None, [_Stop()]])
        found = ours.generate(
            tokens, **options, logits_processor=called, stopping_criteria=criteria, pad_token_id=0
        )
        right = theirs.generate(
            tokens, **options, do_sample=False, pad_token_id=0, eos_token_id=2,
            attention_mask=torch.ones_like(tokens),
            logits_processor=transformers.LogitsProcessorList(called),
            stopping_criteria=transformers.StoppingCriteriaList(criteria or []),
        )  # fmt: skip
        assert_equal(found, right)


def test_a_row_sees_no_padding(models):
    ours, _ = models
    seen = []

    def note(input_ids, scores):
        seen.append(input_ids.tolist())
        return scores

    tokens = torch.tensor([[0, 0, 5, 6], [7, 8, 9, 10]])
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    texts = ours.generate(tokens, mask, max_new_tokens=3, logits_processor=[note])
    assert seen[:2] == [[[5, 6]], [[7, 8, 9, 10]]]
    assert seen[-1] == [texts[1, :6].tolist()]
    for row, begin in ((0, 2), (1, 0)):
        alone = ours.generate(
            tokens[row : row + 1, begin:], max_new_tokens=3, logits_processor=[_Favor()]
        )
        together = ours.generate(tokens, mask, max_new_tokens=3, logits_processor=[_Favor()])
        assert_equal(together[row, begin:], alone[0])


def test_samples_are_those_of_the_changed_scores(models):
    ours, _ = models

    def only(input_ids, scores):
        return scores.masked_fill(torch.arange(53) % 10 != 3, -torch.inf)

    tokens = torch.randint(3, 53, (2, 4))
    texts = ours.generate(
        tokens, max_new_tokens=8, do_sample=True, top_k=4, seed=3, num_return_sequences=5,
        logits_processor=[only], eos_token_id=None,
    )  # fmt: skip
    assert (texts[:, 4:] % 10 == 3).all() and texts[:, 4:].unique().numel() > 1
    with_none = [
        ours.generate(tokens, max_new_tokens=8, do_sample=True, seed=3, logits_processor=given)
        for given in (None, [], [lambda input_ids, scores: scores])
    ]
    assert_equal(with_none[0], with_none[1])
    assert_equal(with_none[0], with_none[2])


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("form", ["float32", "packed"])
def test_a_generator_calls_them_too(models, form, beams):
    ours, _ = models
    generator = Generator(
        ours.pack() if form == "packed" else ours,
        CharTokenizer({letter: id for id, letter in enumerate(LETTERS)}),
    )
    called = {"logits_processor": [_Favor()], "stopping_criteria": [_Stop()]}
    texts = [LETTERS[5:11], LETTERS[20:23]]
    options = {"max_new_tokens": 14, "do_sample": False, "num_beams": beams}
    reasons = set()
    for text, result in zip(texts, generator(texts, **options, **called), strict=True):
        ids = torch.tensor([generator.tokenizer.encode(text)])
        right = ours.generate(ids, max_new_tokens=14, num_beams=beams, **called)
        assert result.tokens == right[0, len(text) :].tolist()
        reasons.add(result.finish_reason)
    assert "stop" in reasons
    assert generator(texts[0], **options).tokens != generator(texts[0], **options, **called).tokens
    with pytest.raises(GenerationError, match="stopping_criteria is 3"):
        generator("a", stopping_criteria=3)


def test_a_stream_calls_them_too(models):
    generator = Generator(
        models[0], CharTokenizer({letter: id for id, letter in enumerate(LETTERS)})
    )
    called = {"logits_processor": [_Favor()], "stopping_criteria": [_Stop()], "seed": 3}
    stream = generator.stream(LETTERS[5:11], max_new_tokens=30, **called)
    text = "".join(stream)
    whole = generator(LETTERS[5:11], max_new_tokens=30, **called)
    assert (text, stream.finish_reason) == (whole.text, whole.finish_reason)
    assert stream.finish_reason == "stop"


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"logits_processor": 3}, "logits_processor is 3; it must be a list of functions"),
        ({"logits_processor": [3]}, "logits_processor has 3, which cannot be called"),
        ({"stopping_criteria": ["end"]}, "stopping_criteria has 'end', which cannot be called"),
        ({"logits_processor": [lambda ids, scores: None]}, r"returned NoneType; .*\(1, 53\)"),
        ({"logits_processor": [lambda ids, scores: scores[:, :5]]}, r"returned \(1, 5\); it must"),
    ],
)
def test_what_cannot_be_called_is_refused(models, options, says):
    with pytest.raises(GenerationError, match=says):
        models[0].generate(torch.tensor([[4, 5]]), max_new_tokens=2, **options)


@pytest.mark.parametrize("score", [float("nan"), float("-inf")])
@pytest.mark.parametrize("do_sample", [False, True])
def test_processors_that_leave_no_token_are_an_error(models, score, do_sample):
    def no_token(input_ids, scores):
        return torch.full_like(scores, score)

    ours = models[0]
    with pytest.raises(GenerationError, match="no token is left"):
        ours.generate(torch.tensor([[1, 2]]), do_sample=do_sample, logits_processor=[no_token])
