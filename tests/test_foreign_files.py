"""Files that are no GPT-2 are named in the error, with a way on that exists."""

from __future__ import annotations

import gzip
import json
import re
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

from gpt2fast import GPT2, Generator
from gpt2fast.cli.generate import main as generate
from gpt2fast.cli.train import main as train
from gpt2fast.errors import ConfigError, Error, WeightsError
from gpt2fast.lora import add_adapters, load_adapter, merge, save_adapter
from gpt2fast.tokenizer import CharTokenizer
from small_checkpoints import TINY, assert_same_parameters, random_model, tokens, write_config

TEXT = "the cat sat on the mat; the dog sat on the cat. " * 40


def loading_says(path: Path) -> str:
    """The one error of all doors that take weights."""
    with pytest.raises(WeightsError) as caught:
        GPT2.from_pretrained(path)
    with pytest.raises(WeightsError) as again:
        Generator.from_pretrained(path)
    assert str(again.value) == str(caught.value)
    assert str(path) in str(caught.value)
    return str(caught.value)


FILES = {
    "tf_model.h5": (b"\x89HDF\r\n\x1a\n" + b"\0" * 80, r"TensorFlow: .*from_tf=True"),
    "weights": (b"\x89HDF\r\n\x1a\n" + b"\0" * 80, r"TensorFlow: .*transformers\[torch,tf\]<5"),
    "flax_model.msgpack": (b"\x81\xabtransformer\x84", r"flax .*from_flax=True"),
    "gpt2.Q4_K_M.gguf": (b"GGUF\x03\0\0\0" + b"\0" * 80, r"GGUF.*gguf_file=FILE"),
    "renamed.bin": (b"GGUF\x03\0\0\0" + b"\0" * 80, r"GGUF.*gguf_file=FILE"),
    "ggml-model.bin": (b"lmgg" + b"\0" * 80, r"ggml's old format"),
    "model.onnx": (b"\x08\x07\x12\x07pytorch", r"ONNX, made from other weights.*no way back"),
    "openvino_model.xml": (b'<?xml version="1.0"?><net>', r"OpenVINO"),
    "openvino_model.bin": (b"\x01\x02\x03\x04" * 20, r"OpenVINO"),
    "model.tflite": (b"\x1c\0\0\0TFL3" + b"\0" * 40, r"TensorFlow Lite"),
    "x.bin": (b"\x1c\0\0\0TFL3" + b"\0" * 40, r"TensorFlow Lite"),
    "model.ckpt.data-00000-of-00001": (b"\x01\x02\x03\x04" * 20, r"name its folder"),
    "rust_model.ot": (b"\x01\x02\x03\x04" * 20, r"rust-bert"),
    "array.npy": (b"\x93NUMPY\x01\0v\0", r"one array of NumPy"),
    "weights.pt.gz": (gzip.compress(b"x" * 80), r"compressed file \(gzip\): unpack"),
    "config.json": (b'{"model_type": "gpt2"}', r"a description, not weights: name its folder"),
    "book.txt": (TEXT.encode(), r"a text \('the cat sat"),
    "model.bin": (b"<!DOCTYPE html><html>404", r"a page of the web.*download"),
    "data.bin": (bytes(range(200, 256)) * 3, r"not a checkpoint: neither safetensors nor"),
    "empty.pt": (b"", r"is empty"),
    "pointer.pt": (b"version https://git-lfs.github.com/spec/v1\n", r"git lfs pull"),
}


@pytest.mark.parametrize("name", FILES)
def test_a_file_is_told_by_what_it_is(tmp_path, name):
    content, reason = FILES[name]
    (tmp_path / name).write_bytes(content)
    assert re.search(reason, loading_says(tmp_path / name))


def test_archives_are_told(tmp_path):
    with zipfile.ZipFile(tmp_path / "model.zip", "w") as archive:
        archive.writestr("config.json", "{}")
    assert "not one that torch.save wrote" in loading_says(tmp_path / "model.zip")


def test_safetensors_load_under_any_name(tmp_path):
    model = random_model()
    model.save_pretrained(tmp_path / "saved")
    write_config(tmp_path)
    (tmp_path / "weights.bin").write_bytes((tmp_path / "saved/model.safetensors").read_bytes())
    assert_same_parameters(GPT2.from_pretrained(tmp_path / "weights.bin"), model)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_the_advice_for_torchscript_works(tmp_path):
    model = random_model()
    write_config(tmp_path)

    class Parts(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for name, parameter in model.state_dict().items():
                place = self
                for part in name.split(".")[:-1]:
                    if part not in dict(place.named_children()):
                        place.add_module(part, torch.nn.Module())
                    place = getattr(place, part)
                place.register_parameter(name.split(".")[-1], torch.nn.Parameter(parameter))

        def forward(self):
            return 0

    program = tmp_path / "program.pt"
    torch.jit.script(Parts()).save(program)
    said = loading_says(program)
    advice = re.search(r"torch\.save\(torch\.jit\.load\(FILE\)\.state_dict\(\), '(.*?)'\)", said)
    torch.save(torch.jit.load(program).state_dict(), tmp_path / advice[1])
    assert_same_parameters(GPT2.from_pretrained(tmp_path / advice[1]), model)


def test_the_advice_for_a_checkpoint_of_several_processes_works(tmp_path):
    model = random_model()
    dcp.save({"model": model.state_dict()}, checkpoint_id=tmp_path / "step-3", no_dist=True)
    command = re.search(r"python (-m \S+ dcp_to_torch) ", loading_says(tmp_path / "step-3"))[1]
    joined = tmp_path / "weights.pt"
    subprocess.run(
        [sys.executable, *command.split(), tmp_path / "step-3", joined],
        check=True,
        capture_output=True,
    )
    write_config(tmp_path)
    assert_same_parameters(GPT2.from_pretrained(joined), model)


@pytest.mark.parametrize(
    ("names", "reason"),
    [
        (["config.json", "tf_model.h5"], r"TensorFlow: .*from_tf=True"),
        (["config.json", "flax_model.msgpack"], r"flax .*from_flax=True"),
        (["gpt2.Q8_0.gguf"], r"GGUF.*gguf_file"),
        (["config.json", "model.onnx"], r"ONNX"),
        (["config.json", "onnx/model.onnx"], r"ONNX"),
        (["openvino_model.xml", "openvino_model.bin"], r"OpenVINO"),
        (["saved_model.pb", "variables/variables.data-0"], r"SavedModel"),
        (["zero_to_fp32.py", "latest"], r"DeepSpeed.*zero_to_fp32"),
        (["meta.json", "train.bin", "val.bin"], r"prepared data.*--data"),
        (["config.yaml", "log.csv"], r"no checkpoint yet"),
        (["checkpoint-900/config.json", "checkpoint-1000/config.json"], r"name one, .*-1000"),
        (["snapshots/abc/config.json", "refs/main"], r"name .*snapshots/abc"),
        (["notes.md"], r"has no weights: none of .*, only notes\.md"),
    ],
)
def test_a_folder_is_told_by_what_it_holds(tmp_path, names, reason):
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"{}")
    assert re.search(reason, loading_says(tmp_path))


def test_what_the_advice_names_exists():
    import transformers
    from transformers.integrations import GGUF_CONFIG_MAPPING

    assert "gpt2" in GGUF_CONFIG_MAPPING
    assert hasattr(transformers, "AutoModelForCausalLM")
    assert hasattr(transformers.PreTrainedModel, "dequantize")


# Adapters


@pytest.fixture
def adapter(tmp_path, capsys):
    """A base model with its tokenizer, an adapter of it, and a text."""
    torch.manual_seed(0)
    tokenizer = CharTokenizer.train([TEXT])
    model = random_model(
        replace(TINY, vocab_size=tokenizer.vocab_size, eos_token_id=None, dropout=None)
    )
    model.save_pretrained(tmp_path / "base", tokenizer)
    add_adapters(model, rank=2, targets="c_attn")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    save_adapter(model, tmp_path / "tuned", str(tmp_path / "base"))
    (tmp_path / "text.txt").write_text(TEXT)
    return tmp_path / "tuned"


def test_an_adapter_in_place_of_a_model_is_told_and_the_way_works(adapter, capsys):
    base = adapter.parent / "base"
    said = loading_says(adapter)
    assert f"--model {base} --adapter {adapter}" in said and "merge(model)" in said
    assert "adapter (LoRA)" in loading_says(adapter / "adapter_model.safetensors")

    options = ["--max-new-tokens", "4", "--greedy", "the cat"]
    assert generate(["--model", str(base), "--adapter", str(adapter), *options]) == 0
    model = GPT2.from_pretrained(base)
    load_adapter(model, adapter)
    merge(model).save_pretrained(adapter.parent / "merged")
    ids = tokens() % model.config.vocab_size
    with torch.no_grad():
        expected = model(ids).logits
        torch.testing.assert_close(
            GPT2.from_pretrained(adapter.parent / "merged")(ids).logits, expected
        )


def test_training_from_what_is_no_model_says_so_before_preparing(adapter, capsys):
    folder = adapter.parent

    def says(start: Path, *more: str) -> str:
        out = folder / "out"
        arguments = ["--init-from", str(start), "--data", str(folder / "text.txt")]
        settings = ["--out", str(out), "--max-steps", "1", "--block-size", "8", *more]
        assert train([*arguments, *settings]) in (1, 2)
        assert not (out / "data").exists()
        error = capsys.readouterr().err
        assert error.count("\n") <= 2 and "tokenizer" not in error and "Traceback" not in error
        return error

    assert "adapter (LoRA)" in says(adapter)
    assert "a text ('the cat" in says(folder / "text.txt")
    (folder / "h5").mkdir()
    (folder / "h5" / "tf_model.h5").write_bytes(b"\x89HDF\r\n\x1a\n")
    assert "from_tf=True" in says(folder / "h5")
    (folder / "h5" / "vocab.json").write_text('{"a": 0}')  # a tokenizer is no model
    assert "from_tf=True" in says(folder / "h5", "--tokenizer", "char")
    assert "no such file" in says(folder / "missing.bin")


def test_the_adapter_of_a_run_names_the_runs_model(adapter):
    run = adapter.parent / "base"
    adapter.rename(run / "adapter")
    said = loading_says(run / "adapter")
    assert f"the model with the adapter merged into it is {run}" in said


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"base_model_name_or_path": 3}', "x" * 99])
def test_an_adapter_with_a_broken_description_is_told_too(tmp_path, content):
    (tmp_path / "adapter_config.json").write_text(content)
    assert "--model MODEL --adapter" in loading_says(tmp_path)


# Other architectures


@pytest.mark.parametrize(
    "kind", ["llama", "bert", "gpt_neo", "gptj", "gpt_neox", "encoder-decoder"]
)
def test_another_architecture_is_named(tmp_path, kind):
    random_model().save_pretrained(tmp_path)
    write_config(tmp_path, model_type=kind)
    with pytest.raises(ConfigError, match=f"model_type='{kind}' is not a GPT-2.*transformers"):
        GPT2.from_pretrained(tmp_path)


def test_an_old_configuration_of_another_architecture_is_not_taken_for_a_gpt2(tmp_path):
    """Files before transformers 2.9 had no model_type, and BERT's sizes are called as GPT-2's."""
    random_model().save_pretrained(tmp_path)
    sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3}
    sizes |= {"vocab_size": 61, "max_position_embeddings": 24}
    for name, loads in (("BertForMaskedLM", False), ("GPT2LMHeadModel", True), (None, True)):
        classes = {"architectures": [name]} if name else {}
        (tmp_path / "config.json").write_text(json.dumps(sizes | classes))
        if loads:
            assert GPT2.from_pretrained(tmp_path).config.n_layer == 2
        else:
            with pytest.raises(ConfigError, match="BertForMaskedLM.*is not a GPT-2"):
                GPT2.from_pretrained(tmp_path)


@pytest.mark.parametrize("method", ["bitsandbytes", "gptq", None, 3])
def test_weights_that_others_quantized_are_told_before_their_names_are(tmp_path, method):
    random_model().save_pretrained(tmp_path)
    write_config(tmp_path, quantization_config={"quant_method": method, "bits": 4})
    with pytest.raises(Error, match=r"config\.json: the weights are quantized .*dequantize"):
        GPT2.from_pretrained(tmp_path)
