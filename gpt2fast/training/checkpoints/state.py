"""The state of a run in a checkpoint: settings, random states, position, not the optimizer's.

It is a safetensors file whose metadata hold, as JSON, all that is no tensor. Older runs have a
pickle in its place, which is read without running what is in it.
"""

from __future__ import annotations

import io
import json
import random
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..._system.files import read_file
from ..._system.parsing import Unreadable, parse_json
from ..._system.pickle_check import Objection
from ...checkpoints.run_folder import OLD_STATE, STATE
from ...checkpoints.tensor_files import read_tensors, write_safetensors
from ...checkpoints.torch_files import read_torch_file
from ...errors import ConfigError, WeightsError, shown

FORMAT = 2
_LARGEST = 64 << 20  # random states and counters: some kilobytes a process
_KEY = "state"
_TENSOR, _TUPLE = "__tensor__", "__tuple__"


def state_file(checkpoint: Path) -> Path | None:
    """The file in a checkpoint's folder; None where there is none."""
    found = (checkpoint / name for name in (STATE, OLD_STATE))
    return next((path for path in found if path.is_file()), None)


def write_state(path: Path, state: dict[str, Any]) -> None:
    """Write plain values, and tensors among them.

    Args:
        path: the file.
        state: None, booleans, numbers, texts, tensors, lists, tuples, and dicts whose keys are
            texts.
    """
    tensors: dict[str, Tensor] = {}
    plain = _without_tensors(state, _KEY, tensors)
    write_safetensors(path, tensors, {_KEY: json.dumps(plain)})


def read_state(path: Path) -> Any:
    """Read what `write_state` wrote, or an older version's pickle.

    Raises:
        WeightsError, OSError, ValueError, KeyError: it is damaged, or was not written so.
    """
    if path.name == OLD_STATE:
        # Into memory, and not mapped: the file may be replaced while the state is in use.
        return read_torch_file(io.BytesIO(read_file(path, _LARGEST)))
    tensors, told = read_tensors(path)
    if not isinstance(told.get(_KEY), str):
        raise WeightsError(f"{path} holds no state of a run")
    try:
        plain = parse_json(told[_KEY])
    except Unreadable as error:
        raise WeightsError(f"{path}: {error}") from None
    return _with_tensors(plain, tensors)


def load_state(directory: Path) -> dict[str, Any]:
    """The state in a checkpoint folder, but the optimizer's. Runs no code from the file."""
    path = state_file(directory)
    if path is None:
        raise ConfigError(
            f"{directory} is not a checkpoint of a training run: {STATE} is missing; to "
            f"start a new run from these weights, use --init-from {directory}"
        )
    try:
        state = read_state(path)
    except Exception as error:  # a damaged pickle or archive fails in any way it likes
        reason = f": it {error}" if isinstance(error, Objection) else ""
        raise WeightsError(
            f"{path} cannot be read{reason}. It is damaged, cut short or not a training state; "
            "name an older checkpoint: --resume PATH"
        ) from None
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        found = state.get("format") if isinstance(state, dict) else type(state).__name__
        raise ConfigError(f"{path} has format {shown(found)}; this version reads format {FORMAT}")
    if "adapters" not in state:
        raise explain_state(path, KeyError("adapters"))
    return state


def explain_state(path: Path, error: Exception) -> WeightsError:
    """The error for a state that lacks an entry, or holds another kind of value in its place."""
    reason = f"{type(error).__name__}: {shown(str(error))}"
    return WeightsError(
        f"{path} is damaged or was not written by this program ({reason}); name an older "
        "checkpoint: --resume PATH"
    )


def random_states() -> dict[str, Any]:
    """States of every global random generator that a run may draw from."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {"python": random.getstate(), "torch": torch.get_rng_state(), "cuda": cuda}


def restore_random_states(states: dict[str, Any]) -> None:
    random.setstate(states["python"])
    torch.set_rng_state(states["torch"])
    if torch.cuda.is_available() and len(states["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(states["cuda"])


def _without_tensors(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, Tensor):
        tensors[name] = value
        return {_TENSOR: name}
    if isinstance(value, dict):
        return {key: _without_tensors(v, f"{name}.{key}", tensors) for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        items = [_without_tensors(v, f"{name}.{i}", tensors) for i, v in enumerate(value)]
        return {_TUPLE: items} if isinstance(value, tuple) else items
    return value


def _with_tensors(value: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_with_tensors(v, tensors) for v in value]
    if not isinstance(value, dict):
        return value
    if value.keys() == {_TENSOR}:
        return tensors[value[_TENSOR]].clone()  # not mapped: the file may be replaced meanwhile
    if value.keys() == {_TUPLE}:
        return tuple(_with_tensors(v, tensors) for v in value[_TUPLE])
    return {key: _with_tensors(v, tensors) for key, v in value.items()}
