"""A small BPE tokenizer and the text that it was trained on, for tests of tokenizers."""

from __future__ import annotations

import pytest

from gpt2fast.tokenizer import (
    BPETokenizer,
)

TRAINING_TEXT = (
    "It was the best of times, it was the worst of times; I'd say it's 1859,\n"
    "wasn't it? We've  seen\tthe   age of wisdom, and they'll see it again.\n\n\n"
    "    def times(the, age):\n        return the * age  # Ünïcödé, Привет, 你好, 🤗\n"
    "<|endoftext|>\n"
) * 4


@pytest.fixture(scope="module")
def trained() -> BPETokenizer:
    return BPETokenizer.train([TRAINING_TEXT], 360)
