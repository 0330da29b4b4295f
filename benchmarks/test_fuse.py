"""A transformers model beside itself after `gpt2fast.fuse`: training steps and generation.

    python -m pytest benchmarks/test_fuse.py --benchmark-only

GPT-2 124M with random weights. Losses must be equal to 1e-4 and tokens the same, so that equal work
is compared.
"""

from __future__ import annotations

import copy

import pytest
import torch

import gpt2fast

transformers = pytest.importorskip("transformers")


def _model():
    torch.manual_seed(0)
    config = transformers.GPT2Config(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    return transformers.GPT2LMHeadModel(config)


@pytest.mark.parametrize(("batch", "time"), [(4, 256), (1, 1024)])
def test_training_step(versus, batch, time):
    plain = _model().train()
    fused = gpt2fast.fuse(copy.deepcopy(plain))
    tokens = torch.randint(50257, (batch, time))
    losses: dict[bool, list[float]] = {True: [], False: []}

    def steps_of(model, is_ours):
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, fused=True)

        def step():
            loss = model(input_ids=tokens, labels=tokens).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[is_ours].append(loss.item())

        return step

    versus(steps_of(fused, True), steps_of(plain, False), rounds=5)
    for ours, theirs in zip(*losses.values(), strict=True):
        assert abs(ours - theirs) < 1e-4 * theirs


@pytest.mark.parametrize(("batch", "prompt", "new"), [(1, 128, 128), (8, 128, 32)])
@pytest.mark.parametrize("generate", [False, True])
def test_generation(versus, batch, prompt, new, generate):
    plain = _model().eval()
    fused = gpt2fast.fuse(copy.deepcopy(plain), generate=generate)
    options = {
        "input_ids": torch.randint(50257, (batch, prompt)), "max_new_tokens": new,
        "min_new_tokens": new, "do_sample": False, "pad_token_id": 0,
    }  # fmt: skip
    options["attention_mask"] = torch.ones_like(options["input_ids"])
    assert torch.equal(fused.generate(**options), plain.generate(**options))
    versus(lambda: fused.generate(**options), lambda: plain.generate(**options), rounds=3)
