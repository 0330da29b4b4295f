"""The host's side of work on a GPU, on a machine without one: what is compiled there."""

from __future__ import annotations

import torch

from gpt2fast import GPT2, GPT2Config
from gpt2fast.inference import packing


def small_model() -> GPT2:
    torch.manual_seed(1)
    config = GPT2Config(n_layer=2, n_head=2, n_embd=32, vocab_size=61, n_positions=64)
    return GPT2(config).eval()


def test_a_model_elsewhere_has_no_use_for_the_cpus_kernels(monkeypatch):
    asked = []
    monkeypatch.setattr(packing, "unavailable", lambda: asked.append(True))
    assert not small_model().to("meta").can_be_packed()
    assert asked == [], "they would be compiled now"
    assert small_model().can_be_packed() and asked
