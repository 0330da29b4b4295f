"""Models of fake tensors, which have shapes and no values."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from gpt2fast import GPT2, GPT2Config

SMALL = GPT2Config(n_layer=2, n_embd=24, n_head=3, vocab_size=61, n_positions=32, dropout=0.0)


@pytest.fixture
def fake():
    """The mode that fake tensors are made in, which is on."""
    with FakeTensorMode() as mode:
        yield mode


def test_a_forward_and_a_backward_pass_have_the_shapes_of_real_ones(fake):
    model = GPT2(SMALL)
    ids, mask = torch.zeros(2, 5, dtype=torch.int64), torch.ones(2, 5, dtype=torch.int64)
    output = model(ids, mask, labels=ids, output_hidden_states=True, output_attentions=True)
    output.loss.backward()
    assert output.loss.shape == () and output.logits.shape == (2, 5, 61)
    assert [x.shape for x in output.hidden_states] == 3 * [(2, 5, 24)]
    assert [x.shape for x in output.attentions] == 2 * [(2, 3, 5, 5)]
    assert all(p.grad.shape == p.shape for p in model.parameters())
    positions = mask.cumsum(1) - 1
    assert model(ids, position_ids=positions, use_cache=False).logits.shape == (2, 5, 61)
    assert model(ids, torch.ones(2, 1, 5, 5)).logits.shape == (2, 5, 61)
    assert model(inputs_embeds=torch.zeros(2, 5, 24)).logits.shape == (2, 5, 61)


@torch.no_grad()
def test_caches_and_steps_have_the_shapes_of_real_ones(fake):
    model = GPT2(SMALL)
    ids, mask = torch.zeros(2, 5, dtype=torch.int64), torch.ones(2, 6, dtype=torch.int64)
    cache = model.new_cache(2)
    model(ids, mask[:, :5], cache=cache)
    assert model(ids[:, :1], mask, cache=cache).logits.shape == (2, 1, 61)
    assert model.decode_step(ids[:, 0], cache).shape == (2, 61)
    cache.reorder(torch.tensor([1, 0]))
    cache.release(torch.tensor([0]))
    assert cache.k.shape == (2, 2, 32, 3, 8)


def test_a_fake_model_is_exported():
    with FakeTensorMode():
        model, ids = GPT2(SMALL), torch.zeros(2, 5, dtype=torch.int64)
    for strict in (False, True):
        program = torch.export.export(model, (ids,), {"return_dict": False}, strict=strict)
        outputs = next(node for node in program.graph.nodes if node.op == "output").args[0]
        assert [x.meta["val"].shape for x in outputs] == [(2, 5, 61)]
