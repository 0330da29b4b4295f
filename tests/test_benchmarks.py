"""What benchmarks rest on: messages where packages are missing, equal work of what is compared."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("options", [["--benchmark-only"], ["--benchmark-json=x.json"], []])
def test_benchmarks_name_the_extra_that_is_missing(options: list[str]):
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:benchmark", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*command, "benchmarks/test_ops.py", *options],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    said = done.stdout + done.stderr
    assert 'install it with pip install -e ".[bench]"' in said
    assert "Traceback" not in said and "unrecognized" not in said


@pytest.fixture
def contender(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    module = importlib.import_module("contender")
    # A setting of the whole process.
    allocator = importlib.import_module("gpt2fast.training.machine.allocator")
    monkeypatch.setattr(allocator, "keep_freed_memory", lambda: None)
    return module


def _losses(contender, name: str, dtype: str, steps: int = 4) -> list[float]:
    shape = contender.Shape(2, 4, 64, 301, 48, 3, 47)
    step = contender.stepper(name, shape, dtype)
    return [step() for _ in range(steps)]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_contenders_in_training_do_equal_work(contender, dtype):
    pytest.importorskip("transformers")
    losses = {name: _losses(contender, name, dtype) for name in ("ours", "transformers")}
    contender.check_equal_work(losses, dtype)


@pytest.mark.parametrize("change", ["weights", "batch", "rate", "betas"])
def test_unequal_work_is_noticed(contender, monkeypatch, change):
    wanted = _losses(contender, "ours", "float32")
    if change == "weights":
        draw = contender.initialize
        monkeypatch.setattr(contender, "initialize", lambda model: (draw(model), _grow(model)))
    elif change == "batch":
        draw_tokens = torch.randint
        monkeypatch.setattr(torch, "randint", lambda high, size: draw_tokens(high - 1, size))
    else:
        changed = {"rate": ("_RATE", 2.9e-4), "betas": ("_BETAS", (0.5, 0.99))}
        monkeypatch.setattr(contender, *changed[change])
    found = _losses(contender, "ours", "float32")
    with pytest.raises(AssertionError, match="does other work"):
        contender.check_equal_work({"ours": wanted, "changed": found}, "float32")


@torch.no_grad()
def _grow(model: torch.nn.Module) -> None:
    model.get_parameter("wte.weight")[:8] *= 1.5
