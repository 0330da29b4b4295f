"""Every spelling and layout of GPT-2's weights loads, nanoGPT's checkpoints included."""

# ruff: noqa: F401, F811 (imported fixtures)

from __future__ import annotations

import json
import re
from collections import OrderedDict
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from gpt2fast import GPT2, PRESETS, GPT2Config
from gpt2fast.checkpoints.tensor_files import write_safetensors
from gpt2fast.errors import ConfigError, WeightsError
from small_checkpoints import (
    DTYPES,
    LINEAR,
    TINY,
    assert_same_parameters,
    big,
    openai_name,
    random_model,
    tokens,
    write_config,
)


@pytest.mark.parametrize("tied", [True, False])
def test_what_transformers_saves_loads(tmp_path, tied):
    from transformers import GPT2LMHeadModel

    source, saved = tmp_path / "ours", tmp_path / "theirs"
    config = replace(TINY, tie_word_embeddings=tied, dropout=None)
    model = random_model(config)
    model.save_pretrained(source)
    GPT2LMHeadModel.from_pretrained(source).save_pretrained(saved)
    loaded = GPT2.from_pretrained(saved)
    assert loaded.config == config
    assert_same_parameters(loaded, model)


def test_shards_load(tmp_path):
    from transformers import GPT2LMHeadModel

    model = random_model()
    model.save_pretrained(tmp_path / "ours")
    theirs = GPT2LMHeadModel.from_pretrained(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "shards", max_shard_size="30KB")
    assert len(list((tmp_path / "shards").glob("model-*.safetensors"))) > 2
    assert_same_parameters(GPT2.from_pretrained(tmp_path / "shards"), model)


@pytest.mark.parametrize("legacy", [False, True])
def test_sharded_pickles_load(tmp_path, legacy):
    model = random_model()
    state = list(model.state_dict().items())
    weight_map = {}
    for number, part in enumerate((state[:9], state[9:])):
        shard = f"pytorch_model-{number}.bin"
        torch.save(dict(part), tmp_path / shard, _use_new_zipfile_serialization=not legacy)
        weight_map |= dict.fromkeys(dict(part), shard)
    index = tmp_path / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    write_config(tmp_path)
    assert_same_parameters(GPT2.from_pretrained(tmp_path), model)


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_pickled_checkpoints_load_with_masks_and_a_tied_head(tmp_path, dtype, legacy):
    model = random_model(dtype=dtype)
    state = {f"transformer.{name}": tensor for name, tensor in model.state_dict().items()}
    for layer in range(2):
        state[f"transformer.h.{layer}.attn.bias"] = torch.ones(1, 1, 24, 24, dtype=torch.uint8)
        state[f"transformer.h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)
    state["lm_head.weight"] = state["transformer.wte.weight"]
    path = tmp_path / "pytorch_model.bin"
    torch.save(OrderedDict(state), path, _use_new_zipfile_serialization=not legacy)
    write_config(tmp_path)
    assert_same_parameters(GPT2.from_pretrained(tmp_path), model)


# Spellings


SPELLINGS = {
    "plain": lambda name: name,
    "transformer": lambda name: f"transformer.{name}",
    "compiled": lambda name: f"_orig_mod.transformer.{name}",
    "parallel": lambda name: f"module.transformer.{name}",
    "both": lambda name: f"module._orig_mod.transformer.{name}",
    "both, the other way": lambda name: f"_orig_mod.module.{name}",
    "inside": lambda name: f"transformer._orig_mod.{name}",
    "blocks compiled": lambda name: re.sub(r"^(h\.\d+)", r"transformer.\1._orig_mod", name),
    "lightning": lambda name: f"model.transformer.{name}",
    "g, b and w": lambda name: re.sub(
        r"\.bias$",
        ".b",
        re.sub(r"(c_\w+)\.weight$", r"\1.w", re.sub(r"(ln_\w)\.weight", r"\1.g", name)),
    ),
    "OpenAI": openai_name,
}


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling_of_names_loads(tmp_path, spelling, suffix):
    model = random_model()
    state = {SPELLINGS[spelling](name): t for name, t in model.state_dict().items()}
    path = tmp_path / f"weights.{suffix}"
    write_safetensors(path, state) if suffix == "safetensors" else torch.save(state, path)
    write_config(tmp_path)
    assert_same_parameters(GPT2.from_pretrained(path), model)


def test_openais_one_dimensional_convolutions_load(tmp_path):
    model = random_model()
    state = {
        openai_name(name): tensor[None] if name.endswith(LINEAR) else tensor
        for name, tensor in model.state_dict().items()
    }
    write_safetensors(tmp_path / "model.safetensors", state)
    write_config(tmp_path)
    assert_same_parameters(GPT2.from_pretrained(tmp_path), model)


def test_projections_stored_as_linear_layers_load_square_ones_included(tmp_path):
    model = random_model()
    state = {
        name: tensor.t().contiguous() if name.endswith(LINEAR) else tensor
        for name, tensor in model.state_dict().items()
    }
    assert state["h.0.attn.c_proj.weight"].shape == (24, 24)
    write_safetensors(tmp_path / "model.safetensors", state)
    write_config(tmp_path)
    loaded = GPT2.from_pretrained(tmp_path)
    assert_same_parameters(loaded, model)
    assert all(parameter.is_contiguous() for parameter in loaded.parameters())


@pytest.mark.parametrize("wrapper", ["model", "state_dict", "model_state_dict"])
def test_a_training_checkpoint_is_unwrapped(tmp_path, wrapper):
    model = random_model()
    content = {wrapper: model.state_dict(), "epoch": 3, "optimizer": {"state": {}}}
    torch.save(content, tmp_path / "last.pth")
    write_config(tmp_path)
    assert_same_parameters(GPT2.from_pretrained(tmp_path / "last.pth"), model)


def test_one_tensor_under_two_names_must_be_the_same(tmp_path):
    state = random_model().state_dict()
    write_config(tmp_path)
    path = tmp_path / "model.safetensors"
    write_safetensors(path, state | {"transformer.wpe.weight": state["wpe.weight"].clone()})
    GPT2.from_pretrained(tmp_path)
    write_safetensors(path, state | {"transformer.wpe.weight": state["wpe.weight"] + 1})
    with pytest.raises(WeightsError, match="both mean wpe.weight"):
        GPT2.from_pretrained(tmp_path)


# The head


@pytest.mark.parametrize("configured_tied", [True, False])
@pytest.mark.parametrize("head", ["absent", "equal", "different", "alone"])
def test_a_stored_head_means_what_it_means_to_transformers(tmp_path, head, configured_tied):
    from transformers import GPT2LMHeadModel

    config = replace(TINY, tie_word_embeddings=configured_tied, dropout=None)
    state = {f"transformer.{n}": t for n, t in random_model().state_dict().items()}
    embedding = state["transformer.wte.weight"]
    if head != "absent":
        state["lm_head.weight"] = embedding + 1 if head == "different" else embedding.clone()
    if head == "alone":
        del state["transformer.wte.weight"]
    write_safetensors(tmp_path / "model.safetensors", state)
    write_config(tmp_path, config)
    if not configured_tied and head in ("absent", "alone"):
        # transformers would draw the missing matrix at random, and say so.
        missing = "lm_head.weight" if head == "absent" else "wte.weight"
        with pytest.raises(WeightsError, match=rf"1 missing: {missing} \(61, 24\)"):
            GPT2.from_pretrained(tmp_path)
        return
    model = GPT2.from_pretrained(tmp_path)
    theirs = GPT2LMHeadModel.from_pretrained(tmp_path).eval()
    assert model.config.tie_word_embeddings == (configured_tied and head != "different")
    with torch.no_grad():
        torch.testing.assert_close(model(tokens()).logits, theirs(tokens()).logits)
    if not model.config.tie_word_embeddings:
        storages = {p.untyped_storage().data_ptr() for p in model.parameters()}
        assert len(storages) == len(list(model.parameters()))


# nanoGPT


class NanoGPT(nn.Module):
    """nanoGPT's model in short: the same modules and names, nn.Linear and F.layer_norm."""

    def __init__(self, n_layer, n_head, n_embd, block_size, bias, vocab_size, dropout):
        super().__init__()
        self.n_head = n_head

        def norm():
            module = nn.LayerNorm(n_embd)
            if not bias:
                module.bias = None
            return module

        def block():
            return nn.ModuleDict(
                {
                    "ln_1": norm(),
                    "attn": nn.ModuleDict(
                        {
                            "c_attn": nn.Linear(n_embd, 3 * n_embd, bias=bias),
                            "c_proj": nn.Linear(n_embd, n_embd, bias=bias),
                        }
                    ),
                    "ln_2": norm(),
                    "mlp": nn.ModuleDict(
                        {
                            "c_fc": nn.Linear(n_embd, 4 * n_embd, bias=bias),
                            "c_proj": nn.Linear(4 * n_embd, n_embd, bias=bias),
                        }
                    ),
                }
            )

        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(vocab_size, n_embd),
                "wpe": nn.Embedding(block_size, n_embd),
                "h": nn.ModuleList(block() for _ in range(n_layer)),
                "ln_f": norm(),
            }
        )
        self.lm_head = nn.Linear(n_embd, vocab_size, bias=False)
        self.transformer.wte.weight = self.lm_head.weight

    def forward(self, ids):
        parts = self.transformer
        x = parts.wte(ids) + parts.wpe(torch.arange(ids.shape[1]))
        for block in parts.h:
            packed = block.attn.c_attn(block.ln_1(x))
            q, k, v = (
                t.unflatten(-1, (self.n_head, -1)).transpose(1, 2) for t in packed.chunk(3, -1)
            )
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + block.attn.c_proj(y.transpose(1, 2).flatten(2))
            x = x + block.mlp.c_proj(F.gelu(block.mlp.c_fc(block.ln_2(x))))
        return self.lm_head(parts.ln_f(x))


def nanogpt_checkpoint(path: Path, bias: bool, prefix: str = "", **changes: object) -> NanoGPT:
    arguments = {
        "n_layer": 2,
        "n_head": 3,
        "n_embd": 24,
        "block_size": 16,
        "bias": bias,
        "vocab_size": 65,
        "dropout": 0.2,
    }
    torch.manual_seed(0)
    model = NanoGPT(**arguments).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape) * 0.3)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95))
    model(torch.zeros(1, 4, dtype=torch.long)).sum().backward()
    state = {prefix + name: tensor for name, tensor in model.state_dict().items()}
    optimizer.step()
    torch.save(
        {
            "model": {name: tensor.clone() for name, tensor in model.state_dict().items()}
            if not prefix
            else state,
            "optimizer": optimizer.state_dict(),
            "model_args": arguments | changes,
            "iter_num": 100,
            "best_val_loss": torch.tensor(1.5),
            "config": {"dataset": "shakespeare_char", "beta2": 0.99, "compile": False},
        },
        path,
    )
    return model


@pytest.mark.parametrize("where", ["ckpt.pt", "."])
@pytest.mark.parametrize("prefix", ["", "_orig_mod."])
@pytest.mark.parametrize("bias", [True, False])
def test_nanogpts_checkpoint_gives_nanogpts_logits(tmp_path, bias, prefix, where):
    theirs = nanogpt_checkpoint(tmp_path / "ckpt.pt", bias, prefix)
    model = GPT2.from_pretrained(tmp_path / where)
    assert model.config.activation_function == "gelu"
    assert model.config.resid_pdrop == model.config.embd_pdrop == model.config.attn_pdrop == 0.2
    assert model.config.eos_token_id is None
    ids = torch.randint(0, 65, (3, 16))
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, theirs(ids), rtol=1e-5, atol=1e-5)


def test_a_ckpt_that_is_not_nanogpts_is_described_by_config_json(tmp_path):
    model = random_model()
    torch.save({"model": model.state_dict(), "epoch": 3}, tmp_path / "ckpt.pt")
    write_config(tmp_path)
    assert_same_parameters(GPT2.from_pretrained(tmp_path), model)
    theirs = nanogpt_checkpoint(tmp_path / "ckpt.pt", True)  # which describes itself
    assert GPT2.from_pretrained(tmp_path).config.vocab_size == len(theirs.transformer.wte.weight)


def test_a_variant_of_nanogpt_is_refused(tmp_path):
    nanogpt_checkpoint(tmp_path / "ckpt.pt", True, use_rotary=True)
    with pytest.raises(WeightsError, match="'use_rotary'=True is not nanoGPT's"):
        GPT2.from_pretrained(tmp_path)
    nanogpt_checkpoint(tmp_path / "ckpt.pt", True, n_head=5)
    with pytest.raises(ConfigError, match="ckpt.pt: model_args: n_embd=24"):
        GPT2.from_pretrained(tmp_path)


# Architecture


@pytest.mark.parametrize("preset", PRESETS)
def test_parameter_shapes_are_the_models(preset):
    for tied in (True, False):
        config = GPT2Config.preset(preset, tie_word_embeddings=tied)
        built = GPT2(config, device="meta").state_dict()
        assert {
            name: tuple(tensor.shape) for name, tensor in built.items()
        } == config.parameter_shapes()
        count = sum(torch.Size(shape).numel() for shape in config.parameter_shapes().values())
        assert count == config.parameter_count


def test_gpt2_of_real_size_loads_as_in_transformers_and_is_recognized_by_its_shapes(big):
    from transformers import GPT2Config as TheirConfig
    from transformers import GPT2LMHeadModel

    torch.manual_seed(0)
    theirs = GPT2LMHeadModel(TheirConfig()).eval()
    theirs.save_pretrained(big)
    ids = torch.randint(0, 50257, (1, 12))
    with torch.no_grad():
        expected = theirs(ids).logits
        for options in ({}, {"preset": "gpt2"}):
            if options:
                (big / "config.json").unlink()
            model = GPT2.from_pretrained(big, **options)
            torch.testing.assert_close(model(ids).logits, expected, rtol=1e-4, atol=1e-4)
    bare = GPT2.from_pretrained(big / "model.safetensors")
    assert bare.config == GPT2Config.preset("gpt2")
    with pytest.raises(WeightsError, match="does not fit a GPT-2 of 24 layers"):
        GPT2.from_pretrained(big, preset="gpt2-medium")


def test_a_state_dict_of_unknown_architecture_says_what_to_give(tmp_path):
    path = tmp_path / "weights.pth"
    torch.save(random_model().state_dict(), path)
    with pytest.raises(WeightsError) as caught:
        GPT2.from_pretrained(path)
    message = str(caught.value)
    assert str(path) in message and "preset" in message and "config.json" in message
    assert "(61, 24)" in message and "2 layers" in message
