"""JSON and YAML of hostile files are refused soon, in one line, before their parsers fail."""

from __future__ import annotations

import io
import json
import os
import sqlite3
import time
import tracemalloc
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest

from gpt2fast import Error, GPT2Config
from gpt2fast._system.parsing import Unreadable, parse_json, parse_yaml, read_json
from gpt2fast.checkpoints.gpt2 import from_pretrained
from gpt2fast.cli import report, train, tune
from gpt2fast.data import opening, prepare_data
from gpt2fast.data.meta import read_meta
from gpt2fast.data.tokens import TokenFile
from gpt2fast.errors import ConfigError, DataError
from gpt2fast.training.config import TrainConfig
from gpt2fast.training.logs.log import read_json_lines, read_rows
from gpt2fast.tuning.space import read_space

SECONDS = 2
BYTES = 100 << 20
LAUGHS = "a0: &a0 [lol, lol]\n" + "".join(
    f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]\n" for i in range(1, 60)
)

YAML = {
    "laughs": (LAUGHS, "more than 10000 values, aliases counted"),
    "100,000 deep": ("[" * 100_000, "more than 100 deep"),
    "100,000 deep in blocks": ("- " * 100_000 + "a", "more than 100 deep"),
    "a depth of aliases": (
        "a0: &a0 [1]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}]\n" for i in range(1, 200)),
        "more than 100 deep",
    ),
    "an alias of what it is in": ("a: &x [*x]", "names nothing that ends before it"),
    "5,000 digits": ("a: " + "9" * 5000, "a number of 5000 characters"),
    "5,000 digits in quotation marks": (f"a: !!int '{'9' * 5000}'", "a number of 5000"),
    "base 60": ("a: 1" + ":59" * 3000, "a number of 9001 characters"),
    "a name twice": ("lr: 1\nlr: 2", "'lr' is there twice"),
    "a name twice, within": ("lr: {low: 1, low: 2}", "'low' is there twice"),
    "a month that is none": ("a: 2024-13-45", "month must be in"),
    "a tag for a text that it is not for": ("a: !!timestamp x", "it is not valid YAML"),
    "an empty integer": ("a: !!int ''", "it is not valid YAML"),
    "a tag that makes objects": ("!!python/object/apply:os.system ['touch canary']", "python/obj"),
    "a key that is a list": ("? [a]\n: b", "unhashable"),
    "20,000 values": (f"a: [{'1,' * 20_000}]", "more than 10000 values"),
}
JSON = {
    "60 MB of objects": ("[" + '{"":0},' * 8_000_000 + "0]", "more than 500000 values"),
    "numbers": (f"[{'0,' * 1_000_000}0]", "more than 500000 values"),
    "1,000,000 deep": ("[" * 400_000, "nested more than 100 deep"),
    "101 deep": ("[" * 101 + "]" * 101, "nested more than 100 deep"),
    "101 deep in objects": ('{"a":' * 101 + "0" + "}" * 101, "nested more than 100 deep"),
    "5,000 digits": ("9" * 5000, "a number of 5000 digits"),
    "10^400": ("1" + "0" * 400, "a number of 401 digits"),
    "a name twice": ('{"n_head": 1, "n_head": 2}', "'n_head' is there twice"),
    "cut": ('{"n_head": 1, ', "not valid JSON"),
}


def told(kind: type[Exception], read, *arguments: object) -> str:
    """The message of the error of `read`, which takes little time and memory."""
    tracemalloc.start()
    start = time.process_time()
    try:
        with pytest.raises(kind) as caught:
            read(*arguments)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert time.process_time() - start < SECONDS
    assert peak < BYTES
    message = str(caught.value)
    assert len(message) < 500 and "\n" not in message
    assert not os.path.exists("canary")
    return message


@pytest.mark.parametrize("name", YAML)
def test_a_hostile_yaml_text(name):
    text, message = YAML[name]
    assert message in told(Unreadable, parse_yaml, text)


@pytest.mark.parametrize("name", JSON)
def test_a_hostile_json_text(name):
    text, message = JSON[name]
    assert message in told(Unreadable, parse_json, text)


def test_what_is_within_the_limits_is_what_the_parsers_read():
    text = 'a: &x {k: 1, l: [1.5, null]}\nb: *x\nc: {<<: *x, k: 3}\n"d": 0x10\n'
    inner = {"k": 1, "l": [1.5, None]}
    assert parse_yaml(text) == {"a": inner, "b": inner, "c": {**inner, "k": 3}, "d": 16}
    long = {"text": ",[{" * 400_000, "quoted": '\\",' * 100_000, "n": [-1, 10**30, 1e-3, True]}
    assert parse_json(json.dumps(long)) == long
    assert parse_json("[" * 100 + "]" * 100)
    assert parse_json('{"a": 1, "a": 2}', unique=False) == {"a": 2}


NO_FILES = pytest.mark.parametrize("kind", ["pipe", "folder", "device"])


@NO_FILES
def test_what_is_no_file_is_not_waited_for(instead, tmp_path, kind):
    path = instead(kind, tmp_path / "x.json")
    for read in (read_json, read_meta):
        assert f"a {kind}, not a file" in told(Error, read, path)
    model = tmp_path / "model"
    model.mkdir()
    (model / "model.safetensors").write_bytes(b"")
    for name in ("config.json", "generation_config.json"):
        if name == "generation_config.json":
            (model / "config.json").rename(tmp_path / "old")
            (model / "config.json").write_text(json.dumps(GPT2Config().to_dict()))
        instead(kind, model / name)
        message = told(Error, from_pretrained, model)
        assert name in message and f"a {kind}, not a file" in message


@NO_FILES
@pytest.mark.parametrize("name", ["x.txt", "x.jsonl"])
def test_what_is_no_text_is_not_waited_for(instead, tmp_path, kind, name):
    texts = tmp_path / "texts"
    texts.mkdir()
    instead(kind, texts / name)
    if kind == "folder":
        (texts / name / "y.txt").mkdir()
    told(DataError, prepare_data, texts, tmp_path / "out")


@NO_FILES
def test_what_is_no_file_of_tokens_is_not_waited_for(instead, tmp_path, kind):
    path = instead(kind, tmp_path / "train.bin")
    for dtype in (None, "uint16"):
        told(DataError, TokenFile, path, dtype)


def run(main, *arguments: str) -> tuple[int, str]:
    with redirect_stderr(io.StringIO()) as errors, redirect_stdout(io.StringIO()):
        code = main(list(arguments))
    message = errors.getvalue()
    assert message.startswith("error: ") and message.count("\n") == 1, message
    assert len(message) < 1000
    return code, message


RECIPES = {
    "laughs": (LAUGHS, "10000 values"),
    "forty nines": ("batch_size: " + "9" * 40, "batch_size is 9999"),
    "a huge batch": ("batch_size: 2000000000", "batch_size is 2000000000, but must be at most"),
    "a huge number": ("lr: 1" + "0" * 299, "data is not set"),
    "no number": ("lr: .inf", "lr is inf"),
    "a long warm-up": ("batch_warmup_steps: 2000000000\nmax_epochs: 1e9", "at most 1000000"),
    "another recipe": ("config: /dev/zero", "config is a flag"),
    "a NUL": ('data: "a\\0b"', "without NUL"),
    "a weight": ("mixture: {a: 1" + "0" * 299 + "0}", "a number of 301"),
}


@pytest.mark.parametrize("name", RECIPES)
def test_a_hostile_recipe_is_a_mistake_in_usage(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    text, message = RECIPES[name]
    Path("recipe.yaml").write_text(text)
    code, error = run(train.main, "--config", "recipe.yaml")
    assert code == 2 and message in error


@pytest.mark.parametrize("value", [10**400, 10**5000, -(10**400)], ids=int.bit_length)
@pytest.mark.parametrize("name", ["lr", "batch_size", "max_tokens", "max_epochs", "seed"])
def test_settings_have_limits_where_they_come_from_python(name, value):
    assert name in told(ConfigError, lambda: TrainConfig(**{name: value}))


@pytest.mark.parametrize("value", [10**400, 10**5000, -(10**400), 1 << 63], ids=int.bit_length)
@pytest.mark.parametrize("name", ["layer_norm_epsilon", "n_embd", "attn_pdrop", "eos_token_id"])
def test_a_configuration_has_limits_where_it_comes_from_python(name, value):
    if name == "layer_norm_epsilon" and value == 1 << 63:
        return
    assert name in told(ConfigError, lambda: GPT2Config(**{name: value}))


SPACES = {
    "a step of nearly nothing": ("lr: {low: 0.0, high: 1.0, step: 1.0e-300}", "step is 1e-300"),
    "a huge bound": ("lr: {low: 1, high: 1" + "0" * 200 + "}", "at most 1e+150"),
    "a huge integer": ("n_layer: {low: 1, high: 99999999999999999999}", "of at most"),
    "many choices": (f"n_layer: [{', '.join(map(str, range(2000)))}]", "2000 choices"),
    "a name twice": ("lr: [1]\nlr: [2]", "'lr' is there twice"),
    "laughs": (LAUGHS, "10000 values"),
}


@pytest.mark.parametrize("name", SPACES)
def test_a_hostile_space(tmp_path, name):
    text, message = SPACES[name]
    path = tmp_path / "space.yaml"
    path.write_text(text)
    assert message in told(ConfigError, read_space, str(path))


META = {"format": 1, "dtype": "uint16", "vocab_size": 5, "train_tokens": 9, "val_tokens": 9,
        "train_characters": 9, "val_characters": 9, "tokenizer": "char",
        "tokenizer_fingerprint": "x", "eos_token_id": None, "split": "position"}  # fmt: skip
PART = {"name": "a", "weight": 1.0, "train_tokens": 9, "val_tokens": 9}


@pytest.mark.parametrize(
    "change",
    [
        {"files": ["../book.txt"]},
        {"files": ["/etc/passwd"]},
        {"files": [".."]},
        {"files": [7]},
        {"sources": [None]},
        {"train_tokens": 1 << 63},
        {"train_tokens": True},
        {"corpora": []},
        {"corpora": [7]},
        {"corpora": [{**PART, "weight": 10**400}]},
        {"corpora": [{**PART, "weight": "1"}]},
        {"corpora": [{**PART, "train_tokens": 9.0}]},
        {"corpora": [{**PART, "train_tokens": 10}, {**PART, "train_tokens": -1, "val_tokens": 0}]},
        {"corpora": [{**PART, "name": None}]},
    ],
)
def test_a_hostile_meta_json(tmp_path, change):
    path = tmp_path / "meta.json"
    path.write_text(json.dumps(META))
    assert read_meta(path).train_tokens == 9
    path.write_text(json.dumps({**META, **change}))
    message = told(DataError, read_meta, path)
    assert next(iter(change)) in message or "a number of 401 digits" in message
    for text in ("[" * 100_000, '{"format":' + "9" * 5000 + "}"):
        path.write_text(text)
        assert str(path) in told(DataError, read_meta, path)


def test_hostile_logs(tmp_path):
    log = tmp_path / "log.csv"
    log.write_text(f"step,train_loss\n1,2.5\n²,1\n{'9' * 5000},1\n-1,3\n2,{'1' * 400}\n")
    rows = read_rows(log)
    assert [row["step"] for row in rows] == [1, 2]
    log.write_text(",".join(f"c{i}" for i in range(100_000)) + "\n" + ",\n" * 100_000)
    assert "columns" in told(DataError, read_rows, log)
    log.write_text('step\n"' + "1" * 200_000 + '"\n')
    assert str(log) in told(DataError, read_rows, log)
    lines = tmp_path / "log.jsonl"
    lines.write_text(
        '{"step": 1}\n' + "[" * 100_000 + '\n{"step": 1' + "0" * 400 + '}\n{"step": 1e999}\n'
        '{"step": 2, "val_loss": 1' + "0" * 290 + '}\n{"step": 3, "text": "a\u2028b"}\n'
    )
    assert [row["step"] for row in read_json_lines(lines)] == [1, 2, 3]


def test_a_report_of_numbers_that_overflow(tmp_path):
    values = [1e308, -1e308, 10**299, 10**300, True, "x", [1], None]
    names = ("tokens", "elapsed_seconds", "train_loss", "val_loss")
    rows = [{"step": i, **dict.fromkeys(names, value)} for i, value in enumerate(values)]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "config.yaml").write_text(LAUGHS)
    with redirect_stdout(io.StringIO()):
        code = report.main([str(tmp_path), "--out", str(tmp_path / "r.html")])
    assert code == 0


def test_a_bomb_of_an_archive_is_not_unpacked(tmp_path, monkeypatch):
    import bz2
    import gzip
    import lzma
    import zipfile

    # No setting; what is too large has two gigabytes.
    monkeypatch.setattr(opening, "LARGEST", 1 << 22)
    content = b"a" * (50 << 20)
    for name, pack in ((".gz", gzip.compress), (".bz2", bz2.compress), (".xz", lzma.compress)):
        path = tmp_path / f"a{name}"
        path.write_bytes(pack(content))
        assert "more than 4 MB" in told(DataError, opening.TextInput(path).read_bytes)
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a", content)
    assert "more than 4 MB" in told(DataError, opening.TextInput(path).read_bytes)


def test_a_tuning_database_that_optuna_cannot_read(tmp_path, monkeypatch):
    pytest.importorskip("optuna")
    from gpt2fast.tuning.database import StudyError, open_study, require_optuna

    require_optuna()
    monkeypatch.chdir(tmp_path)
    url = "sqlite:///study.db"
    study = open_study(url, "s", None, None)
    trial = study.ask()
    study.tell(trial, 1.0)
    open_study(url, "s", None, None)
    for statement in (
        "update trials set state = 'WAITING FOR YOU'",
        "update trials set state = 'COMPLETE', number = 7",
        "update trials set number = 0; update trial_values set value_type = 'INF_POS'",
        "update trial_values set value_type = 'NOTHING'",
        "update trial_values set value_type = 'FINITE'; "
        "insert into study_user_attributes values (1, 1, 'space', '7')",
        "update study_user_attributes set value_json = '[[['",
        "delete from study_user_attributes; insert into trial_user_attributes values "
        "(1, 1, 'process', '\"1\"')",
        "delete from trial_user_attributes; update study_directions set direction = 'UP'",
        "update version_info set schema_version = 99",
    ):
        with sqlite3.connect("study.db") as base:
            base.executescript(statement)
        with pytest.raises(StudyError, match="cannot be read"):
            open_study(url, "s", None, None)
    os.remove("study.db")
    os.mkfifo("study.db")
    with pytest.raises(ConfigError, match="a pipe"):
        open_study(url, "s", None, None)


def test_a_study_file_of_somebody_else(tmp_path, monkeypatch):
    pytest.importorskip("optuna")
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text("to be or not to be " * 200)
    Path("out").mkdir()
    arguments = ["--space", "lr", "--out", "out", "--data", "text.txt", "--trials", "0"]
    Path("lr").write_text("lr: [0.1]")
    for text in (LAUGHS, "[1]", "space: 7", "["):
        Path("out", "study.yaml").write_text(text)
        code, message = run(tune.main, *arguments)
        assert code == 2 and ("study" in message)
