"""Prompt lookup against decoding token by token: GPT-2 124M with random weights, scripted texts.

A model of random weights writes no code and no prose, so its steps are told what to write: after
each position the next token of a real text gets the highest score. Steps compute all that they
would, proposals are right or wrong as they would be for a model that wrote this text, and the time
of the peer, which decodes token by token, does not depend on what it writes.

Where ../shared/data (or GPT2FAST_DATA) has GPT-2's vocabulary and the books, those are taken; else
the bundled model's tokenizer, and no prose.

    python -m pytest benchmarks/test_speculation.py --benchmark-only
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

from gpt2fast import GPT2, Generator, GPT2Config
from gpt2fast.inference.batching.models import PackedSteps
from gpt2fast.tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parents[1]
DATA = Path(os.environ.get("GPT2FAST_DATA", ROOT.parent / "shared" / "data"))
PROMPT, NEW = 512, 128
GREEDY = {"temperature": 0, "max_new_tokens": NEW, "eos_token_id": None}


def code() -> str:
    """The middle of a long file of ours, which a model would be completing."""
    return (ROOT / "gpt2fast" / "cli" / "train.py").read_text()


def records() -> str:
    """JSON lines of one form, as answers of an API or a table are."""
    rows = json.loads((ROOT / "benchmarks" / "results" / "cpu_ops.json").read_text())["rows"]
    return "\n".join(json.dumps(row) for row in rows)


def quotations() -> str:
    """A passage, and an answer that is made of its sentences in another order."""
    passage = (ROOT / "README.md").read_text()[:1200]
    lines = [line for line in passage.splitlines() if len(line) > 40]
    return passage + "\n\nThe text says: " + " ".join(lines[2:] + lines[:2]) + passage


def prose() -> str:
    """A story."""
    books = DATA / "adventure_books.txt"
    if not books.exists():
        pytest.skip(f"no {books}")
    return books.read_text()[2_000_000:2_020_000]


TEXTS = {"code": code, "json": records, "quotations": quotations, "prose": prose}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    folder = DATA / "gpt2"
    return Tokenizer.from_pretrained(folder if folder.exists() else "adventures")


@pytest.fixture(scope="module", params=["float32", "bfloat16", "int8"])
def generator(request, tokenizer) -> Generator:
    torch.manual_seed(0)
    model = GPT2(GPT2Config(vocab_size=tokenizer.vocab_size, eos_token_id=None, bos_token_id=None))
    if request.param == "int8":
        packed = model.quantize("int8", method="nearest")
    else:
        packed = model.to(getattr(torch, request.param)).pack()
    return Generator(packed, tokenizer, notify=lambda _: None)


@pytest.fixture
def script(monkeypatch):
    """Call `script(tokens)`: what steps of the engine write from then on."""
    told = torch.empty(0, dtype=torch.int64)
    real = PackedSteps.step

    def step(self, given):
        logits = real(self, given)
        after = given.positions[given.outputs] + 1
        logits[torch.arange(len(after)), told[after]] = 1e9
        return logits

    def tell(tokens):
        nonlocal told
        told = torch.tensor(tokens)

    monkeypatch.setattr(PackedSteps, "step", step)
    return tell


@pytest.mark.parametrize("kind", TEXTS)
def test_lookup_against_token_by_token(versus, generator, tokenizer, script, kind):
    tokens = tokenizer.encode(TEXTS[kind]())[: PROMPT + NEW + 1]
    assert len(tokens) == PROMPT + NEW + 1
    prompt = tokenizer.decode(tokens[:PROMPT])
    read = len(tokenizer.encode(prompt))  # may differ at the cut
    script([*tokenizer.encode(prompt), *tokens[PROMPT:], *tokens[PROMPT:]])

    def lookup():
        # A new one has no texts of earlier calls to find.
        return Generator(generator.model, tokenizer, notify=lambda _: None)(
            prompt, speculate="lookup", **GREEDY
        )

    def plain():
        return generator(prompt, **GREEDY)

    assert lookup().tokens == tokens[PROMPT : PROMPT + NEW]
    assert plain().prompt_tokens == read
    versus(lookup, plain, rounds=5)
