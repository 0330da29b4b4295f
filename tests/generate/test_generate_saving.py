"""--save: a model as it was loaded, in a new folder."""

from __future__ import annotations

import json
import os
import shutil

import pytest
import torch
import transformers

from generate_command import PROMPT, TEXT, assert_one_error
from gpt2fast import GPT2, Tokenizer
from gpt2fast.lora import add_adapters, save_adapter


@pytest.mark.parametrize(
    ("flags", "again"),
    [
        ([], []),
        (["--dtype", "bfloat16"], ["--dtype", "bfloat16"]),
        (["--dtype", "float16"], ["--dtype", "float16"]),
        (["--dtype", "float64"], []),
        (["--quantize", "int8"], []),
        (["--quantize", "int8", "--dtype", "bfloat16"], []),
        (["--quantize", "int4"], []),
        (["--backend", "reference"], ["--backend", "reference"]),
    ],
    ids=" ".join,
)
def test_a_saved_model_writes_the_same_text(run, tmp_path, flags, again):
    options = [PROMPT, "--seed", 3, "--max-new-tokens", 40, "--json"]
    folder = tmp_path / "new" / "model"
    code, out, err = run(*options, *flags, "--save", folder)
    assert code == 0
    assert f"note: the model is saved in {folder}" in err
    assert out == run(*options, *again, model=folder)[1]
    assert out == run(*options, *flags)[1]
    assert [path.name for path in folder.parent.iterdir()] == ["model"]


def test_saving_keeps_the_tokenizer_and_what_the_checkpoint_says_of_generating(
    run, model_dir, tmp_path
):
    source = tmp_path / "source"
    shutil.copytree(model_dir, source)
    ends = {"eos_token_id": [7, 11], "pad_token_id": 3, "max_length": 33}
    (source / "generation_config.json").write_text(json.dumps(ends))
    for flags in ([], ["--quantize", "int8"]):
        folder = tmp_path / f"saved{len(flags)}"
        assert run("--save", folder, *flags, model=source)[0] == 0
        kept = json.loads((folder / "generation_config.json").read_text())
        assert {name: kept[name] for name in ends} == ends
        for name in ("tokenizer.json", "vocab.json", "merges.txt"):
            assert (folder / name).read_bytes() == (source / name).read_bytes()
        loaded = transformers.AutoTokenizer.from_pretrained(folder)
        assert loaded(TEXT)["input_ids"] == Tokenizer.from_pretrained(source).encode(TEXT)


def test_saving_merges_adapters(run, generator, model_dir, tmp_path):
    model = GPT2.from_pretrained(model_dir)
    add_adapters(model, rank=2)
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            torch.nn.init.normal_(parameter)
    save_adapter(model, tmp_path / "adapter", base_model=str(model_dir))
    options = [PROMPT, "--greedy", "--max-new-tokens", 20]
    adapted = run(*options, "--adapter", tmp_path / "adapter")
    assert adapted[1] != run(*options)[1]
    assert run("--adapter", tmp_path / "adapter", "--save", tmp_path / "merged")[0] == 0
    assert run(*options, model=tmp_path / "merged") == adapted
    assert transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "merged")


def test_saving_needs_no_prompt_and_reads_none(run, tmp_path):
    code, out, err = run("--save", tmp_path / "model", stdin="not a prompt")
    assert (code, out) == (0, "")
    assert err == f"note: the model is saved in {tmp_path / 'model'}\n"
    empty = tmp_path / "empty"
    empty.mkdir()
    assert run("--save", empty)[0] == 0
    assert (empty / "config.json").is_file()


def test_saving_replaces_nothing(run, tmp_path, monkeypatch):
    def save(*arguments):
        """From no model: all of it is said before one loads."""
        return run(*arguments, model=tmp_path / "absent")

    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "my.txt").write_text("mine")
    assert_one_error(save("--save", tmp_path / "full"), 1, "full", "my.txt", "new folder")
    (tmp_path / "file").write_text("mine")
    assert_one_error(save("--save", tmp_path / "file"), 1, "no folder")
    assert_one_error(save("--save="), 2, "--save is empty")
    monkeypatch.chdir(tmp_path / "full")
    (tmp_path / "full" / "my.txt").unlink()
    assert_one_error(save("--save", "."), 1, "current folder")


def test_saving_that_fails_leaves_nothing(run, tmp_path, monkeypatch):
    def fail(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    result = run("--save", tmp_path / "model", PROMPT)
    assert_one_error(result, 1, "--save", "No space left")
    assert list(tmp_path.iterdir()) == []
