"""Many jobs at once: what a job gets is what it gets alone, and what a Generator gives."""

from __future__ import annotations

import random

import pytest

from gpt2fast import GPT2
from gpt2fast.inference.generator import Generator
from gpt2fast.inference.packed import PackedGPT2
from small_engines import TOKENIZER, assert_idle, job, skip_where_sums_vary, small_engine
from small_generators import small_model

TEXT = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
CALLS = [
    ("a", dict(do_sample=False, max_new_tokens=9)),
    (TEXT[:33], dict(do_sample=False, max_new_tokens=15)),
    (TEXT[:34], dict(seed=1, max_new_tokens=14)),
    ("bcd", dict(seed=2, max_new_tokens=80, temperature=1.5, top_k=0, eos_token_id=None)),
    ("bcd", dict(seed=10, max_new_tokens=70, eos_token_id=None)),
    (TEXT[:17], dict(seed=3, max_new_tokens=20, repetition_penalty=1.3)),
    (TEXT[:33], dict(seed=4, max_new_tokens=12, logprobs=True, top_logprobs=3)),
    (TEXT[3:20], dict(seed=5, max_new_tokens=20, frequency_penalty=0.7, eta_cutoff=0.01)),
    ("hello", dict(do_sample=False, max_new_tokens=18, no_repeat_ngram_size=2)),
    ("hello", dict(seed=6, max_new_tokens=18, min_new_tokens=18, bad_words=["a", "bc"])),
    (TEXT[:32], dict(seed=7, max_new_tokens=16, stop=["a", "Qr"], eos_token_id=None)),
    (TEXT[:16], dict(do_sample=False, max_new_tokens=7, logprobs=True)),
    (TEXT[:33], dict(seed=8, max_new_tokens=1)),
    ("xyz", dict(max_new_tokens=0, seed=9, logprobs=True, top_logprobs=1)),
    ("xyz", dict(max_new_tokens=0, do_sample=False)),
]


def watched(model: GPT2) -> GPT2:
    """A model that has to run through its modules."""
    model.h[0].get_submodule("mlp").register_forward_hook(lambda module, args, output: output)
    return model


FORMS = {
    "float32": lambda: small_model(n_positions=96).pack(),
    "bfloat16": lambda: small_model(n_positions=96).bfloat16().pack(),
    "int8": lambda: small_model(n_positions=96).quantize("int8"),
    "int4": lambda: small_model(n_positions=96).quantize("int4"),
    "modules": lambda: watched(small_model(n_positions=96)),
}


@pytest.fixture(params=FORMS)
def model(request):
    if request.param != "modules":
        skip_where_sums_vary(request.param)
    return FORMS[request.param]()


def test_jobs_get_what_a_generator_gives(model):
    generator = Generator(model, TOKENIZER)
    with small_engine(model) as engine:
        results = list(engine.run(job(model, prompt, **options) for prompt, options in CALLS))
        assert_idle(engine)
    for (prompt, options), result in zip(CALLS, results, strict=True):
        wanted = generator(prompt, **options)
        assert result.tokens == wanted.tokens, (prompt, options)
        assert (result.text, result.finish_reason) == (wanted.text, wanted.finish_reason)
        assert (result.seed, result.prompt) == (wanted.seed, wanted.prompt)
        assert result.prompt_token_ids == wanted.prompt_token_ids
        if isinstance(model, PackedGPT2):
            assert result.logprobs == wanted.logprobs
        for name in ("logprobs", "prompt_logprobs"):
            found, known = getattr(result, name), getattr(wanted, name)
            assert (found is None) == (known is None)
            if known is not None:
                assert found == pytest.approx(known, abs=0.05)
        if wanted.top_logprobs is not None:
            assert [list(top) for top in result.top_logprobs] == [
                list(top) for top in wanted.top_logprobs
            ]


def alone(model, calls):
    """Each call's result from an engine that has nothing else to do."""
    results = []
    for prompt, options in calls:
        with small_engine(model, max_rows=1) as engine:
            results += engine.run([job(model, prompt, **options)])
    return results


def test_a_prompt_is_the_same_wherever_it_is_cut():
    """A Generator reads 512 tokens at a time, whatever prompts they are of."""
    skip_where_sums_vary("float32")
    model = small_model(n_positions=640).pack()
    generator = Generator(model, TOKENIZER)
    text = (TEXT * 10)[:513]
    options = dict(do_sample=False, max_new_tokens=3, logprobs=True, eos_token_id=None)
    wanted = generator(text, **options)
    assert generator([text[:100], text], **options)[1] == wanted
    for chunk_tokens in (512, 256, 32):
        with small_engine(model, chunk_tokens=chunk_tokens) as engine:
            assert next(engine.run([job(model, text, **options)])) == wanted


@pytest.mark.parametrize("seed", range(3))
def test_company_changes_nothing(model, seed):
    calls = [*CALLS, *CALLS]
    wanted = alone(model, CALLS) * 2
    chance = random.Random(seed)
    order = list(range(len(calls)))
    chance.shuffle(order)
    tickets, cancelled = {}, []
    with small_engine(model, max_rows=5, cache_tokens=96, chunk_tokens=32) as engine:
        while order or not all(ticket.done for ticket in tickets.values()):
            if order and chance.random() < 0.6:
                place = order.pop()
                tickets[place] = engine.submit(job(model, calls[place][0], **calls[place][1]))
            if chance.random() < 0.2:  # a neighbor that leaves
                cancelled.append(engine.submit(job(model, TEXT[:30], max_new_tokens=10)))
            if cancelled and chance.random() < 0.2:
                cancelled.pop(0).cancel()
            engine.step()
        for ticket in cancelled:
            ticket.cancel()
        engine.step()
        assert_idle(engine)
        assert engine.stats().prefix_hit_tokens > 0
        assert engine.stats().preemptions > 0
    for place, ticket in tickets.items():
        assert ticket.result() == wanted[place], calls[place]


def test_texts_run_together_through_modules_as_on_a_gpu(monkeypatch):
    model = watched(small_model(n_positions=96))
    wanted = alone(model, CALLS)
    with small_engine(model, cache_tokens=96) as engine:
        monkeypatch.setattr(engine._worker._model, "_is_cpu", False)
        results = list(engine.run(job(model, prompt, **options) for prompt, options in CALLS))
        assert engine.stats().steps < engine.stats().generated_tokens
        assert_idle(engine)
    for found, known in zip(results, wanted, strict=True):
        assert (found.tokens, found.text) == (known.tokens, known.text)
        if known.logprobs is not None:
            assert found.logprobs == pytest.approx(known.logprobs, abs=1e-4)
