"""Training runs of a few steps, the text that they read, and what they leave."""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from gpt2fast.data import prepare_data
from gpt2fast.training import TrainConfig, train

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


CLOCK_AND_MACHINE = ("tokens_per_second", "elapsed_seconds", "mfu", "memory_gib")


def outcome(out: Path) -> dict[str, object]:
    """Results of a run, without those that depend on the clock."""
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


def start(arguments: list[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "gpt2fast.train", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parent.parent,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)},
    )


def settings_of(config: TrainConfig, **changes) -> list[str]:
    return flags(changed(config, **changes).to_dict())
