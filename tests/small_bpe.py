"""A tokenizer of few tokens, and models for it or for more of them."""

from __future__ import annotations

import torch

from gpt2fast import GPT2, GPT2Config
from gpt2fast.tokenizer import BPETokenizer

TEXT = "the quick brown fox jumps over the lazy dog and runs away, as far as it can. " * 40
BPE = BPETokenizer.train([TEXT], 290)
SIZE = BPE.vocab_size


def random_model(rows: int = SIZE) -> GPT2:
    """With embeddings of so many tokens."""
    torch.manual_seed(0)
    config = GPT2Config(
        n_layer=2, n_head=2, n_embd=32, vocab_size=rows, n_positions=64, initializer_range=0.3,
        bos_token_id=SIZE - 1, eos_token_id=SIZE - 1,
    )  # fmt: skip
    return GPT2(config).eval()
