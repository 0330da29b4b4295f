"""Small random models that find one token more likely than another."""

from __future__ import annotations

import torch

from gpt2fast import GPT2, GPT2Config


def small_predictor(vocab_size: int, n_layer: int, n_embd: int, n_positions: int) -> GPT2:
    """Of two heads, with large weights: far from a uniform distribution."""
    torch.manual_seed(0)
    config = GPT2Config(
        n_layer=n_layer, n_head=2, n_embd=n_embd, n_positions=n_positions, vocab_size=vocab_size
    )
    model = GPT2(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(5)
    return model
