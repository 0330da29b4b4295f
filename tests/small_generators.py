"""Models that generate in the tests: small random ones, and one whose text is known beforehand."""

from __future__ import annotations

import torch

from gpt2fast import GPT2, GPT2Config


def small_model(seed=0, **changes):
    torch.manual_seed(seed)
    shape = dict(
        vocab_size=61, n_positions=48, n_embd=24, n_layer=2, n_head=3,
        bos_token_id=7, eos_token_id=7, initializer_range=0.3,
    )  # fmt: skip
    return GPT2(GPT2Config(**{**shape, **changes}))


def successor_model(successors, config=None):
    """A GPT-2 in which token i is always followed by successors[i]."""
    size = len(successors)
    config = config or GPT2Config(
        vocab_size=size, n_positions=64, n_embd=size, n_layer=1, n_head=1,
        tie_word_embeddings=False, eos_token_id=None, bos_token_id=None,
    )  # fmt: skip
    model = GPT2(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not name.endswith("ln_f.weight"):
                parameter.zero_()
        model.wte.weight.copy_(torch.eye(size))
        model.lm_head.weight[torch.tensor(successors), torch.arange(size)] = 1.0
    return model
