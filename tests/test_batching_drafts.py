"""Drafts change how many steps a text takes, grammars which texts there are, and neither more."""

from __future__ import annotations

import random
import re

import pytest
import torch

from gpt2fast.errors import GenerationError
from gpt2fast.inference.generator import Generator
from gpt2fast.inference.grammar import Grammar
from small_engines import TOKENIZER, assert_idle, job, skip_where_sums_vary, small_engine
from small_generators import small_model

CALLS = [
    ("a", dict(do_sample=False, max_new_tokens=30)),
    ("abcdefghijklmnopqrstuvw", dict(do_sample=False, max_new_tokens=20, logprobs=True)),
    ("bcd", dict(seed=2, max_new_tokens=60, temperature=1.5, eos_token_id=None)),
    ("efg", dict(seed=3, max_new_tokens=40, repetition_penalty=1.3, eos_token_id=None)),
    ("hij", dict(seed=4, max_new_tokens=40, presence_penalty=0.5, eos_token_id=None)),
    ("klm", dict(seed=5, max_new_tokens=40, stop=["a", "Qr", "9"], logprobs=True, top_logprobs=2)),
    ("nop", dict(seed=6, max_new_tokens=1)),
]


class Oracle:
    """Knows the texts, and is wrong now and then, or proposes what cannot be."""

    def __init__(self, texts, seed):
        self.texts, self.chance = texts, random.Random(seed)
        self.rows, self.right = {}, 0

    def propose(self, rows):
        proposals = []
        for row in rows:
            assert row.most >= 0
            self.rows[row.id] = row
            known = list(row.tokens)
            text = next(text for text in self.texts if text[: len(known)] == known)
            guess = text[len(known) : len(known) + self.chance.randrange(9)]
            if row.uniforms is not None and guess:
                assert all(0 <= number < 1 for number in row.uniforms(len(guess)))
            if guess and self.chance.random() < 0.4:
                guess[self.chance.randrange(len(guess))] = self.chance.choice([3, 5, 10**6])
            proposals.append(guess)
        return proposals

    def observe(self, row_id, proposed, accepted, tokens):
        row = self.rows[row_id]
        assert 0 <= accepted <= proposed <= row.most
        assert accepted <= len(tokens) <= accepted + 1
        self.right += accepted

    def forget(self, row_id):
        self.rows.pop(row_id, None)


@pytest.mark.parametrize("form", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("cache_tokens", [None, 96])
def test_drafts_change_no_text(form, cache_tokens):
    skip_where_sums_vary(form)
    model = small_model(n_positions=96)
    model = model.quantize("int8") if form == "int8" else model.to(getattr(torch, form))
    jobs = [job(model, prompt, **options) for prompt, options in CALLS]
    with small_engine(model) as engine:
        wanted = list(engine.run(jobs))
        steps = engine.stats().steps
    texts = [[*result.prompt_token_ids, *result.tokens] for result in wanted]
    for seed in range(3):
        oracle = Oracle(texts, seed)
        with small_engine(model, drafter=oracle, cache_tokens=cache_tokens) as engine:
            assert list(engine.run(jobs)) == wanted
            stats = engine.stats()
            assert_idle(engine)
        assert not oracle.rows, "an ended row was not forgotten"
        assert 0 < stats.accepted_tokens == oracle.right < stats.drafted_tokens
        if cache_tokens is None:
            assert stats.steps < steps


GRAMMARS = [
    (r"[a-f]{3,9}(xyz|[0-9]{2})", dict(seed=1, max_new_tokens=30)),
    (r"[a-f]{3,9}(xyz|[0-9]{2})", dict(seed=2, max_new_tokens=30, presence_penalty=1.0)),
    (r"[a-f]{3,9}(xyz|[0-9]{2})", dict(seed=3, max_new_tokens=4, repetition_penalty=1.2)),
    (r"(ab|cd|e){30}", dict(do_sample=False, max_new_tokens=20)),
    (r"[A-Z ]+", dict(seed=4, max_new_tokens=30, temperature=2.0, top_k=0)),
    (None, dict(seed=5, max_new_tokens=30)),
]


def constrained(model):
    pytest.importorskip("llguidance")
    jobs = []
    for pattern, options in GRAMMARS:
        grammar = None if pattern is None else Grammar.regex(pattern, TOKENIZER)
        jobs.append(job(model, "abc", grammar=grammar, **options))
    return jobs


def test_grammars_are_those_of_a_generator():
    model = small_model(n_positions=96).pack()
    generator = Generator(model, TOKENIZER)
    with small_engine(model) as engine:
        results = list(engine.run(constrained(model)))
        assert_idle(engine)
    for (pattern, options), result in zip(GRAMMARS, results, strict=True):
        grammar = None if pattern is None else Grammar.regex(pattern, TOKENIZER)
        wanted = generator("abc", grammar=grammar, **options)
        assert (result.text, result.tokens) == (wanted.text, wanted.tokens)
        assert result.finish_reason == wanted.finish_reason
        if pattern is not None and result.finish_reason in ("eos", "stop"):
            assert re.fullmatch(pattern, result.text)
    assert {result.finish_reason for result in results} >= {"stop", "length"}


def test_drafts_that_a_grammar_refuses_change_nothing():
    skip_where_sums_vary("float32")
    model = small_model(n_positions=96).pack()
    with small_engine(model) as engine:
        wanted = list(engine.run(constrained(model)))
    texts = [[*result.prompt_token_ids, *result.tokens] for result in wanted]
    for seed in range(4):
        with small_engine(model, drafter=Oracle(texts, seed)) as engine:
            assert list(engine.run(constrained(model))) == wanted
            assert engine.stats().accepted_tokens > 0
            assert_idle(engine)


def test_a_grammar_that_nothing_fits_ends_its_own_job():
    pytest.importorskip("llguidance")
    model = small_model(n_positions=96).pack()
    with small_engine(model) as engine:
        bad = engine.submit(
            job(model, "abc", grammar=Grammar.regex("ab{50}", TOKENIZER), bad_words=["b"])
        )
        good = engine.submit(job(model, "abc", grammar=Grammar.regex("a+", TOKENIZER)))
        with pytest.raises(GenerationError):
            bad.result()
        assert re.fullmatch("a+", good.result().text)
        assert_idle(engine)
