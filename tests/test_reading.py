"""`Generator.score` and `Generator.embed`: log-probabilities and vectors of given texts."""

from __future__ import annotations

import pytest
import torch

from gpt2fast import GPT2, Generator, GPT2Config
from gpt2fast.errors import GenerationError
from gpt2fast.tokenizer import CharTokenizer
from tolerance import assert_allclose

ALPHABET = "abcdefghijklmnopqrstuvwxyz .\n"


@pytest.fixture
def generator() -> Generator:
    config = GPT2Config(
        vocab_size=len(ALPHABET),
        n_positions=12,
        n_embd=32,
        n_layer=2,
        n_head=2,
        initializer_range=0.3,
    )
    return Generator(
        GPT2(config).eval(), CharTokenizer({character: id for id, character in enumerate(ALPHABET)})
    )


TEXTS = [
    "abc",
    "z",
    "hello there.",
    "the quick brown fox jumps over the lazy dog.\n",
    "twelve chars",
]


def exactly(generator: Generator, tokens: list[int], place: int, begin: int) -> float:
    """Log-probability of one token after those from `begin` on."""
    read = torch.tensor([tokens[begin:place]])
    logits = generator.model(read).logits[0, -1]
    return float(logits.log_softmax(-1)[tokens[place]])


@pytest.mark.parametrize("stride", [1, 5, 12, None])
@pytest.mark.parametrize("start", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_every_token_is_scored_after_enough_others(generator, stride, start, packed, monkeypatch):
    if start:
        monkeypatch.setattr(CharTokenizer, "start_token_id", 7)
    scorer = Generator(generator.model.pack(), generator.tokenizer) if packed else generator
    found = scorer.score(TEXTS, stride=stride, start=start)
    step = 6 if stride is None else stride
    for text, scores in zip(TEXTS, found, strict=True):
        tokens = generator.tokenizer.encode(text)
        assert scores.token_ids == tokens and len(scores.logprobs) == len(tokens)
        whole = [7, *tokens] if start else tokens
        begins = [0] * min(13, len(whole))
        while len(begins) < len(whole):
            end = min(len(begins) + step, len(whole))
            begins += [end - 13] * (end - len(begins))
        right = [exactly(generator, whole, i, begins[i]) for i in range(1, len(whole))]
        logprobs = scores.logprobs if start else scores.logprobs[1:]
        assert start or scores.logprobs[0] is None
        assert_allclose(torch.tensor(logprobs), torch.tensor(right), rtol=1e-4, atol=1e-5)
        assert scores.total == pytest.approx(sum(right), rel=1e-4, abs=1e-4)


def test_nothing_is_scored_in_nothing(generator):
    assert generator.score([]) == []
    scores = generator.score([""])[0]
    assert scores.token_ids == [] == scores.logprobs and scores.total == 0.0


@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_vectors_are_pooled_hidden_states(generator, pooling):
    texts = [text[:12] for text in TEXTS] * 2
    vectors = generator.embed(texts, pooling=pooling)
    assert vectors.shape == (10, 32) and vectors.dtype == torch.float32
    for text, vector in zip(texts, vectors, strict=True):
        tokens = torch.tensor([generator.tokenizer.encode(text)])
        hidden = generator.model.hidden_states(tokens)[0].detach()
        right = hidden.mean(0) if pooling == "mean" else hidden[-1]
        assert_allclose(vector, right, rtol=1e-4, atol=1e-5)
    (vectors * torch.ones(32, requires_grad=True)).sum().backward()  # no tensor of inference mode


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda g: g.score("abc"), "texts is 'abc'; it must be a list"),
        (lambda g: g.score([3]), "text 1 is 3"),
        (lambda g: g.score(["abc"], stride=13), "stride is 13.*from 1 to.*12"),
        (lambda g: g.score(["abc"], stride=0), "stride is 0"),
        (lambda g: g.embed(["abc"], pooling="max"), "pooling is 'max'; choose one of mean, last"),
        (lambda g: g.embed(["abc", ""]), "text 2 has 0 tokens.*leave it out"),
        (lambda g: g.embed(["a" * 13]), "text 1 has 13 tokens.*12: cut it"),
        (lambda g: Generator(g.model.pack(), g.tokenizer).embed(["a"]), "packed and quantized"),
    ],
)
def test_what_cannot_be_read_is_refused(generator, call, says):
    with pytest.raises(GenerationError, match=says):
        call(generator)


def test_models_that_compute_no_numbers_are_named(generator):
    with torch.no_grad():
        generator.model.ln_f.weight.fill_(float("nan"))
    for read in (generator.score, generator.embed):
        with pytest.raises(GenerationError, match="not a number"):
            read(["abc"])
