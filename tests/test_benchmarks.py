"""pytest's messages where the packages that benchmarks compare with are not installed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

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
