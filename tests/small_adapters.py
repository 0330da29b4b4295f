"""A small model, with and without low-rank adapters that have an effect."""

from __future__ import annotations

import torch

import small_checkpoints
from gpt2fast import GPT2, GPT2Config
from gpt2fast.lora import add_adapters
from gpt2fast.lora.adapters import adapted

# No two sizes alike, so that a tensor's shape says what it is.
CONFIG = GPT2Config(
    vocab_size=61, n_positions=24, n_embd=20, n_layer=3, n_head=2, n_inner=52, dropout=0.0,
    bos_token_id=None, eos_token_id=None,
)  # fmt: skip
ALL = "c_attn,c_proj,c_fc"


def random_model(config: GPT2Config = CONFIG) -> GPT2:
    return small_checkpoints.random_model(config)


def adapted_model(targets: str = "c_attn", **options) -> GPT2:
    """With adapters that have an effect."""
    model = random_model()
    torch.manual_seed(2)
    add_adapters(model, rank=3, alpha=6, targets=targets, **options)
    with torch.no_grad():
        for projection in adapted(model).values():
            projection.lora_B.normal_(std=0.2)
    return model


def tokens(rows: int = 2, time: int = 11) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(CONFIG.vocab_size, (rows, time), generator=generator)
