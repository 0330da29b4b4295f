"""Fused models in other people's tools: lm_eval's harness, accelerate's placement of weights."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from gpt2fast.hf import doctor, fuse
from gpt2fast.ops.backend import record_calls
from harness_tasks import TASKS
from small_bpe import BPE, TEXT, random_model
from tolerance import assert_close, assert_equal


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small GPT-2 and its tokenizer, as transformers saves them."""
    folder = tmp_path_factory.mktemp("saved")
    random_model().save_pretrained(folder / "ours", BPE)
    model = transformers.GPT2LMHeadModel.from_pretrained(folder / "ours")
    model.save_pretrained(folder / "theirs")
    transformers.AutoTokenizer.from_pretrained(folder / "ours").save_pretrained(folder / "theirs")
    return folder / "theirs"


def write_tasks(folder: Path) -> None:
    """The tasks as files, and their data."""
    words = TEXT.split()
    lines = [
        {
            "question": " ".join(words[i : i + 5 + i % 7]),
            "choices": [f" {words[i + 3 + j]} {words[i + j]}" for j in range(3)],
            "answer": i % 3,
            "text": " ".join(words[i : i + 40]),
        }
        for i in range(24)
    ]
    data = folder / "data.jsonl"
    data.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    for name, text in TASKS.items():
        (folder / f"{name}.yaml").write_text(text.replace("FILE", str(data)), encoding="utf-8")


def test_lm_eval_finds_the_same(saved, tmp_path, monkeypatch):
    lm_eval = pytest.importorskip("lm_eval")
    pytest.importorskip("evaluate")
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    write_tasks(tmp_path)
    tasks = TaskManager(include_path=str(tmp_path), include_defaults=False)
    tokenizer = transformers.AutoTokenizer.from_pretrained(saved)
    found, called = [], []
    for change in (None, lambda model: fuse(model, generate=True)):
        harness = HFLM(str(saved), tokenizer=tokenizer, device="cpu", batch_size=4)
        if change is not None:
            change(harness.model)
        with record_calls() as calls:
            found.append(
                lm_eval.simple_evaluate(
                    harness, tasks=list(TASKS), task_manager=tasks, bootstrap_iters=0
                )
            )
        called.append({call.op for call in calls})
    assert not called[0] and {"causal_attention", "gelu_mlp", "packed_step"} <= called[1]
    for name in TASKS:
        plain, fused = (each["results"][name] for each in found)
        numbers = {key: x for key, x in plain.items() if isinstance(x, float)}
        assert numbers
        for key, number in numbers.items():
            assert fused[key] == pytest.approx(number, rel=1e-5), (name, key)
        for theirs, ours in zip(*(each["samples"][name] for each in found), strict=True):
            _assert_same_answers(ours["resps"], theirs["resps"])


def _assert_same_answers(ours: Any, theirs: Any) -> None:
    """Equal texts and choices, and scores within rounding, however they are nested."""
    if isinstance(theirs, list | tuple):
        assert len(ours) == len(theirs)
        for mine, other in zip(ours, theirs, strict=True):
            _assert_same_answers(mine, other)
    elif isinstance(theirs, float):
        assert ours == pytest.approx(theirs, rel=1e-5)
    else:
        assert ours == theirs


def logits_of(model: Any, tokens: Tensor) -> list[Tensor]:
    with torch.no_grad():
        return [model(tokens, labels=tokens).logits]


@pytest.mark.parametrize("fused", ["after", "before"])
@pytest.mark.parametrize("places", ["cpu", "disk", "one block on disk"])
def test_models_that_accelerate_places(places, fused, saved, tmp_path, caplog):
    accelerate = pytest.importorskip("accelerate")
    tokens = torch.randint(3, BPE.vocab_size, (2, 33))
    devices = {"": "cpu"}
    if places != "cpu":
        devices = {
            "transformer.wte": "cpu", "transformer.wpe": "cpu", "transformer.ln_f": "cpu",
            "lm_head": "cpu", "transformer.h.0": "disk" if places == "disk" else "cpu",
            "transformer.h.1": "disk",
        }  # fmt: skip

    def load() -> Any:
        return transformers.GPT2LMHeadModel.from_pretrained(
            saved, device_map=devices, offload_folder=tmp_path
        ).eval()

    whole = transformers.GPT2LMHeadModel.from_pretrained(saved).eval()
    other = load()
    if fused == "after":
        model = fuse(load(), generate=True)
    else:
        model = fuse(copy.deepcopy(whole), generate=True)
        accelerate.dispatch_model(model, devices, offload_dir=tmp_path, main_device="cpu")
    moves = places != "cpu"
    assert model.transformer.h[1].mlp.c_fc.weight.is_meta == moves
    assert ("accelerate's hooks run around" in caplog.text) == (moves and fused == "after")
    assert caplog.text.count("accelerate's hooks") <= 1
    parts = {part.name: part for part in doctor(model)}
    assert parts["transformer.h.1.mlp"].fused == (not moves)
    if moves and fused == "after":
        found = parts["transformer.h.1.mlp.c_fc"]
        assert found.reason == "accelerate's hook runs around it" and not found.fused
    exact = logits_of(copy.deepcopy(whole).double(), tokens)
    assert_close(logits_of(model, tokens), logits_of(other, tokens), exact, times=3.0)
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    assert_equal(model.generate(tokens[:, :5], **options), other.generate(tokens[:, :5], **options))
