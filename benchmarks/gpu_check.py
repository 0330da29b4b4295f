"""All that can be checked on a GPU, in one command: build, tests, compute-sanitizer, benchmarks.

    python benchmarks/gpu_check.py --out benchmarks/results/h200      (make gpu-check)

Needs torch with CUDA, nvcc, triton, pytest and pytest-benchmark, and no network. After every step
OUT holds three files: check.json (what each step gave), summary.txt (the same and the figures, as a
short table) and results.tar.gz (the steps' logs, tables and pictures), so that a run which is cut
off has not been for nothing. Each step gets its share of the time that is left; one that takes
longer is interrupted as by Ctrl-C, and killed if that does not end it. Running it again starts
anew, except for the build, which is kept.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
GRACE = 10.0
"""Seconds of a step's share that are kept for ending it."""
sys.path.insert(0, str(ROOT))

from gpt2fast._system.files import atomic_write, atomic_write_text  # noqa: E402

_BUILD = (
    "from gpt2fast.ops import cuda, native; native.unavailable();"
    "reason = cuda.unavailable(); print(reason or cuda.loaded()); raise SystemExit(bool(reason))"
)


@dataclass(frozen=True)
class Step:
    """A command, and its share of the time."""

    name: str
    command: Sequence[str]
    share: float
    """Seconds of nine minutes; what earlier steps have left is shared out in proportion."""
    needs: str = ""
    """A program without which the step is left out."""


def steps(folder: Path) -> list[Step]:
    """Everything, what matters most first; tables and pictures go into `folder`."""
    python = sys.executable
    # Whatever plugins are installed here, and without those that the project's settings are for.
    pytest = [python, "-m", "pytest", "-q", "-rfE", "-p", "no:cacheprovider", "-o", "addopts="]
    # torch asks CUDA for things that may fail, and copes: those calls are no findings.
    watched = ["compute-sanitizer", "--report-api-errors", "no", "--error-exitcode", "9"]
    small_run = [python, "tests/small_run.py"]
    benchmark = list(pytest)
    if importlib.util.find_spec("pytest_benchmark") is not None:
        benchmark += ["--benchmark-only", "--benchmark-disable-gc"]
    table = str(folder / "gpu_ops.json")
    decoding = str(folder / "gpu_decoding.json")
    tests = ["tests/test_gpu.py", "tests/ops", "tests/test_sampling.py"]
    tests += ["tests/test_triton_model.py", "tests/test_triton_sampling.py"]
    sanitizer = "compute-sanitizer"
    return [
        Step("build", [python, "-c", _BUILD], 130),
        Step("tests", [*pytest, "-m", "gpu", "-k", "not triton", *tests], 80),
        Step("small run", small_run, 25),
        Step("memcheck", [*watched, *small_run], 45, sanitizer),
        Step("racecheck", [*watched, "--tool", "racecheck", *small_run], 45, sanitizer),
        Step(
            "decoding", [*benchmark, "benchmarks/test_gpu_decoding.py", "--gpu-table", decoding], 50
        ),
        Step("benchmarks", [*benchmark, "benchmarks/test_gpu_ops.py", "--gpu-table", table], 90),
        # Triton compiles a kernel for every new shape, which takes longer than the test.
        Step("triton tests", [*pytest, "-m", "gpu", "-k", "triton", *tests], 75),
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns 1 if a step failed."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "gpu")
    parser.add_argument("--minutes", type=float, default=9.0, help="for everything (default: 9)")
    options = parser.parse_args(argv)
    deadline = time.monotonic() + 60 * options.minutes
    gpu = _output(["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"])
    if not gpu:
        print("error: nvidia-smi finds no GPU here; there is nothing to check", file=sys.stderr)
        return 1
    out = options.out.absolute()
    out.mkdir(parents=True, exist_ok=True)
    report: dict[str, Any] = {**_versions(), "gpu": gpu, "steps": {}}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary, "results")
        folder.mkdir()
        waiting = steps(folder)
        while waiting:
            step = waiting[0]
            left = deadline - time.monotonic()
            seconds = left * step.share / sum(other.share for other in waiting)
            report["steps"][step.name] = _run(step, seconds, folder)
            _keep(report, folder, out)
            waiting.pop(0)
    print((out / "summary.txt").read_text(), end="")
    return int(
        any(found["result"] not in ("passed", "left out") for found in report["steps"].values())
    )


def _keep(report: dict[str, Any], folder: Path, out: Path) -> None:
    """Leave in `out` all that is known so far."""
    atomic_write_text(out / "check.json", json.dumps(report, indent=1) + "\n")
    atomic_write_text(out / "summary.txt", _table(report, folder) + "\n")
    with (
        atomic_write(out / "results.tar.gz") as file,
        tarfile.open(fileobj=file, mode="w:gz") as archive,
    ):
        archive.add(folder, folder.name)


def _run(step: Step, seconds: float, folder: Path) -> dict[str, Any]:
    """Run a step for at most so many seconds, its end included."""
    if step.needs and shutil.which(step.needs) is None:
        return {"result": "left out", "seconds": 0.0, "last": f"{step.needs} is not installed"}
    if seconds < 2 * GRACE:
        return {"result": "no time", "seconds": 0.0, "last": "nothing was left of --minutes"}
    print(f"== {step.name}", flush=True)
    environment = {
        "GPT2FAST_CACHE": str(ROOT / "build-gpu"),
        **os.environ,
        "PYTHONPATH": os.pathsep.join(
            [str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]
        ),
        "PYTHONUNBUFFERED": "1",
        "GPT2FAST_QUICK": "1",
    }
    log = folder / f"{step.name.replace(' ', '_')}.log"
    start = time.monotonic()
    with log.open("w") as output:
        process = subprocess.Popen(
            step.command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=output,
            stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        try:
            code: int | None = process.wait(seconds - GRACE)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            _end(process)
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    result = {0: "passed", None: "out of time"}.get(code, f"failed ({code})")
    if result != "passed":
        print("\n".join(lines[-40:]), flush=True)
    found = {
        "result": result,
        "seconds": round(time.monotonic() - start, 1),
        "last": lines[-1] if lines else "",
        "command": " ".join(step.command),
    }
    print(f"   {result} after {found['seconds']} s: {found['last']:.120}", flush=True)
    return found


def _end(process: subprocess.Popen[bytes]) -> None:
    """End what has not ended yet, at first in a way that lets it write down what it has."""
    for sent in (signal.SIGINT, signal.SIGKILL):
        if process.poll() is not None:
            return
        os.killpg(process.pid, sent)
        with suppress(subprocess.TimeoutExpired):
            process.wait(GRACE)


def _versions() -> dict[str, str]:
    code = "import torch, triton; print(torch.__version__, triton.__version__)"
    nvcc = re.search(r"release ([\d.]+)", _output(["nvcc", "--version"]))
    return {
        "commit": _output(["git", "rev-parse", "HEAD"]) or "unknown",
        "python": platform.python_version(),
        "torch and triton": _output([sys.executable, "-c", code]),
        "nvcc": nvcc[1] if nvcc else "",
    }


def _output(command: Sequence[str]) -> str:
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def _table(report: dict[str, Any], folder: Path) -> str:
    lines = [f"{report['gpu']}, {report['torch and triton']}, commit {report['commit'][:12]}"]
    for name, found in report["steps"].items():
        lines.append(
            f"{name:<11} {found['result']:<13} {found['seconds']:>6} s  {found['last']:.90}"
        )
    for name in ("gpu_decoding", "gpu_ops"):
        file = folder / f"{name}.json"
        if not file.is_file():
            continue
        for row in json.loads(file.read_text())["rows"]:
            lines.append(
                f"{row['benchmark']:<44} {row['way']:<15} {row['seconds'] * 1e6:>9.1f} us "
                f"{row['ratio']:>6.2f} x {row['share']:>5.2f} of the floor "
                f"{row['rate']:>8.0f} {row['unit']}"
            )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
