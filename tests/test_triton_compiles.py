"""Every Triton kernel, compiled for GPUs that are not here (see triton_compilation.py)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

WORKER = Path(__file__).with_name("triton_compilation.py")
# What one program can have; sm_86 and sm_89 have the least of the GPUs that take sm_80's settings.
SHARED_MEMORY = {80: 163 * 1024, 86: 99 * 1024, 90: 227 * 1024, 120: 99 * 1024}
# Kernels that must use a Hopper's matrix instructions.
ATTENTION = ("forward_kernel", "keys_kernel", "queries_kernel")

pytest.importorskip("triton")


@pytest.mark.parametrize(
    "arch", [80, 90, *(pytest.param(arch, marks=pytest.mark.slow) for arch in (86, 120))]
)
def test_every_kernel_compiles_without_spilling_registers(arch):
    environment = {**os.environ, "GPT2FAST_NATIVE": "0", "PYTHONPATH": str(WORKER.parents[1])}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run(
        [sys.executable, str(WORKER), str(arch)], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["missing"] == []
    for kernel in report["kernels"]:
        assert kernel["spilled"] == 0, kernel
        assert kernel["shared"] <= SHARED_MEMORY[arch], kernel
    products = [kernel["wgmma"] for kernel in report["kernels"] if kernel["name"] in ATTENTION]
    assert len(products) >= len(ATTENTION) and all(fast == (arch == 90) for fast in products)
