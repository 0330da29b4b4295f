"""Training keeps its promises: exact resumption, repeatable runs, settings that count."""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import logging
import math
import os
import pty
import random
import select
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from gpt2fast.cli import train as command
from gpt2fast.data import DataModule, prepare_data
from gpt2fast.data.dataset import TrainingBatches
from gpt2fast.errors import ConfigError, DataError, Error, WeightsError
from gpt2fast.model import GPT2
from gpt2fast.tokenizer import CharTokenizer, Tokenizer
from gpt2fast.training import Interrupted, TrainConfig, TrainingError, loop, train
from gpt2fast.training.checkpoints import save as checkpoint
from gpt2fast.training.checkpoints import state_file
from gpt2fast.training.checkpoints.shards import save_tensors
from gpt2fast.training.config import field_help
from gpt2fast.training.distributed import Group
from gpt2fast.training.interrupt import SignalWatch
from gpt2fast.training.logs.columns import COLUMNS
from gpt2fast.training.logs.log import RunLog
from gpt2fast.training.optimizer import Optimizers
from gpt2fast.training.schedule import learning_rate

TINY: dict[str, Any] = {
    "n_layer": 1,
    "n_head": 2,
    "n_embd": 16,
    "block_size": 8,
    "batch_size": 4,
    "max_steps": 3,
    "warmup_steps": 2,
    "lr": 1e-2,
    "eval_interval": 2,
    "log_interval": 1,
    "device": "cpu",
    "threads": 1,
}


def write_text(path: Path, seed: int = 0, documents: int = 6) -> Path:
    """A few documents of made-up words."""
    draw = random.Random(seed)
    words = ["ship", "sail", "island", "storm", "gold", "captain", "the", "a", "of", "was"]
    lines = []
    for _ in range(documents):
        for _ in range(12):
            lines.append(" ".join(draw.choice(words) for _ in range(draw.randint(3, 8))) + ".")
        lines.append("<|endoftext|>")
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    return write_text(tmp_path_factory.mktemp("text") / "story.txt")


@pytest.fixture(scope="module")
def prepared(text, tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("prepared") / "data"
    prepare_data([text], directory, tokenizer="char")
    return directory


@pytest.fixture
def config(prepared, tmp_path) -> TrainConfig:
    return TrainConfig(data=str(prepared), out=str(tmp_path / "run"), **TINY)


@pytest.fixture(scope="module")
def trained(prepared, tmp_path_factory) -> Path:
    """A finished tiny run."""
    out = tmp_path_factory.mktemp("trained") / "run"
    train(TrainConfig(data=str(prepared), out=str(out), **TINY))
    return out


def rows(out: Path | str) -> list[dict[str, str]]:
    with (Path(out) / "log.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


CLOCK_AND_MACHINE = ("tokens_per_second", "elapsed_seconds", "utilisation", "memory_gib")


def outcome(out: Path) -> dict[str, object]:
    """What a run did, without what the clock says."""
    log = [{k: v for k, v in row.items() if k not in CLOCK_AND_MACHINE} for row in rows(out)]
    return {
        "weights": digest(out / "model.safetensors"),
        "log": log,
        "checkpoints": sorted(path.name for path in (out / "checkpoints").iterdir()),
    }


def flags(values: dict[str, object]) -> list[str]:
    def text(value: object) -> str:
        return {"None": "null", "True": "true", "False": "false"}.get(str(value), str(value))

    return [f"--{name.replace('_', '-')}={text(value)}" for name, value in values.items()]


def changed(base: TrainConfig, **changes) -> TrainConfig:
    return dataclasses.replace(base, **changes)


# -- the flags ------------------------------------------------------------------------------------

# flag: (settings that both runs share, the value that must make a difference)
CHANGES: dict[str, tuple[dict[str, object], object]] = {
    "tokenizer": ({"data": "TEXT", "vocab_size": None}, "bpe"),
    "vocab_size": ({"data": "TEXT", "tokenizer": "bpe", "vocab_size": 270}, 265),
    "split": ({"data": "TEXT"}, "documents"),
    "val_fraction": ({"data": "TEXT"}, 0.3),
    "n_layer": ({}, 2),
    "n_head": ({}, 4),
    "n_embd": ({}, 8),
    "block_size": ({}, 6),
    "dropout": ({}, 0.5),
    "max_steps": ({}, 2),
    "max_epochs": ({"max_steps": None, "max_epochs": 0.04}, 0.02),
    "batch_size": ({}, 3),
    "grad_accumulation": ({}, 2),
    "batch_warmup_steps": ({"grad_accumulation": 2}, 2),
    "optimizer": ({}, "muon"),
    "momentum": ({"optimizer": "muon"}, 0.5),
    "freeze": ({}, "wte"),
    "sampling": ({}, "epoch"),
    "schedule": ({"warmup_steps": 0}, "constant"),
    "decay_share": ({"schedule": "wsd", "warmup_steps": 0}, 0.9),
    "max_tokens": ({"max_steps": None, "max_tokens": 96}, 64),
    "max_hours": ({}, 1e-9),
    "target_loss": ({}, 100.0),
    "early_stopping": ({"lr": 1e-9, "eval_interval": 1, "max_steps": 4}, 1),
    "lr": ({"min_lr": 1e-3}, 2e-2),
    "min_lr": ({"warmup_steps": 0}, 0.0),
    "warmup_steps": ({}, 0),
    "beta1": ({}, 0.5),
    "beta2": ({}, 0.5),
    "weight_decay": ({}, 1.0),
    "grad_clip": ({}, 1e-3),
    "eval_interval": ({}, 1),
    "eval_batches": ({}, 1),
    "log_interval": ({}, 3),
    "checkpoint_interval": ({}, 1),
    "keep_checkpoints": ({"checkpoint_interval": 1}, 1),
    "seed": ({}, 7),
    "dtype": ({}, "bfloat16"),
    "save_dtype": ({}, "bfloat16"),
}
OBSERVED_OTHERWISE = {
    *("data", "out", "init_from", "device", "backend", "compile", "compile_mode", "threads"),
    *("parallel", "checkpoint_activations"),  # test_distributed, test_training_limits
    *("mixture", "dataset", "dataset_config", "text_field", "records"),  # test_data_*
    *("lora_rank", "lora_alpha", "lora_dropout", "lora_targets"),  # test_lora
    *("tensorboard", "wandb", "log_histograms"),  # test_logs
    *("sample_interval", "sample_prompt", "sample_tokens"),
    "add_tokens",  # test_new_tokens
}


def test_every_setting_is_covered_here():
    names = {field.name for field in dataclasses.fields(TrainConfig)}
    assert names == set(CHANGES) | OBSERVED_OTHERWISE


@pytest.mark.parametrize("name", CHANGES)
def test_flag_changes_the_outcome(name, prepared, text, tmp_path):
    shared, value = CHANGES[name]
    base = {**TINY, "data": prepared, **shared}
    if base["data"] == "TEXT":
        base["data"] = text
    outcomes = []
    for run, settings in (("base", base), ("changed", {**base, name: value})):
        assert command.main(flags({**settings, "out": tmp_path / run})) == 0
        outcomes.append(outcome(tmp_path / run))
    assert outcomes[0] != outcomes[1]


def test_flag_data_chooses_the_text(config, tmp_path):
    other = write_text(tmp_path / "other.txt", seed=1)
    train(config)
    train(changed(config, data=str(other), out=str(tmp_path / "run2")))
    assert outcome(tmp_path / "run") != outcome(tmp_path / "run2")


def test_data_is_found_in_the_shared_folder(text, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("GPT2FAST_DATA", raising=False)
    arguments = flags({**TINY, "data": text.name, "out": tmp_path / "run"})
    assert command.main(arguments) == 1
    assert f"data '{text.name}' was not found" in capsys.readouterr().err
    monkeypatch.setenv("GPT2FAST_DATA", str(text.parent))
    assert command.main(arguments) == 0


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"data": None}, "--data"),
        ({"freeze": "attn"}, "'attn' matches no parameter"),
        ({"init_from": "MODEL", "block_size": 99}, "block_size 99 is more than the model's"),
    ],
)
def test_wrong_settings_found_late_are_usage_errors_too(text, tmp_path, capsys, changes, told):
    if "init_from" in changes:
        model = train(TrainConfig(**{**TINY, "data": str(text), "out": str(tmp_path / "first")}))
        sizes = dict.fromkeys(("n_layer", "n_head", "n_embd"))
        changes = {**changes, **sizes, "init_from": str(model.out)}
        capsys.readouterr()
    values = {**TINY, "data": text, "out": tmp_path / "run", **changes}
    assert command.main(flags(values)) == 2
    message = capsys.readouterr().err
    assert told in message and message.count("\n") == 1


def test_missing_recipe_text_says_where_it_is_had(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("GPT2FAST_DATA", raising=False)
    assert command.main(["--config", "shakespeare_char"]) == 1
    message = capsys.readouterr().err
    assert "char-rnn" in message and "input.txt" in message and "--data PATH" in message


def test_flag_init_from_starts_from_those_weights(config, trained, tmp_path):
    start = changed(
        config, n_layer=None, n_head=None, n_embd=None, init_from=str(trained), lr=1e-9, max_steps=1
    )
    train(start)
    before = GPT2.from_pretrained(trained).state_dict()
    after = GPT2.from_pretrained(config.out).state_dict()
    for name, weight in before.items():
        torch.testing.assert_close(after[name], weight, atol=1e-6, rtol=0)
    assert float(rows(config.out)[0]["val_loss"]) == pytest.approx(
        float(rows(trained)[-1]["val_loss"]), abs=1e-4
    )


def test_fine_tuning_prepares_text_with_the_tokenizer_of_the_checkpoint(
    config, trained, text, tmp_path
):
    start = changed(config, n_layer=None, n_head=None, n_embd=None, init_from=str(trained))
    train(changed(start, data=str(text)))
    ours = Tokenizer.from_pretrained(config.out)
    assert ours.fingerprint() == Tokenizer.from_pretrained(trained).fingerprint()


def test_flag_device_cuda_is_used_or_refused(config):
    chosen = changed(config, device="cuda")
    if torch.cuda.is_available():
        train(chosen)
    else:
        with pytest.raises(ConfigError, match="device is 'cuda'.*--device cpu"):
            train(chosen)


def test_flag_backend_forces_the_ops(config, tmp_path, monkeypatch):
    from gpt2fast.ops import backend as backend_module

    asked = []
    real = loop._Run._step

    def spy(self):
        asked.append(backend_module.requested_backend())
        real(self)

    monkeypatch.setattr(loop._Run, "_step", spy)
    train(changed(config, backend="reference", max_steps=1))
    assert asked == ["reference"]
    assert backend_module.requested_backend() == "auto"


def test_flag_compile_compiles_the_model(config, monkeypatch):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda model, **_: compiled.append(model) or model)
    train(changed(config, max_steps=1))
    assert not compiled
    train(changed(config, max_steps=1, compile=True, out=config.out + "2"))
    assert len(compiled) == 1


def test_flag_threads_sets_the_number_of_threads_for_the_run(config, monkeypatch):
    seen = []
    real = loop._Run._step

    def spy(self):
        seen.append(torch.get_num_threads())
        real(self)

    monkeypatch.setattr(loop._Run, "_step", spy)
    before = torch.get_num_threads()
    train(changed(config, threads=1, max_steps=1))
    train(changed(config, threads=2, max_steps=1, out=config.out + "2"))
    assert seen == [1, 2]
    assert torch.get_num_threads() == before


# -- settings and their mistakes ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("n_layer", 0, "at least 1"),
        ("n_layer", "four", "an integer"),
        ("n_embd", 15, "a multiple of n_head"),
        ("block_size", 1.5, "an integer"),
        ("dropout", 1.0, r"in \[0, 1\)"),
        ("dropout", True, "a number"),
        ("lr", float("nan"), "finite"),
        ("lr", 0.0, "above 0"),
        ("lr", "fast", "a number"),
        ("min_lr", 1.0, "between 0 and lr"),
        ("beta2", 1.0, r"in \[0, 1\)"),
        ("weight_decay", -0.1, "0 or more"),
        ("grad_clip", 0.0, "above 0"),
        ("max_epochs", 1.0, "without max_steps"),
        ("eval_interval", 0, "at least 1"),
        ("keep_checkpoints", 0, "at least 1"),
        ("val_fraction", 1.0, r"in \(0, 1\)"),
        ("split", "lines", "one of position, documents"),
        ("dtype", "float8", "one of float32, bfloat16, float16"),
        ("device", "tpu", "one of auto, cpu, cuda"),
        ("compile", "yes", "true or false"),
        ("seed", -1, "from 0 to"),
        ("threads", 100_000, "at most 1024"),
        ("init_from", "gpt2", "brings its own architecture"),
    ],
)
def test_bad_setting_is_named_with_its_limit(name, value, told):
    with pytest.raises(ConfigError, match=told) as caught:
        TrainConfig(**{**TINY, name: value})
    assert (repr(value) in str(caught.value)) or name in ("init_from",)


def test_every_setting_has_a_help_text():
    assert set(field_help()) == {field.name for field in dataclasses.fields(TrainConfig)}


def test_settings_survive_a_round_trip(config):
    assert TrainConfig.from_dict(config.to_dict(), source="here") == config
    with pytest.raises(ConfigError, match="here: unknown field lrr"):
        TrainConfig.from_dict({"lrr": 1}, source="here")


SHIPPED = {
    "shakespeare_char": {
        "batch_size": 64, "block_size": 128, "n_layer": 6, "n_head": 8, "n_embd": 256,
        "dropout": 0.1, "lr": 3e-4, "max_steps": 5000, "log_interval": 500,
        "checkpoint_interval": 1000,
    },
    "shakespeare_cpu": {
        "n_layer": 4, "n_head": 4, "n_embd": 128, "block_size": 64, "batch_size": 12,
        "max_steps": 2000, "dropout": 0.0, "lr": 1e-3, "min_lr": 1e-4, "warmup_steps": 100,
        "beta2": 0.99, "weight_decay": 0.1, "grad_clip": 1.0,
    },
    "adventures": {"block_size": 256, "tokenizer": "bpe", "vocab_size": 2048},
    "finetune": {"init_from": "gpt2", "lr": 3e-5, "block_size": 256},
    "wikitext2": {
        "dataset": "Salesforce/wikitext", "dataset_config": "wikitext-2-raw-v1",
        "n_layer": 12, "n_head": 12, "n_embd": 768, "block_size": 1024, "batch_size": 8,
        "lr": 3e-4, "weight_decay": 0.01, "warmup_steps": 2000, "grad_clip": 1.0,
        "max_epochs": 10, "max_hours": 12, "dtype": "bfloat16",
    },
    "notebook": {
        "n_layer": 12, "n_head": 12, "n_embd": 768, "block_size": 512, "batch_size": 12,
        "lr": 3e-4, "max_epochs": 10,
    },
    "owt": {
        "dataset": "Skylion007/openwebtext", "n_layer": 12, "n_head": 12, "n_embd": 768,
        "block_size": 1024, "batch_size": 12, "grad_accumulation": 40, "lr": 6e-4, "min_lr": 6e-5,
        "warmup_steps": 2000, "max_steps": 600_000, "weight_decay": 0.1, "beta2": 0.95,
        "grad_clip": 1.0, "dtype": "bfloat16", "compile": True,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_recipe_says_what_it_should(name):
    config, resume = command.parse(["--config", name])
    assert resume is None
    assert {key: getattr(config, key) for key in SHIPPED[name]} == SHIPPED[name]


def test_every_shipped_recipe_is_covered_here():
    assert set(command.recipes()) == set(SHIPPED)


def test_flags_override_the_recipe_in_either_order_and_spelling():
    for arguments in (
        ["--config", "shakespeare_cpu", "--max-steps", "7", "--lr=1e-2"],
        ["--lr", "0.01", "--max_steps=7", "--config", "shakespeare_cpu"],
    ):
        config, _ = command.parse(arguments)
        assert (config.max_steps, config.lr, config.n_embd) == (7, 1e-2, 128)


def test_max_epochs_replaces_the_steps_of_a_recipe():
    config, _ = command.parse(["--config", "shakespeare_cpu", "--max-epochs", "2"])
    assert config.max_steps is None
    assert config.steps(train_tokens=7681) == 21


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--max-stepz", "3"], "no option --max-stepz; did you mean --max-steps?"),
        (["--lr", "fast"], "lr is 'fast'"),
        (["--lr.x", "3"], "no option --lr.x"),
        (["--mixture.x", "3"], "no option --mixture.x"),
        (["--lr"], "--lr"),
        (["stray"], "stray"),
        (["--config", "nowhere"], "neither a file nor a shipped recipe"),
        (["--resume", "nowhere"], "no such folder"),
        (["--config", "BAD_KEY"], "'lrr' is not accepted"),
        (["--config", "BAD_YAML"], "bad.yaml"),
        (["--config", "BINARY"], "bad.yaml"),
    ],
)
def test_mistake_on_the_command_line_is_one_line_and_code_2(arguments, told, tmp_path, capsys):
    contents = {"BAD_KEY": b"lrr: 1\n", "BAD_YAML": b"lr: [\n", "BINARY": b"\xc4\x00\xff"}
    if arguments[-1] in contents:
        path = tmp_path / "bad.yaml"
        path.write_bytes(contents[arguments[-1]])
        arguments = [arguments[0], str(path)]
    assert command.main(arguments) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ") and message.count("\n") == 1
    assert told in message


def test_help_shows_every_flag(capsys):
    with pytest.raises(SystemExit) as stop:
        command.main(["--help"])
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    for field in dataclasses.fields(TrainConfig):
        assert f"--{field.name.replace('_', '-')}" in shown


# -- schedule, optimizer, loss --------------------------------------------------------------------


@pytest.mark.parametrize("step", [0, 1, 99, 100, 101, 1050, 1999, 2000])
def test_schedule_is_nanogpts(step):
    lr, min_lr, warmup, steps = 1e-3, 1e-4, 100, 2000
    if step < warmup:
        expected = lr * (step + 1) / (warmup + 1)
    else:
        ratio = (step - warmup) / (steps - warmup)
        expected = min_lr + 0.5 * (1.0 + math.cos(math.pi * ratio)) * (lr - min_lr)
    actual = learning_rate(step, lr=lr, min_lr=min_lr, warmup_steps=warmup, steps=steps)
    assert actual == pytest.approx(expected, rel=1e-12)


def test_optimizer_is_torchs_adamw_with_decay_for_matrices_only():
    torch.manual_seed(0)
    ours = torch.nn.Sequential(torch.nn.Linear(5, 4), torch.nn.LayerNorm(4))
    theirs = torch.nn.Sequential(torch.nn.Linear(5, 4), torch.nn.LayerNorm(4))
    theirs.load_state_dict(ours.state_dict())
    optimizer = Optimizers(ours.named_parameters(), beta1=0.9, beta2=0.95, weight_decay=0.5)
    reference = torch.optim.AdamW(
        [
            {"params": [theirs[0].weight], "weight_decay": 0.5},
            {"params": [theirs[0].bias, *theirs[1].parameters()], "weight_decay": 0.0},
        ],
        betas=(0.9, 0.95),
    )
    for step in range(5):
        batch, lr = torch.randn(3, 5), 0.1 / (step + 1)
        for model in (ours, theirs):
            model.zero_grad()
            model(batch).square().sum().backward()
        optimizer.step(lr)
        for group in reference.param_groups:
            group["lr"] = lr
        reference.step()
    for mine, expected in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine, expected)


def test_gradient_accumulation_gives_the_gradient_of_the_whole_batch(config, monkeypatch):
    data = DataModule(config.data, config.block_size, 4, seed=config.seed)
    inputs, targets = next(iter(data.train_dataloader()))
    runs = {1: [(inputs, targets)], 2: [(inputs[:2], targets[:2]), (inputs[2:], targets[2:])]}
    weights = []
    for parts, batches in runs.items():
        monkeypatch.setattr(DataModule, "train_dataloader", lambda self, given=batches: given)
        out = f"{config.out}{parts}"
        train(changed(config, max_steps=1, grad_accumulation=parts, batch_size=4 // parts, out=out))
        weights.append(GPT2.from_pretrained(out).state_dict())
    for name in weights[0]:
        torch.testing.assert_close(weights[0][name], weights[1][name], atol=1e-5, rtol=1e-5)


def recorded_windows(monkeypatch):
    """The windows that are drawn from now on, in order, and each with its batch's size."""
    drawn = []
    original = TrainingBatches.__getitem__

    def watched(self, step):
        batch = original(self, step)
        drawn.extend(batch[0].tolist())
        return batch

    monkeypatch.setattr(TrainingBatches, "__getitem__", watched)
    return drawn


@pytest.mark.parametrize("sampling", ["random", "epoch"])
def test_smaller_batches_with_more_accumulation_are_the_same_run(config, monkeypatch, sampling):
    drawn = recorded_windows(monkeypatch)
    windows, weights, losses = [], [], []
    for parts in (1, 2, 4):
        drawn.clear()
        out = f"{config.out}-{parts}"
        asked = changed(
            config, max_steps=3, batch_size=16 // parts, grad_accumulation=parts, out=out,
            sampling=sampling, dropout=0.0, log_interval=1,
        )  # fmt: skip
        train(asked)
        windows.append(list(drawn))
        weights.append(GPT2.from_pretrained(out).state_dict())
        losses.append([float(row["train_loss"]) for row in rows(out) if row["train_loss"]])
    assert windows[0] == windows[1] == windows[2] and len(windows[0]) == 48
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert losses[0] == pytest.approx(losses[2], rel=1e-5)
    for name, expected in weights[0].items():
        for found in weights[1:]:
            torch.testing.assert_close(found[name], expected, atol=1e-5, rtol=1e-4)


def test_a_run_that_is_resumed_with_smaller_batches_goes_on_with_its_windows(config, monkeypatch):
    drawn = recorded_windows(monkeypatch)
    whole = changed(config, max_steps=4, batch_size=8, checkpoint_interval=2, sampling="random")
    train(whole)
    expected = list(drawn)
    drawn.clear()
    smaller = changed(whole, batch_size=2, grad_accumulation=4)
    train(smaller, resume=Path(config.out) / "checkpoints" / "step-00000002")
    assert drawn == expected[16:]


def test_validation_loss_is_the_mean_over_the_whole_split(config, trained):
    result = float(rows(trained)[-1]["val_loss"])
    data = DataModule(config.data, config.block_size, 1)
    model = GPT2.from_pretrained(trained).eval()
    total, count = 0.0, 0
    with torch.no_grad():
        for inputs, targets in data.val_dataloader():
            logits = model(inputs).logits.flatten(0, 1).double()
            total += torch.nn.functional.cross_entropy(
                logits, targets.flatten(), reduction="sum"
            ).item()
            count += targets.numel()
    assert count == data.meta.val_tokens - 1
    assert result == pytest.approx(total / count, abs=1e-4)


def test_loss_per_character_counts_the_characters_of_the_text(text, config):
    result = train(changed(config, data=str(text), tokenizer="bpe", vocab_size=300))
    meta = DataModule(Path(config.out) / "data", config.block_size, 1).meta
    expected = result.val_loss * meta.val_tokens / meta.val_characters
    assert result.val_loss_per_char == pytest.approx(expected)
    assert result.val_loss_per_char < result.val_loss


def test_training_learns(config):
    result = train(changed(config, max_steps=150, n_embd=32, eval_interval=150, log_interval=50))
    log = rows(config.out)
    assert float(log[0]["val_loss"]) > 2.8
    assert result.val_loss < 1.9
    assert result.best_val_loss <= result.val_loss


# -- runs that repeat, stop and continue ----------------------------------------------------------

RESUMABLE = {"max_steps": 20, "dropout": 0.2, "grad_accumulation": 2, "log_interval": 4}


def test_same_seed_gives_the_same_run(config, trained):
    train(config)
    assert outcome(Path(config.out)) == outcome(trained)


def start(arguments: list[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "gpt2fast.train", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parent.parent,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)},
    )


def wait_for(path: Path, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 60
    while not path.exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, f"no {path}"
        time.sleep(0.002)


def settings_of(config: TrainConfig, **changes) -> list[str]:
    return flags(changed(config, **changes).to_dict())


def read_moments(directory: Path) -> dict[str, torch.Tensor]:
    """The optimizer's state of a checkpoint, in tensors of its own."""
    model = GPT2.from_pretrained(directory)
    optimizers = Optimizers(model.named_parameters(), beta1=0, beta2=0, weight_decay=0)
    tensors = optimizers.tensors()
    checkpoint.load_optimizer(directory, tensors, Group("cpu"))
    return tensors


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_killed_and_resumed_run_equals_the_straight_one_bit_for_bit(config, tmp_path, dtype):
    config = changed(config, **RESUMABLE, dtype=dtype)
    straight = tmp_path / "straight"
    train(changed(config, out=str(straight), checkpoint_interval=10))

    out = tmp_path / "killed"
    # Saving at step 10 alone, then many more steps: the kill falls between two checkpoints.
    process = start(settings_of(config, out=str(out), checkpoint_interval=10, keep_checkpoints=9))
    wait_for(out / "checkpoints" / "step-00000010", process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    for later in checkpoint.step_checkpoints(out / "checkpoints"):
        if later.name != "step-00000010":
            shutil.rmtree(later)
    (out / "model.safetensors").unlink(missing_ok=True)

    resumed = start(["--resume", str(out)])
    printed, errors = resumed.communicate(timeout=120)
    assert resumed.returncode == 0, errors
    assert "resumed from" in printed and "at step 10" in printed
    assert digest(out / "model.safetensors") == digest(straight / "model.safetensors")
    ours, theirs = outcome(out), outcome(straight)
    assert ours["log"] == theirs["log"]
    for name in ("step-00000020",):
        moments = [read_moments(x / "checkpoints" / name) for x in (out, straight)]
        for key, mine in moments[0].items():
            assert mine.any() and torch.equal(mine, moments[1][key]), key


@pytest.mark.parametrize("at", [1, 7, 13])
def test_resuming_at_any_step_equals_the_straight_run(config, tmp_path, at, monkeypatch):
    config = changed(config, **RESUMABLE, checkpoint_interval=at)
    straight = changed(config, out=str(tmp_path / "straight"))
    train(straight)
    real = loop._Run._step

    def stop_after(self):
        if self.position.step == at:
            raise KeyboardInterrupt
        real(self)

    monkeypatch.setattr(loop._Run, "_step", stop_after)
    with pytest.raises(KeyboardInterrupt):
        train(config)
    monkeypatch.setattr(loop._Run, "_step", real)
    train(config, resume=config.out)
    assert outcome(Path(config.out)) == outcome(Path(straight.out))


@pytest.mark.parametrize(
    ("signum", "code"),
    [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129), (signal.SIGUSR1, 138)],
)
def test_signal_saves_a_checkpoint_and_says_how_to_go_on(config, signum, code):
    out = Path(config.out)
    process = start(settings_of(config, max_steps=100_000, checkpoint_interval=5, log_interval=500))
    wait_for(out / "checkpoints" / "step-00000005", process)
    process.send_signal(signum)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == code, errors
    assert "Traceback" not in errors
    assert f"--resume {out}" in errors
    stopped = checkpoint.find_checkpoint(out)
    step = checkpoint.load_state(stopped)["position"]["step"]
    assert stopped.name == f"step-{step:08d}" and f"stopped at step {step}" in errors
    config, resume = command.parse(["--resume", str(out), "--max-steps", str(step + 2)])
    assert resume == stopped
    assert train(config, resume).steps == step + 2


def test_a_closed_terminal_saves_a_checkpoint(config):
    """The terminal takes no more lines by then, and nobody is left to read an error."""
    out = Path(config.out)
    arguments = settings_of(config, max_steps=100_000, checkpoint_interval=5, log_interval=500)
    root = str(Path(__file__).parent.parent)
    pid, terminal = pty.fork()
    if pid == 0:
        os.environ["PYTHONPATH"] = root
        os.execv(sys.executable, [sys.executable, "-m", "gpt2fast.train", *arguments])
    deadline = time.monotonic() + 120
    while not (out / "checkpoints" / "step-00000005").exists():
        if select.select([terminal], [], [], 0.05)[0]:
            os.read(terminal, 1 << 16)
        assert time.monotonic() < deadline
    os.close(terminal)
    _, status = os.waitpid(pid, 0)
    assert os.WIFEXITED(status) and os.WEXITSTATUS(status) == 128 + signal.SIGHUP
    stopped = checkpoint.find_checkpoint(out)
    step = checkpoint.load_state(stopped)["position"]["step"]
    config, resume = command.parse(["--resume", str(out), "--max-steps", str(step + 1)])
    assert train(config, resume).steps == step + 1


def test_a_run_under_nohup_goes_on_when_the_terminal_is_closed():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with SignalWatch() as watch:
            os.kill(os.getpid(), signal.SIGHUP)
            assert watch.received is None
            os.kill(os.getpid(), signal.SIGUSR2)
            assert watch.received == signal.SIGUSR2
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_interrupted_evaluation_is_made_up_for_on_resuming(config, monkeypatch):
    """A run stopped between a step and its validation validates first when it goes on."""
    real = loop._Run._evaluate

    def interrupted(self):
        if self.position.step == 2:
            self._stop(signal.SIGINT)
        real(self)

    monkeypatch.setattr(loop._Run, "_evaluate", interrupted)
    with pytest.raises(Interrupted):
        train(config)
    monkeypatch.setattr(loop._Run, "_evaluate", real)
    train(config, resume=config.out)
    assert [row["step"] for row in rows(config.out) if row["val_loss"]] == ["0", "2", "3"]


def test_log_continues_without_the_rows_that_are_made_again(config):
    config = changed(config, max_steps=6, checkpoint_interval=4)
    train(config)
    once = rows(config.out)
    shutil.rmtree(Path(config.out) / "checkpoints" / "step-00000006")
    with (Path(config.out) / "log.csv").open("a") as file:
        file.write("7,99")  # a row that a crash cut short
    train(config, resume=config.out)
    again = rows(config.out)
    assert list(again[0]) == list(COLUMNS)
    assert [row["step"] for row in again] == [row["step"] for row in once]
    assert [row["train_loss"] for row in again] == [row["train_loss"] for row in once]


def test_last_checkpoints_and_the_best_are_kept(config):
    train(changed(config, max_steps=7, checkpoint_interval=2, keep_checkpoints=2))
    names = sorted(path.name for path in (Path(config.out) / "checkpoints").iterdir())
    assert names == ["best", "step-00000006", "step-00000007"]


def test_best_checkpoint_has_the_lowest_validation_loss(config):
    result = train(changed(config, max_steps=12, lr=0.3, warmup_steps=0, min_lr=0.3))
    losses = {int(r["step"]): float(r["val_loss"]) for r in rows(config.out) if r["val_loss"]}
    del losses[0]
    best = min(losses, key=lambda step: losses[step])
    assert result.best_step == best
    state = checkpoint.load_state(Path(config.out) / "checkpoints" / "best")
    assert state["position"]["step"] == best


def test_killed_while_saving_leaves_whole_checkpoints(config, trained):
    folder = trained / "checkpoints"
    (folder / ".step-00000009.new").mkdir()
    (folder / "best").rename(folder / ".best.old")
    checkpoint.clean_up(folder)
    assert sorted(path.name for path in folder.iterdir()) == ["best", "step-00000003"]


def test_finished_run_loads_as_a_model_with_its_tokenizer(trained, text):
    model = GPT2.from_pretrained(trained)
    tokenizer = Tokenizer.from_pretrained(trained)
    ids = torch.tensor([tokenizer.encode("a storm")])
    assert model(ids).logits.shape == (1, 7, tokenizer.vocab_size)
    for name in ("config.yaml", "log.csv", "checkpoints/best/config.json"):
        assert (trained / name).is_file()
    final = GPT2.from_pretrained(trained / "checkpoints" / "step-00000003")
    assert torch.equal(final.wte.weight, model.wte.weight)


def test_a_run_is_not_resumed_on_another_text(config, tmp_path, capsys):
    text, other = (write_text(tmp_path / f"{seed}.txt", seed=seed) for seed in (1, 2))
    config = changed(config, data=str(text))
    train(config)
    for flag in (f"--data={other}", "--data=nowhere.txt", "--val-fraction=0.3"):
        assert command.main(["--resume", config.out, "--max-steps=99", flag]) == 2
        name, _, value = flag[2:].partition("=")
        message = capsys.readouterr().err
        assert f"{name.replace('-', '_')} was" in message and value in message
    assert str(other) not in (Path(config.out) / "config.yaml").read_text()
    text.unlink()  # what was prepared of it is enough
    steps = str(config.max_steps + 1)
    assert command.main(["--resume", config.out, "--max-steps", steps]) == 0


def test_a_run_without_its_settings_says_what_to_name(trained, tmp_path, capsys):
    run = Path(shutil.copytree(trained, tmp_path / "copy"))
    (run / "config.yaml").unlink()
    assert command.main(["--resume", str(run), "--max-steps", "9"]) == 2
    assert "config.yaml" in (message := capsys.readouterr().err) and "--config" in message
    _, resume = command.parse(["--resume", str(run), "--config", str(trained / "config.yaml")])
    assert resume == run / "checkpoints" / "step-00000003"


def test_run_is_not_overwritten(trained):
    config, _ = command.parse(["--config", str(trained / "config.yaml")])
    with pytest.raises(ConfigError, match="already holds a run.*--resume.*--out"):
        train(config)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"n_layer": 2}, "n_layer was 1 there and is 2 now"),
        ({"block_size": 6}, "block_size was 8 there and is 6 now"),
        ({"max_steps": 1}, "past the end of this run"),
        ({"data": "OTHER"}, "the data's"),
    ],
)
def test_resuming_with_other_settings_is_refused(config, trained, tmp_path, changes, told):
    if changes.get("data") == "OTHER":
        other = write_text(tmp_path / "other.txt", seed=1)
        prepare_data([other], tmp_path / "other", tokenizer="char")
        changes = {"data": str(tmp_path / "other")}
    with pytest.raises(ConfigError, match=told):
        train(changed(config, **changes), resume=trained)


@pytest.mark.parametrize("damage", ["gone", "cut", "pickle", "other"])
def test_damaged_optimizer_state_is_refused(config, trained, tmp_path, damage):
    copy = tmp_path / "step-00000003"
    shutil.copytree(trained / "checkpoints" / "step-00000003", copy)
    folder = copy / checkpoint.OPTIMIZER
    if damage == "gone":
        shutil.rmtree(folder)
    elif damage == "cut":
        (shard,) = folder.glob("*.distcp")
        shard.write_bytes(shard.read_bytes()[:100])
    elif damage == "pickle":  # an index that would run a command
        (folder / ".metadata").write_bytes(b"cos\nsystem\n(S'touch " + bytes(tmp_path / "ran")
                                           + b"'\ntR.")  # fmt: skip
    else:
        shutil.rmtree(folder)
        save_tensors({"exp_avg.wte.weight": torch.zeros(3, 3)}, folder, Group("cpu"))
    with pytest.raises((ConfigError, WeightsError), match="optimizer") as caught:
        train(config, resume=copy)
    assert isinstance(caught.value, ConfigError) is (damage == "other")
    assert str(copy) in str(caught.value) and not (tmp_path / "ran").exists()


@pytest.mark.parametrize("damage", ["missing", "cut", "pickle"])
def test_damaged_training_state_is_refused(config, trained, tmp_path, damage):
    copy = tmp_path / "step-00000003"
    shutil.copytree(trained / "checkpoints" / "step-00000003", copy)
    state = copy / state_file.NAME
    if damage == "missing":
        state.unlink()
    elif damage == "cut":
        state.write_bytes(state.read_bytes()[:200])
    else:
        state.unlink()
        torch.save({"format": 2, "config": Path("x")}, copy / state_file.OLD_NAME)
    with pytest.raises((ConfigError, WeightsError)) as caught:
        train(config, resume=copy)
    assert isinstance(caught.value, ConfigError) is (damage == "missing")
    assert str(copy) in str(caught.value) and "weights_only" not in str(caught.value)


@pytest.mark.parametrize("entry", ["position", "random", "scale", "config", "updates", "data"])
@pytest.mark.parametrize("damage", ["gone", "another type"])
def test_a_training_state_without_an_entry_is_a_damaged_one(
    config, trained, tmp_path, entry, damage
):
    copy = tmp_path / "step-00000003"
    shutil.copytree(trained / "checkpoints" / "step-00000003", copy)
    state = checkpoint.load_state(copy)
    if damage == "gone":
        del state[entry]
    else:
        state[entry] = "nonsense"
    state_file.write_state(copy / state_file.NAME, state)
    with pytest.raises(Error) as caught:
        train(changed(config, max_steps=5), resume=copy)
    assert str(copy) in str(caught.value) or entry == "config"


def test_a_run_that_an_older_version_began_goes_on_bit_for_bit(config, trained, tmp_path):
    runs = []
    for name in ("new", "old"):
        run = tmp_path / name
        shutil.copytree(trained, run)
        copy = run / "checkpoints" / "step-00000003"
        if name == "old":  # which kept a pickle
            state = checkpoint.load_state(copy)
            (copy / state_file.NAME).unlink()
            torch.save(state, copy / state_file.OLD_NAME)
        train(changed(config, out=str(run), max_steps=5), resume=copy)
        runs.append((run / "checkpoints" / "step-00000005" / "model.safetensors").read_bytes())
    assert runs[0] == runs[1]


def test_a_state_is_read_as_it_was_written(tmp_path):
    state = {
        "python": random.Random(1).getstate(),
        "torch": [torch.get_rng_state(), torch.randn(2, 3, dtype=torch.float64)],
        "numbers": [0.1, 1e-300, float("inf"), -0.0, 2**63, True, None, "é\n", []],
        "within": {"a.b": {"c": (1, (2.5, None))}, "": {}},
    }
    state_file.write_state(tmp_path / state_file.NAME, state)
    read = state_file.read_state(tmp_path / state_file.NAME)
    for ours, theirs in zip(read.pop("torch"), state.pop("torch"), strict=True):
        assert torch.equal(ours, theirs) and ours.dtype == theirs.dtype
    assert repr(read) == repr(state)


def test_an_empty_newest_checkpoint_does_not_hide_the_older_ones(trained, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(trained, copy)
    (copy / "checkpoints" / "step-00000009").mkdir()
    assert checkpoint.find_checkpoint(copy).name == "step-00000003"


def test_an_index_that_leads_out_of_its_folder_is_refused(config, trained, tmp_path):
    copy = tmp_path / "step-00000003"
    shutil.copytree(trained / "checkpoints" / "step-00000003", copy)
    index = copy / checkpoint.OPTIMIZER / ".metadata"
    content = index.read_bytes()
    assert b"__0_0.distcp" in content
    index.write_bytes(content.replace(b"__0_0.distcp", b"../../secret"))
    with pytest.raises(WeightsError, match="secret"):
        train(changed(config, max_steps=5), resume=copy)


def test_diverging_loss_stops_the_run_and_names_step_and_rate(config, monkeypatch):
    real = loop._Run._loss

    def explode(self, batch):
        loss = real(self, batch)
        return loss * math.nan if self.position.step == 5 and self.model.training else loss

    monkeypatch.setattr(loop._Run, "_loss", explode)
    with pytest.raises(TrainingError, match=r"step 6 .*nan.*learning rate 0\.\d+.*step-00000004"):
        train(changed(config, max_steps=9, checkpoint_interval=2))
    state = checkpoint.load_state(checkpoint.find_checkpoint(Path(config.out)))
    assert state["position"]["step"] == 4


def test_bad_data_is_caught_before_the_first_step(config, prepared, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(loop._Run, "_step", lambda *_: pytest.fail("a step was made"))
    empty = tmp_path / "empty.txt"
    empty.write_text("")
    with pytest.raises(Error):
        train(changed(config, data=str(empty)))
    with pytest.raises(DataError, match="block_size"):
        train(changed(config, block_size=5000))
    damaged = tmp_path / "damaged"
    shutil.copytree(prepared, damaged)
    tokens = bytearray((damaged / "train.bin").read_bytes())
    tokens[100:102] = b"\xff\xff"
    (damaged / "train.bin").write_bytes(bytes(tokens))
    assert command.main(settings_of(config, data=str(damaged))) == 1
    assert "outside the vocabulary" in capsys.readouterr().err


def test_foreign_tokenizer_is_refused(config, trained, tmp_path):
    other = write_text(tmp_path / "other.txt", seed=1)
    other.write_text(other.read_text().replace("storm", "STORM"))
    prepare_data([other], tmp_path / "other", tokenizer="char")
    start = changed(config, n_layer=None, n_head=None, n_embd=None, init_from=str(trained))
    with pytest.raises(DataError, match="another tokenizer"):
        train(changed(start, data=str(tmp_path / "other")))


def test_progress_bar_shows_on_a_terminal(config, monkeypatch, capsys):
    from gpt2fast._system import output
    from gpt2fast.training.logs import progress

    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    with output.shown():
        assert isinstance(progress.open_display(3, 0), progress._Bar)
        train(config)
    shown = capsys.readouterr().out
    assert "tok/s" in shown and "val" in shown


# -- resuming from an older checkpoint, or from the best one --------------------------------------


def test_resuming_from_an_older_checkpoint_sets_the_later_ones_aside(config, caplog, capsys):
    config = changed(config, max_steps=8, checkpoint_interval=2, keep_checkpoints=4)
    train(config)
    folder = Path(config.out) / "checkpoints"
    shorter = changed(config, max_steps=5, keep_checkpoints=1, lr=1e-3)
    with caplog.at_level(logging.INFO, "gpt2fast"):
        train(shorter, resume=folder / "step-00000004")
    assert "set aside the checkpoints of later steps" in caplog.text
    assert capsys.readouterr() == ("", ""), "a program that trains says itself what it prints"
    assert checkpoint.find_checkpoint(Path(config.out)).name == "step-00000005"
    assert sorted(path.name for path in folder.iterdir()) == [
        "best", "replaced-step-00000006", "replaced-step-00000008", "step-00000005"
    ]  # fmt: skip
    state = checkpoint.load_state(folder / "best")
    assert state["position"]["step"] == 5  # not the one of the branch that was left


@pytest.fixture
def only_best(config) -> TrainConfig:
    """A run that was killed before its first step checkpoint."""
    config = changed(config, max_steps=6)
    train(config)
    out = Path(config.out)
    shutil.rmtree(out / "checkpoints" / "step-00000006")
    for name in ("config.json", "model.safetensors"):
        (out / name).unlink()
    return config


def test_a_run_with_only_its_best_checkpoint_is_found(only_best):
    best = Path(only_best.out) / "checkpoints" / "best"
    with pytest.raises(ConfigError, match="already holds a run.*best"):
        train(only_best)
    saved = GPT2.from_pretrained(best)
    assert torch.equal(GPT2.from_pretrained(only_best.out).wte.weight, saved.wte.weight)
    config, resume = command.parse(["--resume", only_best.out])
    assert resume == best
    assert train(config, resume).steps == 6


# -- two runs at once, lost readers, full disks ---------------------------------------------------


def test_a_second_run_in_the_same_folder_is_refused(config, monkeypatch):
    pytest.importorskip("fcntl")
    real, refused = loop._Run._step, []

    def step(self):
        with pytest.raises(ConfigError, match="another process is training in .*--out"):
            train(config)
        refused.append(self.position.step)
        real(self)

    monkeypatch.setattr(loop._Run, "_step", step)
    train(config)
    assert refused == [0, 1, 2]
    assert not (Path(config.out) / ".lock").exists()


@pytest.mark.parametrize("redirection", ["| true", ">&-", "> /dev/full"])
def test_a_reader_that_goes_does_not_end_the_run(config, redirection):
    if "full" in redirection and not Path("/dev/full").exists():
        pytest.skip("no /dev/full")
    arguments = shlex.join(settings_of(config))
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", f"{sys.executable} -m gpt2fast.train {arguments} "
         + redirection],
        capture_output=True, text=True, cwd=Path(__file__).parent.parent,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    assert (Path(config.out) / "model.safetensors").is_file()


def test_a_file_as_run_folder_is_refused(config, text, capsys):
    assert command.main(settings_of(config, out=str(text))) == 2
    message = capsys.readouterr().err
    assert message == f"error: out is {str(text)!r}, which is a file; name a folder with --out\n"


@pytest.mark.parametrize("full", ["folder", "weights", "state", "log"])
def test_a_full_disk_is_one_line_and_the_last_checkpoint_stands(config, monkeypatch, capsys, full):
    real = loop._Run._step

    def no_space(*args, **kwargs):
        raise OSError(28, "No space left on device", "somewhere")

    def torn_archive(*args, **kwargs):
        raise RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 64 vs 0")

    def unsaved(*args, **kwargs):
        raise WeightsError("the model cannot be saved to somewhere: [Errno 28] No space left")

    def step(self):
        if self.position.step == 4:
            target, name, failure = {
                "folder": (Path, "mkdir", no_space),
                "weights": (GPT2, "save_pretrained", unsaved),
                "state": (torch, "save", torn_archive),
                "log": (RunLog, "write", no_space),
            }[full]
            monkeypatch.setattr(target, name, failure)
        real(self)

    monkeypatch.setattr(loop._Run, "_step", step)
    assert command.main(settings_of(config, max_steps=9, checkpoint_interval=2)) == 1
    message = capsys.readouterr().err
    assert message.startswith("error: ") and message.count("\n") == 1
    folder = Path(config.out) / "checkpoints"
    assert f"the last checkpoint stands: {folder / 'step-00000004'}" in message
    assert checkpoint.load_state(folder / "step-00000004")["position"]["step"] == 4
    assert not list(folder.glob(".*"))


@pytest.mark.parametrize(
    "error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: 9 bytes")]
)
def test_running_out_of_memory_says_what_to_lower(config, monkeypatch, error):
    def step(self):
        raise error

    monkeypatch.setattr(loop._Run, "_step", step)
    with pytest.raises(TrainingError, match=r"out of memory.*--batch-size \(now 4"):
        train(config)


def test_commands_to_copy_are_quoted(config, tmp_path, capsys):
    out = tmp_path / "my run"
    from gpt2fast._system import output

    with output.shown():
        train(changed(config, out=str(out), max_steps=1))
    assert f"gpt2fast.generate --model '{out}'" in capsys.readouterr().out


# -- data that are not what the flags say ---------------------------------------------------------


def test_a_run_as_data_is_refused(config, trained):
    with pytest.raises(DataError, match="folder of a training run.*--resume.*--init-from"):
        train(changed(config, data=str(trained)))
    assert not Path(config.out).exists()


@pytest.mark.parametrize(
    ("name", "value", "found"),
    [
        ("tokenizer", "bpe", "'char'"),
        ("tokenizer", "OTHER", "char, "),
        ("vocab_size", 7, r"\d+"),
        ("split", "documents", "'position'"),
        ("val_fraction", 0.5, "0.1"),
    ],
)
def test_settings_that_contradict_prepared_data_are_refused(config, tmp_path, name, value, found):
    if value == "OTHER":
        value = str(tmp_path / "other")
        CharTokenizer.train(["another text"]).save_pretrained(value)
    with pytest.raises(ConfigError, match=rf"{name} is {value!r}.*prepared with .*{found}"):
        train(changed(config, **{name: value}))


def test_settings_that_agree_with_prepared_data_are_accepted(config, text, tmp_path):
    # The text is too short for the size asked for; it is the size asked for that counts.
    settings = {"tokenizer": "bpe", "vocab_size": 2048, "split": "documents", "val_fraction": 0.2}
    prepared = prepare_data([text], tmp_path / "own", **settings)
    assert prepared.meta.vocab_size < 2048
    train(changed(config, data=str(prepared.directory), **settings))
