"""The engine that runs many requests at once: GPT-2 124M with random weights.

Each comparison is with another way of ours to do the same; the ratio is its time over the engine's.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from gpt2fast import GPT2, Generator, GPT2Config
from gpt2fast.inference.batching import BatchEngine, Job
from gpt2fast.inference.requests import make_request
from gpt2fast.tokenizer import CharTokenizer

CLIENTS, PROMPT, NEW = 32, 128, 128
LETTERS = [chr(0x10000 + place) for place in range(GPT2Config().vocab_size)]


@pytest.fixture(scope="module", params=["float32", "int8"])
def pair(request):
    """A model, and a tokenizer with a letter for each id."""
    model = GPT2(GPT2Config(eos_token_id=None, bos_token_id=None))
    packed = model.quantize("int8") if request.param == "int8" else model.pack()
    return packed, CharTokenizer({letter: id for id, letter in enumerate(LETTERS)})


@pytest.fixture
def engine(pair) -> Iterator[BatchEngine]:
    with BatchEngine(*pair, max_rows=CLIENTS + 1, cache_tokens=40 * 1024) as engine:
        yield engine


def prompt(length: int) -> list[int]:
    return torch.randint(len(LETTERS), (length,)).tolist()


def job(engine: BatchEngine, tokens: list[int], new_tokens: int) -> Job:
    request = make_request(
        engine.model, engine.tokenizer, do_sample=False, max_new_tokens=new_tokens
    )
    return Job(tokens, request)


def test_32_jobs_against_a_generators_batch(versus, pair):
    engine = BatchEngine(*pair, max_rows=CLIENTS, share_prefixes=False)
    generator = Generator(*pair)
    prompts = [prompt(PROMPT) for _ in range(CLIENTS)]
    texts = ["".join(LETTERS[id] for id in tokens) for tokens in prompts]

    def run_engine():
        return list(engine.run(job(engine, tokens, NEW) for tokens in prompts))

    def run_generator():
        return generator(texts, do_sample=False, max_new_tokens=NEW)

    assert [one.tokens for one in run_engine()] == [one.tokens for one in run_generator()]
    versus(run_engine, run_generator, rounds=3)


@pytest.mark.parametrize("length", [512, 500])
def test_a_prompt_that_was_read_before(versus, engine, length):
    """The peer is the same prompt's first request."""
    known = prompt(length)

    def again():
        return next(engine.run([job(engine, known, 1)]))

    def first():
        return next(engine.run([job(engine, prompt(length), 1)]))

    again()
    versus(again, first, rounds=5)


@pytest.mark.parametrize("length", [128, 512])
def test_first_token_while_16_texts_go_on(versus, pair, engine, length):
    """The peer has an engine to itself."""
    idle = BatchEngine(*pair, max_rows=2, share_prefixes=False)
    for _ in range(16):
        engine.submit(job(engine, prompt(PROMPT), 800))
    while engine.stats().generated_tokens < 32:
        engine.step()

    def beside():
        ticket = engine.submit(job(engine, prompt(length), 1))
        while not ticket.done:
            engine.step()

    def alone():
        return next(idle.run([job(idle, prompt(length), 1)]))

    versus(beside, alone, rounds=5)
    assert engine.stats().running == 16
