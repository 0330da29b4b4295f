"""Block sizes, warps and pipeline stages of each kernel: data, read from tuning.json.

A kernel's rows are tried in order; the first that fits a call gives its settings. A row fits when
its `arch` (80 for sm_80) is at most the device's and each other number of its key is at least the
call's. Nothing is measured when an op runs: benchmarks/tune_triton.py measures on a GPU and
rewrites the table.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import torch

PATH = Path(__file__).with_name("tuning.json")
OLDEST = 80
"""Oldest architecture that the kernels run on; the interpreter uses its settings."""


@cache
def architecture(device: torch.device) -> int:
    """The number in sm_80; the interpreter, on a CPU, counts as `OLDEST`."""
    if device.type != "cuda":
        return OLDEST
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


@cache
def multiprocessors(device: torch.device) -> int:
    """Number of multiprocessors, so of programs that run at once; 8 stand in for them in the
    interpreter."""
    if device.type != "cuda":
        return 8
    return torch.cuda.get_device_properties(device).multi_processor_count


@cache
def tables() -> dict[str, list[dict[str, Any]]]:
    """Every kernel's rows; read once."""
    return json.loads(PATH.read_text(encoding="utf-8"))


@cache
def settings(kernel: str, device: torch.device, **key: int) -> dict[str, int]:
    """Keyword arguments for launching `kernel`: block sizes, warps, stages.

    Args:
        kernel: a table of tuning.json.
        device: the tensors' device.
        key: the sizes that the table's rows name, such as `head_dim` and `element_size`.

    Raises:
        KeyError: no row fits.
    """
    return for_architecture(kernel, architecture(device), **key)


def for_architecture(kernel: str, arch: int, **key: int) -> dict[str, int]:
    """`settings` for an architecture, whether or not such a device is here."""
    for row in tables()[kernel]:
        if row["arch"] <= arch and all(row[name] >= size for name, size in key.items()):
            return row["settings"]
    raise KeyError(f"{kernel} has no settings for sm_{arch} and {key}")
