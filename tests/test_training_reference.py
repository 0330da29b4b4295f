"""Ten steps of training are those of transformers with torch's AdamW."""

from __future__ import annotations

import pytest
import torch

from gpt2fast import GPT2
from gpt2fast.training import TrainConfig
from gpt2fast.training.optimizers import ModelOptimizer

transformers = pytest.importorskip("transformers")

SMALL = {"n_layer": 3, "n_head": 4, "n_embd": 64, "vocab_size": 301, "n_positions": 48}


@pytest.mark.parametrize(
    ("shape", "batch", "time"),
    [
        pytest.param(SMALL, 3, 47, id="small"),
        pytest.param({}, 2, 64, id="124M", marks=pytest.mark.slow),
    ],
)
def test_ten_steps_equal_transformers_with_torchs_adamw(shape, batch, time, tmp_path):
    torch.manual_seed(0)
    no_dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(**shape, **no_dropout)).train()
    theirs.save_pretrained(tmp_path)
    ours = GPT2.from_pretrained(tmp_path, dtype=torch.float32).train()
    optimizers = ModelOptimizer(ours.named_parameters(), TrainConfig(weight_decay=0.1))
    named = [p for p in theirs.parameters() if p.requires_grad]
    reference = torch.optim.AdamW(
        [
            {"params": [p for p in named if p.dim() >= 2], "weight_decay": 0.1},
            {"params": [p for p in named if p.dim() < 2], "weight_decay": 0.0},
        ],
        lr=6e-4,
        betas=(0.9, 0.95),
    )
    losses = []
    for _ in range(10):
        ids = torch.randint(ours.config.vocab_size, (batch, time))
        optimizers.zero_grad()
        our_loss = ours(ids, labels=ids).loss
        our_loss.backward()
        torch.nn.utils.clip_grad_norm_(ours.parameters(), 1.0)
        optimizers.step(6e-4)
        reference.zero_grad()
        their_loss = theirs(ids, labels=ids).loss
        their_loss.backward()
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
        reference.step()
        losses.append((our_loss.item(), their_loss.item()))
        assert our_loss.item() == pytest.approx(their_loss.item(), abs=1e-4)
    assert losses[-1][0] != pytest.approx(losses[0][0], abs=1e-3)  # it did train
