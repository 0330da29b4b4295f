"""All that a training run leaves, to compare a run that was stopped with one that was not."""

from __future__ import annotations

import hashlib
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from gpt2fast.checkpoints.run_folder import BEST, OPTIMIZER
from gpt2fast.training.checkpoints.state import load_state
from gpt2fast.training.logs.log import read_json_lines, read_rows

CLOCK = ("tokens_per_second", "elapsed_seconds", "mfu", "memory_gib")


def outcome(out: Path) -> dict[str, Any]:
    """All that a finished run leaves, without what the clock says and the folder's name."""
    checkpoints = sorted(path.name for path in (out / "checkpoints").iterdir())
    found: dict[str, Any] = {
        "files": sorted(path.name for path in out.iterdir()),
        "number of checkpoints": len(checkpoints),
        "weights": _digest(out / "model.safetensors"),
        "log.csv": _rows(read_rows(out / "log.csv")),
        "log.jsonl": _rows(read_json_lines(out / "log.jsonl")),
    }
    if (out / "samples.jsonl").exists():
        found["samples"] = read_json_lines(out / "samples.jsonl")
    # The others may be those that were made on a signal.
    for name in (BEST, checkpoints[-1]):
        folder = out / "checkpoints" / name
        state = load_state(folder)
        del state["position"]["elapsed"], state["config"]["out"]
        found[f"{name}: weights"] = _digest(folder / "model.safetensors")
        for key, digest in optimizer_digest(folder / OPTIMIZER).items():
            found[f"{name}: {key}"] = digest
        for rank, states in enumerate(state.pop("random")):
            found[f"{name}: random numbers, {rank}"] = states["torch"].tolist()
        for key, tensor in state.pop("adapters").items():
            found[f"{name}: adapter {key}"] = tensor.tolist()
        for part, values in state.items():
            for key, value in values.items() if isinstance(values, dict) else [("", values)]:
                found[f"{name}: {part} {key}"] = repr(value)
    return found


def _rows(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{name: value for name, value in row.items() if name not in CLOCK} for row in rows]


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def optimizer_digest(folder: Path) -> dict[str, str]:
    """Digests of the tensors in a folder of torch.distributed.checkpoint, however sharded."""
    index = dcp.FileSystemReader(folder).read_metadata().state_dict_metadata
    tensors = {
        name: torch.full(tuple(m.size), torch.nan, dtype=m.properties.dtype)
        for name, m in index.items()
        if isinstance(m, TensorStorageMetadata)
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that one process is one process
        dcp.load(tensors, checkpoint_id=folder, no_dist=True)
    return {
        name: hashlib.sha256(tensor.numpy().tobytes()).hexdigest()
        for name, tensor in sorted(tensors.items())
    }


def differences(ours: dict[str, Any], theirs: dict[str, Any]) -> list[str]:
    """Which parts of two outcomes differ, and how."""
    return [
        f"{name}: {ours.get(name)!s:.300} instead of {theirs.get(name)!s:.300}"
        for name in sorted({*ours, *theirs})
        if ours.get(name) != theirs.get(name)
    ]
