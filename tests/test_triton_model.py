"""A whole model on Triton kernels."""

from __future__ import annotations

import pytest
import torch
from torch.library import opcheck

from comparison import TRITON_BACKENDS, backend, random
from gpt2fast import GPT2, GPT2Config
from gpt2fast.ops.attention import _cached
from gpt2fast.ops.backend import record_calls
from gpt2fast.ops.cache import _append, _release, _reorder
from gpt2fast.ops.sampling import _sample


@pytest.mark.parametrize("name", TRITON_BACKENDS)
def test_training_and_generation_run_on_triton_kernels_alone(name):
    config = GPT2Config(vocab_size=61, n_positions=24, n_embd=24, n_layer=1, n_head=2, dropout=0.0)
    model = GPT2(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    ids = torch.randint(61, (2, 7))
    found = {}
    for each in ("reference", name):
        model.zero_grad()
        with backend(each), record_calls() as calls:
            loss = model(ids, labels=ids).loss
            loss.backward()
            tokens = model.generate(ids[:, :4], max_new_tokens=3)
        gradients = [parameter.grad for parameter in model.parameters()]
        found[each] = loss.detach(), gradients, tokens
    assert {call.backend for call in calls} == {"triton"}
    assert {"decode_step", "sample", "gelu_mlp_backward"} <= {call.op for call in calls}
    (expected_loss, expected, expected_tokens), (loss, gradients, tokens) = found.values()
    assert torch.allclose(loss, expected_loss, atol=1e-6)
    assert all(torch.allclose(*pair, atol=1e-5) for pair in zip(gradients, expected, strict=True))
    assert torch.equal(tokens, expected_tokens)


@pytest.mark.parametrize("name", TRITON_BACKENDS)
def test_ops_on_caches_pass_opcheck(name):
    k, v = (random(2, 3, 2, 16).float() for _ in "kv")
    k_cache, v_cache = (random(2, 9, 2, 16).float() for _ in "kv")
    lengths = torch.tensor([1, 5])
    with backend(name):
        opcheck(_append.call, (k, v, k_cache, v_cache, lengths, torch.tensor([2, 1])))
        opcheck(_reorder.call, (k_cache, v_cache, torch.tensor([1, 0])))
        opcheck(_release.call, (lengths, torch.tensor([1])))
        opcheck(_cached.call, (k, k_cache, v_cache, lengths, 0.25))
        scores, history = random(2, 30).float(), torch.randint(30, (2, 5))
        choice = (torch.rand(2), None, 0.8, 9, 0.9, 0.05, 0.95, 1.2, 2)
        opcheck(_sample.call, (scores, history, *choice))


@pytest.mark.parametrize("name", TRITON_BACKENDS)
def test_many_rows_trade_places(name):
    rows = torch.randint(300, (300,))
    k_cache, v_cache = (torch.randn(300, 3, 2, 5) for _ in "kv")
    expected = k_cache[rows], v_cache[rows]
    with backend(name):
        torch.ops.gpt2fast.reorder_cache(k_cache, v_cache, rows)
    assert torch.equal(k_cache, expected[0]) and torch.equal(v_cache, expected[1])
