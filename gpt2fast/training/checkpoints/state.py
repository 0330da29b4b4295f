"""What a checkpoint says of its run: a safetensors file whose metadata hold, as JSON, all that is
no tensor. Older runs have a pickle in its place, which is read without running what is in it."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

from torch import Tensor

from ..._system.files import read_file
from ..._system.parsing import Unreadable, parse_json
from ...checkpoints.tensor_files import read_tensors, write_safetensors
from ...checkpoints.torch_files import read_torch_file
from ...errors import WeightsError

NAME = "training_state.safetensors"
OLD_NAME = "training_state.pt"
_LARGEST = 64 << 20  # random states and counters: some kilobytes a process
_KEY = "state"
_TENSOR, _TUPLE = "__tensor__", "__tuple__"


def state_file(checkpoint: Path) -> Path | None:
    """The file in a checkpoint's folder; None where there is none."""
    found = (checkpoint / name for name in (NAME, OLD_NAME))
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
    """What `write_state` wrote, or an older version's pickle.

    Raises:
        WeightsError, OSError, ValueError, KeyError: it is damaged, or was not written so.
    """
    if path.name == OLD_NAME:
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
