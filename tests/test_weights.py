"""Checkpoints: every layout that people have loads, and transformers reads what we write."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
import warnings
from collections import OrderedDict
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn

import gpt2fast
from gpt2fast import GPT2, PRESETS, Error, GPT2Config
from gpt2fast.checkpoints.hub import BUNDLED
from gpt2fast.checkpoints.tensor_files import read_tensors, write_safetensors
from gpt2fast.errors import ConfigError, WeightsError

TINY = GPT2Config(
    vocab_size=61,
    n_positions=24,
    n_embd=24,
    n_layer=2,
    n_head=3,
    bos_token_id=None,
    eos_token_id=60,
    dropout=0.0,
)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LINEAR = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")


def random_model(config: GPT2Config = TINY, dtype: torch.dtype = torch.float32) -> GPT2:
    """No parameter at its initial zero or one: a swapped or lost one shows."""
    torch.manual_seed(0)
    model = GPT2(config, dtype=dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape) * 0.2)
    return model


def tokens(config: GPT2Config = TINY) -> torch.Tensor:
    return torch.randint(0, config.vocab_size, (2, 9), generator=torch.Generator().manual_seed(1))


def assert_same_parameters(loaded: GPT2, expected: GPT2) -> None:
    ours, theirs = loaded.state_dict(), expected.state_dict()
    assert list(ours) == list(theirs)
    for name in ours:
        assert ours[name].dtype == theirs[name].dtype, name
        assert torch.equal(ours[name], theirs[name]), name


def write_config(folder: Path, config: GPT2Config = TINY, **changes: object) -> None:
    (folder / "config.json").write_text(json.dumps(config.to_dict() | changes))


class no_warnings:
    """Fails if transformers, huggingface_hub or Python warn inside the block."""

    def __enter__(self):
        self.records: list[logging.LogRecord] = []
        self.handler = logging.Handler(logging.WARNING)
        self.handler.emit = self.records.append  # type: ignore[method-assign]
        for name in ("transformers", "huggingface_hub"):
            logging.getLogger(name).addHandler(self.handler)
        self.warnings = warnings.catch_warnings(record=True)
        self.caught = self.warnings.__enter__()
        warnings.simplefilter("always")

    def __exit__(self, *exception):
        self.warnings.__exit__(*exception)
        for name in ("transformers", "huggingface_hub"):
            logging.getLogger(name).removeHandler(self.handler)
        if exception[0] is None:
            messages = [r.getMessage() for r in self.records] + [
                str(w.message) for w in self.caught
            ]
            assert not messages


@pytest.fixture
def big(tmp_path):
    """A directory for hundreds of megabytes, emptied after the test."""
    folder = tmp_path / "big"
    folder.mkdir()
    yield folder
    shutil.rmtree(folder)


# What transformers reads and writes


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("activation", ["gelu_new", "gelu", "relu", "silu", "tanh"])
def test_transformers_loads_what_we_save_bit_for_bit(tmp_path, activation, tied, dtype):
    from transformers import GPT2LMHeadModel

    config = replace(
        TINY, activation_function=activation, tie_word_embeddings=tied, n_inner=40, dropout=None
    )
    model = random_model(config, dtype)
    model.save_pretrained(tmp_path)
    with no_warnings():
        theirs, report = GPT2LMHeadModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values())
    assert theirs.dtype == dtype
    for name, tensor in model.state_dict().items():
        prefix = "" if name == "lm_head.weight" else "transformer."
        assert torch.equal(theirs.state_dict()[prefix + name], tensor), name
    ids = tokens()
    close = 1e-5 if dtype == torch.float32 else 0.1
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, theirs(ids).logits, rtol=close, atol=close)

    again = GPT2.from_pretrained(tmp_path)
    assert again.config == config
    assert_same_parameters(again, model)


def test_the_saved_generation_config_is_the_models(tmp_path):
    from transformers import GenerationConfig, GPT2LMHeadModel

    random_model().save_pretrained(tmp_path)
    with no_warnings():
        saved = GenerationConfig.from_pretrained(tmp_path)
        model = GPT2LMHeadModel.from_pretrained(tmp_path)
        model.generate(tokens(), attention_mask=torch.ones(2, 9), max_new_tokens=2)
    assert (saved.bos_token_id, saved.eos_token_id) == (None, 60)


def test_the_tokenizer_is_saved_beside_the_model(tmp_path):
    from transformers import AutoTokenizer

    from gpt2fast.tokenizer import BPETokenizer

    tokenizer = BPETokenizer.train(["the cat sat on the mat, the end"] * 3, vocab_size=270)
    config = replace(TINY, vocab_size=270, eos_token_id=269, dropout=None)
    random_model(config).save_pretrained(tmp_path, tokenizer)
    with no_warnings():
        theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert theirs("the cat").input_ids == tokenizer.encode("the cat")


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


def openai_name(name: str) -> str:
    name = re.sub(r"^h\.(\d+)", r"h\1", name)
    name = re.sub(r"(wte|wpe)\.weight$", r"\1", name)
    name = re.sub(r"(ln_\w)\.weight$", r"\1.g", name)
    return "model/" + re.sub(r"\.bias$", ".b", re.sub(r"\.weight$", ".w", name)).replace(".", "/")


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
        shapes = {name: tuple(tensor.shape) for name, tensor in built.items()}
        assert shapes == config.parameter_shapes()
        count = sum(torch.Size(shape).numel() for shape in config.parameter_shapes().values())
        assert count == config.parameter_count


def test_gpt2_of_real_size_loads_as_in_transformers_and_is_recognised_by_its_shapes(big):
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


def test_missing_unexpected_and_misshapen_tensors_are_listed_with_their_shapes(tmp_path):
    state = random_model().state_dict()
    del state["h.1.ln_2.bias"]
    state["h.0.attn.c_q.weight"] = torch.ones(2, 24)
    state["h.0.mlp.c_fc.weight"] = torch.ones(24, 95)
    write_safetensors(tmp_path / "model.safetensors", state)
    write_config(tmp_path)
    with pytest.raises(WeightsError) as caught:
        GPT2.from_pretrained(tmp_path)
    message = str(caught.value)
    assert str(tmp_path / "model.safetensors") in message
    assert "1 missing: h.1.ln_2.bias (24,)" in message
    assert "1 unexpected: h.0.attn.c_q.weight (2, 24)" in message
    assert "1 of another shape: h.0.mlp.c_fc.weight is (24, 95), not (24, 96)" in message


def test_a_long_list_of_tensors_is_cut(tmp_path):
    random_model().save_pretrained(tmp_path)
    write_config(tmp_path, n_layer=10)
    with pytest.raises(WeightsError, match=r"96 missing: .* and 88 more") as caught:
        GPT2.from_pretrained(tmp_path)
    assert len(str(caught.value)) < 1000


def test_another_kind_of_model_is_named(tmp_path):
    random_model().save_pretrained(tmp_path)
    write_config(tmp_path, model_type="llama")
    with pytest.raises(ConfigError, match=r"config\.json.*llama"):
        GPT2.from_pretrained(tmp_path)


# Dtype and device


@pytest.mark.parametrize("stored", DTYPES)
@pytest.mark.parametrize("configured", [None, "float32", "bfloat16"])
def test_the_default_dtype_is_transformers_choice(tmp_path, stored, configured):
    from transformers import GPT2LMHeadModel

    random_model(dtype=stored).save_pretrained(tmp_path)
    if configured is not None:
        write_config(tmp_path, dtype=configured)
    model = GPT2.from_pretrained(tmp_path)
    assert model.dtype == GPT2LMHeadModel.from_pretrained(tmp_path).dtype
    assert {parameter.dtype for parameter in model.parameters()} == {model.dtype}


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64, "bfloat16", "torch.float16"])
def test_the_dtype_asked_for_is_had(tmp_path, dtype):
    model = random_model()
    model.save_pretrained(tmp_path)
    wanted = getattr(torch, dtype.removeprefix("torch.")) if isinstance(dtype, str) else dtype
    assert_same_parameters(GPT2.from_pretrained(tmp_path, dtype=dtype), model.to(wanted))


def test_of_several_dtypes_the_widest_is_taken(tmp_path):
    state = random_model(dtype=torch.bfloat16).state_dict()
    state["ln_f.weight"] = state["ln_f.weight"].float()
    write_safetensors(tmp_path / "model.safetensors", state)
    write_config(tmp_path)
    loaded = GPT2.from_pretrained(tmp_path)
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float32}


@pytest.mark.parametrize("dtype", ["int8", "float", torch.int64, 32])
def test_an_impossible_dtype_is_refused(tmp_path, dtype):
    random_model().save_pretrained(tmp_path)
    with pytest.raises(WeightsError, match=rf"{dtype}.*choose one of float32"):
        GPT2.from_pretrained(tmp_path, dtype=dtype)


def test_quantised_weights_are_refused(tmp_path):
    state = random_model().state_dict()
    state["h.0.mlp.c_fc.weight"] = torch.ones(24, 96, dtype=torch.int8)
    torch.save(state, tmp_path / "weights.pt")
    write_config(tmp_path)
    with pytest.raises(WeightsError, match=r"h\.0\.mlp\.c_fc\.weight as torch\.int8"):
        GPT2.from_pretrained(tmp_path / "weights.pt")


@pytest.mark.parametrize("device", ["gpu", "cuda:99", 3.5])
def test_an_impossible_device_is_refused(tmp_path, device):
    random_model().save_pretrained(tmp_path)
    with pytest.raises(Error, match=rf"device.*{device}.*cannot be used"):
        GPT2.from_pretrained(tmp_path, device=device)


# Memory and files


def test_parameters_are_trainable_and_training_leaves_the_file_alone(tmp_path):
    random_model().save_pretrained(tmp_path)
    before = (tmp_path / "model.safetensors").read_bytes()
    model = GPT2.from_pretrained(tmp_path)
    assert not model.training
    assert all(parameter.requires_grad for parameter in model.parameters())
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    model(tokens(), labels=tokens()).loss.backward()
    optimizer.step()
    assert (tmp_path / "model.safetensors").read_bytes() == before
    assert not torch.equal(model.wpe.weight, GPT2.from_pretrained(tmp_path).wpe.weight)


def test_saving_over_the_files_that_a_model_is_mapped_from_is_safe(tmp_path):
    original = random_model()
    original.save_pretrained(tmp_path)
    first, second = GPT2.from_pretrained(tmp_path), GPT2.from_pretrained(tmp_path)
    with torch.no_grad():
        second.wte.weight.add_(1)
    second.save_pretrained(tmp_path)
    assert_same_parameters(first, original)
    assert_same_parameters(GPT2.from_pretrained(tmp_path), second)


def test_a_failed_save_leaves_the_old_model_and_no_debris(tmp_path, monkeypatch):
    original = random_model()
    original.save_pretrained(tmp_path)
    names = sorted(os.listdir(tmp_path))

    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    changed = GPT2.from_pretrained(tmp_path)
    with torch.no_grad():
        changed.wte.weight.add_(1)
    with pytest.raises(WeightsError, match=rf"{tmp_path}.*No space left"):
        changed.save_pretrained(tmp_path)
    monkeypatch.undo()
    assert sorted(os.listdir(tmp_path)) == names
    assert_same_parameters(GPT2.from_pretrained(tmp_path), original)


def test_a_file_in_the_way_of_the_directory_is_an_error(tmp_path):
    (tmp_path / "model").write_text("")
    with pytest.raises(WeightsError, match="cannot be saved to"):
        random_model().save_pretrained(tmp_path / "model")


def test_saved_tensors_are_aligned_for_vector_loads(tmp_path):
    random_model().save_pretrained(tmp_path)
    size = int.from_bytes((tmp_path / "model.safetensors").read_bytes()[:8], "little")
    assert (8 + size) % 64 == 0
    tensors, _ = read_tensors(tmp_path / "model.safetensors")
    first = min(tensors.values(), key=torch.Tensor.data_ptr)
    assert all((t.data_ptr() - first.data_ptr()) % 4 == 0 for t in tensors.values())


def test_tensors_at_odd_addresses_are_realigned(tmp_path):
    model = random_model()
    path = tmp_path / "model.safetensors"
    write_safetensors(path, model.state_dict())
    content = path.read_bytes()
    size = int.from_bytes(content[:8], "little")
    path.write_bytes(
        (size + 1).to_bytes(8, "little") + content[8 : 8 + size] + b" " + content[8 + size :]
    )
    write_config(tmp_path)
    loaded = GPT2.from_pretrained(tmp_path)
    assert_same_parameters(loaded, model)
    assert all(parameter.data_ptr() % 4 == 0 for parameter in loaded.parameters())


PEAK_MEMORY = """
import sys, torch
from gpt2fast import GPT2, GPT2Config

def peak():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))

path, warm = sys.argv[1:]
GPT2.from_pretrained(warm)
with open("/proc/self/clear_refs", "w") as counters:
    counters.write("5")  # forget the peak so far
before = peak()
model = GPT2.from_pretrained(path)
total = sum(parameter.sum() for parameter in model.parameters())  # reads every page
weights = sum(p.numel() * p.element_size() for p in model.parameters())
print((peak() - before) / weights, weights)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "legacy"])
def test_loading_costs_one_copy_of_the_weights(big, tmp_path, name):
    config = GPT2Config(n_embd=1024, n_layer=3, n_head=16)  # 361 MB in float32
    small = tmp_path / "small"
    random_model().save_pretrained(small)
    model = GPT2(config, device="meta").to_empty(device="cpu")
    if name == "model.safetensors":
        model.save_pretrained(big)
    else:
        write_config(big, config)
        torch.save(
            model.state_dict(),
            big / "pytorch_model.bin",
            _use_new_zipfile_serialization=name != "legacy",
        )
    output = subprocess.run(
        [sys.executable, "-c", PEAK_MEMORY, str(big), str(small)],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    assert int(output[1]) == config.parameter_count * 4 > 300e6
    assert 0.9 < float(output[0]) <= 1.15


# Where models are


def test_a_run_directory_gives_its_final_model_or_its_newest_checkpoint(tmp_path):
    for step in (500, 1500, 1000):
        model = random_model()
        with torch.no_grad():
            model.wte.weight.fill_(step)
        model.save_pretrained(tmp_path / "checkpoints" / f"step-{step:08d}")
    random_model().save_pretrained(tmp_path / "checkpoints" / "best")
    unfinished = tmp_path / "checkpoints" / "step-00002000"
    unfinished.mkdir()
    write_safetensors(unfinished / "model.safetensors", random_model().state_dict())
    assert GPT2.from_pretrained(tmp_path).wte.weight[0, 0] == 1500
    with torch.no_grad():
        model.wte.weight.fill_(7)
    model.save_pretrained(tmp_path)
    assert GPT2.from_pretrained(tmp_path).wte.weight[0, 0] == 7


def test_a_directory_without_weights_says_what_it_holds(tmp_path):
    (tmp_path / "notes.md").write_text("")
    with pytest.raises(
        WeightsError, match=r"has no weights: none of model\.safetensors.*notes\.md"
    ):
        GPT2.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "path",
    ["./missing", "missing.pt", "../missing/model.safetensors", "a/b/c", "out/", "~/missing"],
)
def test_a_path_that_is_not_there_is_not_looked_for_on_the_hub(path, monkeypatch):
    monkeypatch.setattr(
        "gpt2fast.checkpoints.hub._from_hub", lambda *_: pytest.fail("asked the hub")
    )
    with pytest.raises(WeightsError, match=rf"no such file or directory: {re.escape(path)}"):
        GPT2.from_pretrained(path)


@pytest.mark.parametrize("name", ["two words", "a--b", "x" * 97, "x" * 5000, "-x", "nul\0"])
def test_a_name_that_no_model_can_have_is_refused(name):
    with pytest.raises(WeightsError, match="neither") as caught:
        GPT2.from_pretrained(name)
    assert len(str(caught.value)) < 700


def test_home_directories_are_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    random_model().save_pretrained(tmp_path / "model")
    assert_same_parameters(GPT2.from_pretrained("~/model"), random_model())


def test_the_bundled_models_name_means_the_one_inside_the_package(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.resources.files", lambda _: tmp_path / "package")
    monkeypatch.chdir(tmp_path)
    inside, outside = random_model(), random_model(dtype=torch.bfloat16)
    outside.save_pretrained(BUNDLED)
    with pytest.raises(WeightsError, match="is not in this installation"):
        GPT2.from_pretrained(BUNDLED)
    inside.save_pretrained(tmp_path / "package" / "assets" / BUNDLED)
    assert_same_parameters(GPT2.from_pretrained(BUNDLED), inside)
    assert_same_parameters(GPT2.from_pretrained(f"./{BUNDLED}"), outside)


@pytest.mark.skipif(
    not Path(gpt2fast.__file__).with_name("assets").joinpath(BUNDLED).is_dir(),
    reason="the bundled model is not in this checkout",
)
def test_the_bundled_model_loads():
    model = GPT2.from_pretrained(BUNDLED)
    assert model.dtype == torch.bfloat16
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())


class Hub(BaseHTTPRequestHandler):
    """As much of the hub's protocol as a download needs."""

    files: dict[str, bytes] = {}
    requested: list[str] = []
    commit = "0123456789abcdef0123456789abcdef01234567"

    def log_message(self, *arguments):
        pass

    def do_HEAD(self):
        self.answer(body=False)

    def do_GET(self):
        self.answer(body=True)

    def answer(self, body: bool) -> None:
        path = self.path.split("?")[0]
        self.requested.append(path)
        if "/secret" in path:
            return self.reply(403, b"", {"X-Error-Code": "GatedRepo"})
        if "/tiny" not in path:
            return self.reply(401, b"", {"X-Error-Code": "RepoNotFound"})
        if path.startswith("/api/models/someone/tiny/tree/"):
            listing = [
                {"type": "file", "path": name, "size": len(data), "oid": f"{index:040x}"}
                for index, (name, data) in enumerate(self.files.items())
            ]
            return self.reply(200, json.dumps(listing).encode())
        if path.startswith("/api/models/someone/tiny"):
            if "/revision/" in path and path.rsplit("/", 1)[1] not in ("main", self.commit):
                return self.reply(404, b"", {"X-Error-Code": "RevisionNotFound"})
            siblings = [{"rfilename": name} for name in self.files]
            info = {"id": "someone/tiny", "sha": self.commit, "siblings": siblings}
            return self.reply(200, json.dumps(info).encode())
        name = path.rsplit("/", 1)[1]
        headers = {"ETag": f'"{list(self.files).index(name):040x}"', "X-Repo-Commit": self.commit}
        return self.reply(200, self.files[name], headers, body)

    def reply(self, status, data, headers=None, body=True):
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(data)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub on this machine that holds "someone/tiny", and an empty cache."""
    from huggingface_hub import constants

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    random_model().save_pretrained(tmp_path / "source")
    Hub.files = {p.name: p.read_bytes() for p in (tmp_path / "source").iterdir()}
    Hub.requested = []
    point_at(monkeypatch, server.server_address[1])
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    yield server
    server.shutdown()
    server.server_close()


def point_at(monkeypatch, port: int) -> None:
    from huggingface_hub import constants

    url = f"http://127.0.0.1:{port}"
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}"
    )


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_a_model_on_the_hub_is_downloaded_once_and_then_found_without_a_network(hub, monkeypatch):
    Hub.files["pytorch_model.bin"] = b"not wanted where safetensors is there"
    Hub.files["README.md"] = b"not wanted"
    assert_same_parameters(GPT2.from_pretrained("someone/tiny"), random_model())
    fetched = {path.rsplit("/", 1)[1] for path in Hub.requested if "/resolve/" in path}
    assert fetched == {"config.json", "generation_config.json", "model.safetensors"}

    Hub.requested.clear()
    cached = GPT2.from_pretrained("someone/tiny", local_files_only=True)
    assert_same_parameters(cached, random_model())
    assert not Hub.requested

    point_at(monkeypatch, free_port())
    assert_same_parameters(GPT2.from_pretrained("someone/tiny"), random_model())


def test_pickled_weights_on_the_hub_load_where_there_is_nothing_better(hub, tmp_path):
    torch.save(random_model().state_dict(), tmp_path / "weights.bin")
    del Hub.files["model.safetensors"]
    Hub.files["pytorch_model.bin"] = (tmp_path / "weights.bin").read_bytes()
    assert_same_parameters(GPT2.from_pretrained("someone/tiny"), random_model())


@pytest.mark.parametrize(
    ("name", "options", "reason", "way_out"),
    [
        ("someone/absent", {}, "there is no model 'someone/absent'", "check the spelling"),
        ("someone/secret", {}, "is gated", "hf auth login"),
        ("someone/tiny", {"revision": "v9"}, "no revision 'v9'", "leave the revision out"),
        ("someone/tiny", {"local_files_only": True}, "local_files_only", "download it once"),
    ],
)
def test_what_the_hub_refuses_is_explained(hub, name, options, reason, way_out):
    with pytest.raises(WeightsError) as caught:
        GPT2.from_pretrained(name, **options)
    assert name in str(caught.value)
    assert reason in str(caught.value)
    assert way_out in str(caught.value)


@pytest.mark.parametrize("silent", [False, True])
def test_a_hub_that_cannot_be_reached_fails_soon_and_names_the_way_out(hub, monkeypatch, silent):
    monkeypatch.setattr("gpt2fast.checkpoints.hub.CONNECT_SECONDS", 0.5)
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    if silent:
        listener.listen()  # accepts, and never answers
    else:
        listener.close()
    point_at(monkeypatch, port)
    start = time.monotonic()
    with pytest.raises(WeightsError) as caught:
        GPT2.from_pretrained("someone/tiny")
    assert time.monotonic() - start < 5
    listener.close()
    message = str(caught.value)
    assert "'someone/tiny'" in message and "cannot be reached" in message and BUNDLED in message


@pytest.mark.parametrize("dtype", [torch.int8, torch.bool, torch.int64], ids=str)
@pytest.mark.parametrize("named", [True, False])
def test_integers_are_no_weights_whatever_config_json_says(tmp_path, dtype, named):
    model = random_model()
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config.pop("dtype", None)
    config.pop("torch_dtype", None)
    if named:
        config["dtype"] = "float32"
    (tmp_path / "config.json").write_text(json.dumps(config))
    tensors = load_file(tmp_path / "model.safetensors")
    name = next(name for name in tensors if name.endswith("c_fc.weight"))
    tensors[name] = tensors[name].to(dtype)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(WeightsError, match=f"as {dtype}"):
        GPT2.from_pretrained(tmp_path)
    with pytest.raises(WeightsError, match=f"as {dtype}"):
        GPT2.from_pretrained(tmp_path, dtype="float32")
