"""Checkpoints: every layout that people have loads, and transformers reads what we write."""

# ruff: noqa: F401, F811 (imported fixtures)

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from gpt2fast import GPT2, Error, GPT2Config
from gpt2fast.checkpoints.tensor_files import read_tensors, write_safetensors
from gpt2fast.errors import ConfigError, WeightsError
from small_checkpoints import (
    DTYPES,
    TINY,
    assert_same_parameters,
    big,
    random_model,
    tokens,
    write_config,
)


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


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16], ids=str)
def test_numbers_beyond_float16_are_refused_where_it_is_asked_for(tmp_path, stored):
    model = random_model(dtype=stored)
    with torch.no_grad():
        model.h[0].mlp.c_fc.bias[3] = -131072.0
    model.save_pretrained(tmp_path)
    says = r"mlp\.c_fc\.bias holds -131072, and float16 ends at 65504: .* float32 or bfloat16"
    with pytest.raises(WeightsError, match=says):
        GPT2.from_pretrained(tmp_path, dtype="float16")
    assert_same_parameters(GPT2.from_pretrained(tmp_path, dtype="bfloat16"), model.bfloat16())


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


def test_quantized_weights_are_refused(tmp_path):
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
