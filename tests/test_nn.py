"""The modules inside somebody else's model."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from gpt2fast.nn import GELUMLP, Block, CausalSelfAttention, LinearCrossEntropy, ResidualLayerNorm


def test_attention_equals_torchs_multihead_attention():
    ours = CausalSelfAttention(48, 3)
    theirs = nn.MultiheadAttention(48, 3, batch_first=True)
    with torch.no_grad():
        theirs.in_proj_weight.copy_(ours.c_attn.weight.t())
        theirs.in_proj_bias.copy_(ours.c_attn.bias)
        theirs.out_proj.weight.copy_(ours.c_proj.weight.t())
        theirs.out_proj.bias.copy_(ours.c_proj.bias)
    x = torch.randn(2, 17, 48)
    hidden = ~torch.ones(17, 17).tril().bool()
    assert torch.allclose(ours(x), theirs(x, x, x, attn_mask=hidden)[0], atol=1e-6)


def test_blocks_stack_in_a_sequential_model_and_learn():
    model = nn.Sequential(nn.Embedding(11, 32), Block(32, 4), Block(32, 4), nn.Linear(32, 11))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    ids = torch.arange(24).view(2, 12) % 11
    losses = []
    for _ in range(30):
        loss = F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 10


def test_a_block_equals_its_formula():
    block = Block(24, 3, inner=40, activation="relu", eps=1e-3)
    x = torch.randn(2, 9, 24)
    x1 = x + block.attn(F.layer_norm(x, (24,), block.ln_1.weight, block.ln_1.bias, 1e-3))
    expected = x1 + block.mlp(F.layer_norm(x1, (24,), block.ln_2.weight, block.ln_2.bias, 1e-3))
    assert torch.allclose(block(x), expected, atol=1e-6)


def test_a_block_takes_a_mask_of_zeros_and_ones():
    block = Block(24, 3)
    x, mask = torch.randn(2, 5, 24), torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    expected = block(x, mask.bool())
    assert torch.equal(block(x, mask), expected)
    assert torch.equal(block(x, mask.float()), expected)
    assert torch.allclose(block(x[:1, 2:]), expected[:1, 2:], atol=1e-6)


def test_residual_layer_norm_returns_the_stream_to_go_on_with():
    norm = ResidualLayerNorm(16)
    x, residual = torch.randn(3, 16), torch.randn(3, 16)
    normed, summed = norm(x, residual)
    assert torch.equal(summed, x + residual)
    assert torch.allclose(normed, F.layer_norm(summed, (16,)), atol=1e-6)


@pytest.mark.parametrize("activation", ["gelu_new", "gelu", "relu", "silu", "tanh"])
def test_mlp_applies_its_activation(activation):
    mlp = GELUMLP(16, activation=activation)
    functions = {
        "gelu_new": lambda x: F.gelu(x, approximate="tanh"),
        "gelu": F.gelu,
        "relu": F.relu,
        "silu": F.silu,
        "tanh": torch.tanh,
    }
    x = torch.randn(2, 5, 16)
    inner = functions[activation](x @ mlp.c_fc.weight + mlp.c_fc.bias)
    assert torch.allclose(mlp(x), inner @ mlp.c_proj.weight + mlp.c_proj.bias, atol=1e-6)


def test_loss_takes_any_leading_shape():
    loss = LinearCrossEntropy(ignore_index=-1)
    hidden, weight = torch.randn(2, 5, 16), torch.randn(9, 16)
    targets = torch.randint(-1, 9, (2, 5))
    logits = (hidden @ weight.t()).flatten(0, 1)
    expected = F.cross_entropy(logits, targets.flatten(), ignore_index=-1)
    assert torch.allclose(loss(hidden, weight, targets), expected)


def test_sizes_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match=r"width=30 .* heads=4"):
        CausalSelfAttention(30, 4)
    with pytest.raises(ValueError, match="'mish'"):
        GELUMLP(16, activation="mish")
    for dropout in (-0.1, 1.0, 2.0, float("nan")):
        with pytest.raises(ValueError, match=f"dropout={dropout} is not a probability"):
            Block(16, 4, dropout=dropout)
        with pytest.raises(ValueError, match=f"dropout={dropout} is not a probability"):
            CausalSelfAttention(16, 4, dropout)


def test_state_dicts_carry_gpt2s_names():
    names = set(Block(8, 2).state_dict())
    assert {"ln_1.weight", "attn.c_attn.weight", "attn.c_proj.bias", "mlp.c_fc.weight"} <= names
