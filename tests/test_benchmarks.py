"""Benchmarks: messages where something is missing, equal work of what is compared, how peers are
held to an instruction set and what their table says of it."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks" / "peers"))

import compare  # noqa: E402
from checkpoint import PeerError  # noqa: E402

import machine  # noqa: E402
import microkernels  # noqa: E402


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


def _installed(folder: Path, name: str) -> Path:
    """An environment that setup_peers.py might have finished."""
    (folder / name).mkdir()
    (folder / name / "ready.json").write_text("{}")
    return folder / name / "bin" / "python"


def test_peers_are_held_to_an_instruction_set_by_their_switch_or_their_build(tmp_path):
    for name in ("gpt2fast", "ctranslate2", "onnxruntime", "openvino", "xllamacpp"):
        _installed(tmp_path, name)
    switches = {
        name: compare._python(name, tmp_path, "avx2")[1]
        for name in ("gpt2fast", "ctranslate2", "onnxruntime", "openvino", "xllamacpp")
    }
    assert switches["gpt2fast"]["GPT2FAST_ISA"] == "avx2"
    assert switches["ctranslate2"]["CT2_FORCE_CPU_ISA"] == "AVX2"
    assert switches["onnxruntime"] is None and switches["openvino"] is None
    assert switches["xllamacpp"] == {}
    native = _installed(tmp_path, "llama_cpp")
    assert compare._python("llama_cpp", tmp_path, "avx2") == (native, None)
    built = _installed(tmp_path, "llama_cpp-avx2")
    assert compare._python("llama_cpp", tmp_path, "avx2") == (built, {})
    assert compare._python("llama_cpp", tmp_path, None) == (native, None)
    with pytest.raises(PeerError, match="not installed"):
        compare._python("llama_cpp", tmp_path / "nothing", None)


@pytest.mark.parametrize(
    ("flags", "more"),
    [
        ({"avx", "avx2", "fma"}, False),
        ({"avx2", "avx512f"}, True),
        ({"avx2", "avx_vnni"}, True),
        (set(), True),  # unknown
    ],
)
def test_a_processor_without_more_needs_no_switch(flags, more, monkeypatch):
    monkeypatch.setattr(machine, "_flags", lambda: frozenset(flags))
    assert machine.has_more_than("avx2") is more


class _Standing:
    """An engine that is asked nothing but whether it can."""

    def __init__(self, peer: str, error: str | None = None):
        self.peer, self.label, self._error = peer, f"{peer} float32", error

    def generate(self, prompts: list[list[int]], new: int) -> None:
        if self._error:
            raise PeerError(f"{self.label}: {self._error}")


def test_a_peer_that_cannot_do_a_case_is_left_out_of_it_and_named(capsys):
    assert compare._warm_up(_Standing("xllamacpp"), [[1, 2]], 1)
    assert not compare._warm_up(_Standing("xllamacpp", "wrote 0 tokens, not 1"), [[1, 2]], 1)
    assert "prompts of 1 x 2: xllamacpp float32: wrote 0 tokens" in capsys.readouterr().err
    with pytest.raises(PeerError, match="no memory"):
        compare._warm_up(_Standing("gpt2fast", "no memory"), [[1, 2]], 1)


def test_the_table_of_peers_says_what_was_held_and_what_it_ran_on():
    row = {
        "case": {"rows": 1, "prompt": 8, "new": 5, "kind": "decode"},
        "bandwidth": [20e9, 30e9],
        "others": [0.0, 0.0],
        "step_bytes": 1e8,
        "speeds": {"gpt2fast int8": [100.0, 150.0], "openvino int8": [50.0, 50.0]},
        "free": ["openvino"],
        "commit": "abc1234",
    }
    results = {
        "machine": "A processor, 2 cores", "flags": "avx2 avx512f", "isa": "avx2", "threads": 2,
        "model": "model", "versions": {"openvino": "1.2"}, "rows": {"int8/decode-1": row},
    }  # fmt: skip
    shown = compare.table(results)
    assert "held to avx2" in shown and "openvino† 50 (2.50 x)" in shown
    for fact in ("avx2 avx512f", "20.0 to 30.0 GB/s", "Commit: abc1234", "openvino: 1.2"):
        assert fact in shown
    shown = compare.table({**results, "isa": None, "rows": {"int8/decode-1": {**row, "free": []}}})
    assert "held" not in shown and "†" not in shown


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


@pytest.mark.parametrize("options", [["--threads", "0"], ["--seconds", "-1"], ["--isa", "sse"]])
def test_measuring_microkernels_with_bad_arguments_is_wrong_usage(options: list[str]):
    with pytest.raises(SystemExit) as stopped:
        microkernels.main(options)
    assert stopped.value.code == 2


def test_measuring_microkernels_without_a_compiler_says_so(monkeypatch, capsys):
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert microkernels.main(["--isa", "portable"]) == 1
    said = capsys.readouterr().err
    assert said.startswith("error: portable:") and "no-such-compiler" in said
