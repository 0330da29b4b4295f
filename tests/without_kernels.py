"""Commands of the package in a process that has no compiled kernels."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from time_limits import patience


def printed_without_kernels(module: str, *arguments: str) -> str:
    """What `python -m module` prints; one process loads the kernels once, so it is one of its own.

    Raises CalledProcessError when it fails.
    """
    root = str(Path(__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "-m", module, *arguments],
        env={**os.environ, "PYTHONPATH": root, "GPT2FAST_NATIVE": "0"},
        capture_output=True, text=True, check=True, timeout=patience(),
    )  # fmt: skip
    return done.stdout
