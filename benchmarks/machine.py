"""The limits of this machine: the floor that results are compared with."""

from __future__ import annotations

import atexit
import os
import shutil
import statistics
import subprocess
import tempfile
import time
from functools import cache
from pathlib import Path

import torch

_HEADERS = Path(__file__).resolve().parents[1] / "csrc" / "cpu"
_MEBIBYTES = 512
_REPEATS = 5

_PROGRAM = """
#include <cstdio>
#include "bandwidth.h"
int main(int, char** arguments) {
    const size_t bytes = std::strtoull(arguments[2], nullptr, 10) << 20;
    for (double speed : gpt2fast::read_bandwidth(std::atoi(arguments[1]), bytes,
                                                 std::atoi(arguments[3]))) {
        std::printf("%.0f\\n", speed);
    }
}
"""


def read_bandwidth(threads: int) -> float:
    """Bytes per second that this many threads read from memory, the median of some passes."""
    words = [str(_probe()), str(threads), str(_MEBIBYTES), str(_REPEATS)]
    shown = subprocess.run(words, capture_output=True, text=True, check=True)
    return statistics.median(float(line) for line in shown.stdout.split())


@cache
def _probe() -> Path:
    """csrc/cpu/bandwidth.h as a program: a process of its own, next to which nothing else runs."""
    compiler = os.environ.get("CXX") or shutil.which("c++")
    if compiler is None:
        raise RuntimeError("there is no C++ compiler: install one, or name it in CXX")
    folder = Path(tempfile.mkdtemp(prefix="gpt2fast-bandwidth-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    source, program = folder / "main.cpp", folder / "read_bandwidth"
    source.write_text(_PROGRAM)
    words = [compiler, "-std=c++17", "-O3", "-pthread", f"-I{_HEADERS}", source, "-o", program]
    subprocess.run([str(word) for word in words], check=True)
    return program


def product_rate(dtype: torch.dtype, threads: int) -> float:
    """Multiplications and additions per second in torch's product of two square matrices."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        size = 1536
        a, b = torch.randn(2, size, size).to(dtype)
        seconds = []
        for _ in range(5):
            start = time.perf_counter()
            torch.mm(a, b)
            seconds.append(time.perf_counter() - start)
    finally:
        torch.set_num_threads(before)
    return 2 * size**3 / statistics.median(seconds)


def name() -> str:
    """The processor's name and how many of its cores may be used."""
    model = "unknown processor"
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                model = line.partition(":")[2].strip()
    except OSError:
        pass
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{model}, {cores} cores"


# As /proc/cpuinfo names them: those on which the speed of products depends.
_SETS = (
    "avx", "f16c", "fma", "avx2", "avx_vnni", "avx512f", "avx512bw", "avx512_vnni", "avx512_bf16",
    "avx512_fp16", "amx_bf16", "amx_int8", "asimd", "asimddp", "i8mm", "bf16", "sve",
)  # fmt: skip


def instruction_sets() -> str:
    """Those of this processor that matter here; empty where there is no /proc to tell."""
    return " ".join(name for name in _SETS if name in _flags())


def has_more_than(isa: str) -> bool:
    """Whether this processor has vector instructions beyond `isa`, "avx2"; yes if unknown."""
    assert isa == "avx2"
    flags = _flags()
    return not flags or any(name.startswith(("avx512", "avx_vnni", "amx")) for name in flags)


@cache
def _flags() -> frozenset[str]:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith(("flags", "Features")):
                return frozenset(line.partition(":")[2].split())
    except OSError:
        pass
    return frozenset()


@cache
def commit() -> str | None:
    """The commit of this checkout, "+" behind it if files differ; None outside a repository."""
    git = ["git", "-C", str(_HEADERS)]
    try:
        words = [*git, "rev-parse", "--short", "HEAD"]
        found = subprocess.run(words, capture_output=True, text=True, check=True).stdout.strip()
        words = [*git, "status", "--porcelain", "--untracked-files=no", ":/"]
        changed = subprocess.run(words, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
    return found + ("+" if changed else "")
