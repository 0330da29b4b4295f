"""Thousands of tokens from one cache, with sequences that come and go between the steps."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest
import torch

from comparison import BACKENDS
from gpt2fast import GPT2, GPT2Config, backend, ops
from gpt2fast.inference.engine import decoder_of
from gpt2fast.inference.packed import PackedGPT2

ROWS, LONGEST = 6, 64
OPTIONS = [
    {"temperature": 0.9, "top_k": 50, "top_p": 0.95},
    {"top_p": 0.9},
    {"repetition_penalty": 1.2, "no_repeat_ngram_size": 3, "min_p": 0.01},
]


def small_model():
    config = GPT2Config(
        n_layer=2, n_head=4, n_embd=64, vocab_size=5003, n_positions=LONGEST, dropout=0.0
    )
    model = GPT2(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            # Logits of some size, so that an error in them would show.
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


class Server:
    """Rows of a cache, each with a text; a text that has its length makes room for a new one."""

    def __init__(self, model):
        self.model = decoder_of(model)
        self.cache = self.model.new_cache(ROWS)
        self.random = random.Random(0)
        self.texts = [[] for _ in range(ROWS)]
        self.lengths = [0] * ROWS
        self.decoded = 0

    def step(self):
        """Append a token to each text, or begin another; returns the logits of the next ones."""
        counts = [1] * ROWS
        for row, text in enumerate(self.texts):
            if len(text) > self.lengths[row] or not text:
                vocab = self.model.config.vocab_size
                text[:] = [self.random.randrange(vocab) for _ in range(self.random.randint(1, 20))]
                self.lengths[row] = self.random.randint(len(text), LONGEST - 1)
                counts[row] = len(text)
                self.cache.release(torch.tensor([row]))
        self.decoded += ROWS
        if max(counts) == 1 and all(len(text) > 1 for text in self.texts):
            return self.model.decode_step(torch.tensor([t[-1] for t in self.texts]), self.cache)
        longest = max(len(text) for text in self.texts)
        tokens = torch.tensor([[-1] * (longest - len(text)) + text for text in self.texts])
        offsets = [len(text) - count for text, count in zip(self.texts, counts, strict=True)]
        return self.model.prefill(tokens, counts, offsets, self.cache)

    def choose(self, logits, options):
        """Draw each text's next token."""
        longest = max(len(text) for text in self.texts)
        history = torch.tensor([[-1] * (longest - len(text)) + text for text in self.texts])
        for text, token in zip(
            self.texts,
            ops.sample(logits, history, torch.rand(ROWS), **options).tolist(),
            strict=True,
        ):
            text.append(token)

    def branch(self):
        """Drop some texts and go on with two copies of the others."""
        kept = self.random.sample(range(ROWS), ROWS // 2)
        self.cache.reorder(torch.tensor(kept))
        self.cache.expand(2)
        self.texts = [list(self.texts[row]) for row in kept for _ in range(2)]
        self.lengths = [self.lengths[row] for row in kept for _ in range(2)]


def resident_bytes():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is read from /proc")
@pytest.mark.parametrize("name", BACKENDS[:2])
def test_long_decoding_keeps_to_the_uncached_logits_and_to_its_memory(name):
    model = small_model()
    steps = 2000 if name == "native" else 300
    warm = before = steps // 4
    with backend(name), torch.inference_mode():
        server = Server(model)
        assert isinstance(server.model, PackedGPT2) == (name == "native")
        for step in range(steps):
            logits = server.step()
            if step % 41 == 0:
                for row, text in enumerate(server.texts):
                    uncached = model(torch.tensor([text])).logits[0, -1]
                    assert (logits[row] - uncached).abs().max() < 1e-4
            server.choose(logits, OPTIONS[step % len(OPTIONS)])
            if step % 97 == 96:
                server.branch()
            if step == warm:
                before = resident_bytes()
    # A step's logits alone are 120 kB.
    assert resident_bytes() - before < 16 * 2**20
    assert server.decoded == steps * ROWS
