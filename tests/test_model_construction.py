"""Construction of models: from other configurations, without storage, under other names."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import GPT2Config as TheirConfig
from transformers import GPT2LMHeadModel, LlamaConfig
from transformers.activations import ACT2FN

from gpt2fast import GPT2, GPT2Config
from gpt2fast.config import ACTIVATION_NAMES
from gpt2fast.errors import ConfigError
from gpt2fast.nn import Block, LayerNorm, LinearCrossEntropy, ResidualLayerNorm
from gpt2fast.nn.mlp import Activation

CONFIG = GPT2Config(n_layer=2, n_head=2, n_embd=32, vocab_size=61, n_positions=16)
TOKENS = torch.tensor([[5, 7, 60], [0, 1, 2]])


@pytest.mark.parametrize("name", ACTIVATION_NAMES)
def test_an_activation_is_what_transformers_means_by_its_name(name, tmp_path):
    x = torch.linspace(-6, 6, 101)
    assert torch.allclose(Activation(name)(x), ACT2FN[name](x), atol=2e-6)
    model = GPT2(replace(CONFIG, dropout=None, activation_function=name)).eval()
    model.save_pretrained(tmp_path)
    theirs = GPT2LMHeadModel.from_pretrained(tmp_path).eval()
    assert theirs.config.activation_function == name
    assert torch.allclose(model(TOKENS).logits, theirs(TOKENS).logits, atol=1e-5)
    assert model.generate(TOKENS, max_new_tokens=5).shape == (2, 8)


@pytest.mark.parametrize("tied", [True, False])
def test_a_configuration_of_transformers_is_taken(tied):
    theirs = TheirConfig(
        n_layer=1, n_head=2, n_embd=16, vocab_size=61, n_positions=8, tie_word_embeddings=tied
    )
    model = GPT2(theirs)
    assert isinstance(model.config, GPT2Config) and model.config.n_embd == 16
    assert model.config.tie_word_embeddings is tied


@pytest.mark.parametrize("config", [LlamaConfig(), {"n_layer": 2}, None, "gpt2"])
def test_another_configuration_is_refused_by_its_name(config):
    with pytest.raises(ConfigError) as error:
        GPT2(config)
    assert type(config).__name__ in str(error.value) or "llama" in str(error.value)


def test_sizes_may_have_the_names_that_transformers_models_have_in_common():
    names = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = GPT2Config(**names, max_position_embeddings=16, vocab_size=61)
    assert config == CONFIG
    assert GPT2Config.from_dict({**names, "n_positions": 16, "vocab_size": 61}) == CONFIG
    with pytest.raises(ConfigError, match="n_embd=64 and hidden_size=32"):
        GPT2Config(n_embd=64, hidden_size=32)
    with pytest.raises(ConfigError, match="n_layer=3 and num_hidden_layers=2"):
        GPT2Config.from_dict({**names, "n_layer": 3})


@pytest.mark.parametrize("tied", [True, False])
def test_a_model_without_storage_gives_shapes(tied):
    config = replace(CONFIG, dropout=None, tie_word_embeddings=tied)
    model = GPT2(config, device="meta")
    out = model(TOKENS.to("meta"), labels=TOKENS.to("meta"))
    assert out.loss.is_meta and out.logits.shape == (2, 3, 61) and out.logits.is_meta


@pytest.mark.parametrize("tied", [True, False])
def test_a_model_is_initialized_after_it_was_given_storage(tied):
    """FSDP and the like call `reset_parameters` of each module that has one."""
    config = replace(CONFIG, dropout=None, tie_word_embeddings=tied)
    with torch.device("meta"):
        model = GPT2(config)
    model.to_empty(device="cpu")
    for parameter in model.parameters():
        nn.init.constant_(parameter, 1e9)  # as memory that somebody has left
    for module in model.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    straight = GPT2(config)
    for (name, mine), theirs in zip(model.named_parameters(), straight.parameters(), strict=True):
        if theirs.std() == 0:
            assert torch.equal(mine, theirs), name
        else:
            assert mine.std().item() == pytest.approx(theirs.std().item(), rel=0.2), name
    assert model(TOKENS, labels=TOKENS).loss.item() == pytest.approx(4.1, abs=0.3)


def test_a_block_says_what_it_takes():
    block = Block(16, 2)
    with pytest.raises(ValueError, match=r"\(3, 16\).*x\[None\]"):
        block(torch.randn(3, 16))
    with pytest.raises(ValueError, match=r"width=16"):
        block(torch.randn(2, 3, 8))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_the_loss_reduces_and_smooths_as_torchs(reduction, smoothing):
    hidden, weight = torch.randn(2, 5, 16).double(), torch.randn(9, 16).double()
    targets = torch.tensor([[1, -100, 3, 0, 8], [2, 2, -100, 7, 4]])
    results = []
    for ours in (True, False):
        leaves = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
        if ours:
            loss = LinearCrossEntropy(reduction=reduction, label_smoothing=smoothing)
            value = loss(*leaves, targets)
        else:
            value = F.cross_entropy(
                (leaves[0] @ leaves[1].t()).flatten(0, 1), targets.flatten(),
                reduction=reduction, label_smoothing=smoothing,
            )  # fmt: skip
            value = value.view(targets.shape) if reduction == "none" else value
        results.append([value, *torch.autograd.grad(value.square().sum(), leaves)])
    for mine, theirs in zip(*results, strict=True):
        assert torch.allclose(mine, theirs, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("affine", [{}, {"bias": False}, {"elementwise_affine": False}])
def test_norms_without_a_bias_or_a_weight_equal_torchs(affine):
    x, residual = torch.randn(2, 3, 16)
    mine, theirs = LayerNorm(16, **affine), nn.LayerNorm(16, **affine)
    assert [n for n, _ in mine.named_parameters()] == [n for n, _ in theirs.named_parameters()]
    assert torch.allclose(mine(x), theirs(x), atol=1e-6)
    normed, summed = ResidualLayerNorm(16, **affine)(x, residual)
    assert torch.equal(summed, x + residual)
    assert torch.allclose(normed, theirs(x + residual), atol=1e-6)
    assert mine.state_dict().keys() == theirs.state_dict().keys()


def test_modules_show_their_sizes():
    shown = repr(GPT2(CONFIG))
    for part in ("Embedding(61, 32)", "in_features=32, out_features=96", "heads=2", "gelu_new"):
        assert part in shown
