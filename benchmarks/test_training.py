"""One training step of the `shakespeare_char` shape against transformers and torch's AdamW."""

from __future__ import annotations

import pytest
import torch

from gpt2fast import GPT2, GPT2Config
from gpt2fast.training.optimizer import AdamW

transformers = pytest.importorskip("transformers")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_training_step_against_transformers(versus, dtype):
    config = GPT2Config(
        vocab_size=65, n_positions=128, n_embd=256, n_layer=6, n_head=8, dropout=0.0,
        bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    ours = GPT2(config)
    values = config.to_dict()
    del values["architectures"], values["model_type"]
    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(**values)).train()
    tokens = torch.randint(65, (64, 129))
    our_optimizer = AdamW(ours, beta1=0.9, beta2=0.99, weight_decay=0.1)
    their_optimizer = torch.optim.AdamW(theirs.parameters(), lr=3e-4, betas=(0.9, 0.99))

    def autocast():
        return torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16")

    def our_step():
        our_optimizer.zero_grad()
        with autocast():
            loss = ours(tokens[:, :-1], targets=tokens[:, 1:]).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(ours.parameters(), 1.0)
        our_optimizer.step(3e-4)

    def their_step():
        their_optimizer.zero_grad()
        with autocast():
            loss = theirs(tokens[:, :-1], labels=tokens[:, :-1]).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
        their_optimizer.step()

    versus(our_step, their_step, rounds=5)
