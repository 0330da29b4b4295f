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
"""The architecture that the kernels need, and whose settings the interpreter takes."""


@cache
def architecture(device: torch.device) -> int:
    """80 for an sm_80; of the interpreter's CPU as well."""
    if device.type != "cuda":
        return OLDEST
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


@cache
def multiprocessors(device: torch.device) -> int:
    """How many programs run side by side at least; in the interpreter some, as if."""
    if device.type != "cuda":
        return 8
    return torch.cuda.get_device_properties(device).multi_processor_count


@cache
def tables() -> dict[str, list[dict[str, Any]]]:
    """Every kernel's rows; read once."""
    return json.loads(PATH.read_text(encoding="utf-8"))


@cache
def settings(kernel: str, device: torch.device, **key: int) -> dict[str, int]:
    """What to launch `kernel` with; keyword arguments of the launch.

    Args:
        kernel: a table of tuning.json.
        device: of the tensors.
        key: the sizes that the table's rows name, such as `head_dim` and `element_size`.

    Raises:
        KeyError: no row fits.
    """
    return for_architecture(kernel, architecture(device), **key)


def for_architecture(kernel: str, arch: int, **key: int) -> dict[str, int]:
    """`settings` of a device that need not be here."""
    for row in tables()[kernel]:
        if row["arch"] <= arch and all(row[name] >= size for name, size in key.items()):
            return row["settings"]
    raise KeyError(f"{kernel} has no settings for sm_{arch} and {key}")
