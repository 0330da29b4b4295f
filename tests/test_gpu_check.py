"""`make gpu-check` on a machine without a GPU: what becomes of its steps' time and results."""

from __future__ import annotations

import importlib.util
import json
import sys
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

PASSES = "print('all well')"
FAILS = "print('broken'); raise SystemExit(3)"
# Says when it may be interrupted, as a test run that has begun.
INTERRUPTED = """
import time
try:
    time.sleep(60)
except KeyboardInterrupt:
    print("kept what there was")
"""
STUBBORN = """
import signal, time
signal.signal(signal.SIGINT, signal.SIG_IGN)
print("deaf", flush=True)
time.sleep(60)
"""


@pytest.fixture
def check(monkeypatch, tmp_path):
    """The module, on a machine that seems to have a GPU."""
    spec = importlib.util.spec_from_file_location("gpu_check", ROOT / "benchmarks/gpu_check.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "gpu_check", module)
    spec.loader.exec_module(module)
    pretended = tmp_path / "bin" / "nvidia-smi"
    pretended.parent.mkdir()
    pretended.write_text("#!/bin/sh\necho a GPU, driver 1\n")
    pretended.chmod(0o755)
    monkeypatch.setenv("PATH", str(pretended.parent), prepend=":")
    return module


def test_results_are_three_files_whatever_becomes_of_a_step(check, monkeypatch, tmp_path):
    monkeypatch.setattr(check, "GRACE", 1.5)
    commands = {"fine": PASSES, "bad": FAILS, "slow": INTERRUPTED, "deaf": STUBBORN}
    planned = [check.Step(name, [sys.executable, "-c", code], 1) for name, code in commands.items()]
    planned.append(check.Step("absent", ["none"], 1, "no-such-program"))
    monkeypatch.setattr(check, "steps", lambda folder: planned)
    out = tmp_path / "out"
    assert check.main(["--out", str(out), "--minutes", "0.5"]) == 1
    assert {path.name for path in out.iterdir()} == {"check.json", "summary.txt", "results.tar.gz"}
    report = json.loads((out / "check.json").read_text())
    assert {name: step["result"] for name, step in report["steps"].items()} == {
        "fine": "passed",
        "bad": "failed (3)",
        "slow": "out of time",
        "deaf": "out of time",
        "absent": "left out",
    }
    assert sum(step["seconds"] for step in report["steps"].values()) < 30
    assert report["steps"]["slow"]["last"] == "kept what there was"
    summary = (out / "summary.txt").read_text()
    assert "a GPU, driver 1" in summary and all(name in summary for name in commands)
    with tarfile.open(out / "results.tar.gz") as archive:
        log = archive.extractfile("results/deaf.log")
        assert log is not None and log.read() == b"deaf\n"


def test_limits_of_the_steps_add_up_to_the_budget(check, tmp_path):
    assert sum(step.share for step in check.steps(tmp_path)) == 9 * 60


def test_sanitizers_do_not_report_what_torch_copes_with(check, tmp_path):
    commands = [step.command for step in check.steps(tmp_path) if step.needs]
    assert len(commands) == 2
    for command in commands:
        assert list(command[:3]) == ["compute-sanitizer", "--report-api-errors", "no"]
