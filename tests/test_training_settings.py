"""Settings of a training run count, and mistakes in them are named."""
# ruff: noqa: F811

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from gpt2fast.cli import train as command
from gpt2fast.data import prepare_data
from gpt2fast.errors import ConfigError, DataError
from gpt2fast.model import GPT2
from gpt2fast.tokenizer import CharTokenizer, Tokenizer
from gpt2fast.training import TrainConfig, train
from gpt2fast.training.config import field_help
from run_hooks import before_updates
from small_runs import (  # noqa: F401
    TINY,
    changed,
    config,
    flags,
    outcome,
    prepared,
    rows,
    start,
    text,
    trained,
    write_text,
)

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
    "moments": ({}, "bfloat16"),
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
    *("lora_rank", "lora_alpha", "lora_dropout", "lora_targets"),  # test_lora_runs
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


def test_flag_backend_forces_the_ops(config, tmp_path):
    from gpt2fast.ops import backend as backend_module

    asked = []
    with before_updates(lambda _: asked.append(backend_module.requested_backend())):
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


def test_flag_threads_sets_the_number_of_threads_for_the_run(config):
    seen = []
    before = torch.get_num_threads()
    with before_updates(lambda _: seen.append(torch.get_num_threads())):
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
