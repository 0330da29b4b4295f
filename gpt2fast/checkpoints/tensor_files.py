"""Tensors out of untrusted files, and into files that others read.

Whatever a file holds, reading it runs no code of the file's, ends with tensors or with one
WeightsError that names the file, and takes memory in proportion to the file at most. Tensors are
memory-mapped where the format allows it (all but torch's format from before 1.6): private,
copy-on-write pages of the file. As everywhere with memory maps, the file may be deleted or
replaced by renaming another one over it, which is what this package's writers do, but must not be
truncated or overwritten in place while tensors from it are in use.

The format of safetensors: https://huggingface.co/docs/safetensors.
"""

from __future__ import annotations

import json
import os
import re
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any, NamedTuple

import torch
from torch import Tensor

from .._system.files import atomic_write, open_file
from .._system.parsing import is_file_name, read_json, unreadable_as
from .._system.pickle_check import Objection
from ..errors import WeightsError, reason_of, shown
from ..tokenizer.nanogpt import CHECKPOINT
from . import llm_c, tensorflow_files
from .foreign_files import explain_file
from .tensor_names import names_blocks
from .torch_files import LEGACY_MAGIC, ZIP_MAGIC, read_torch_file

# Far more than any GPT-2 needs; parsing takes about twelve times as much memory.
_LARGEST_HEADER = 8 << 20
_MOST_TENSORS = 10_000  # gpt2-xl has 580

_DEEPEST = 6  # dicts around a state dict
# An optimizer may have its averages under the names of the parameters.
_OPTIMIZER = re.compile("optim|exp_avg|momentum|grad", re.IGNORECASE)

_SAFETENSORS_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int8: "I8",
    torch.uint8: "U8",
}


def read_tensors(path: Path) -> tuple[dict[str, Tensor], Mapping[str, Any]]:
    """All tensors of a checkpoint by name, on the CPU, and the other values of a pickled one.

    Reads safetensors, what torch.save writes (`torch_files`), and the `*.index.json` of both
    kinds, whose shards lie in the same directory. Of nested dicts that were pickled, the one is
    taken that has a GPT-2's tensors, whatever it is called; what was beside it (nanoGPT's
    "model_args", ...) is the second result. If several have them, names begin with the keys that
    lead to each. Of a safetensors file, the second result is its metadata, texts by name; of
    shards, it is empty. llm.c's model files and TensorFlow's checkpoints are read too, with the
    model's GPT2Config as "config".

    Raises:
        WeightsError: with the file's name, for a file that is missing, damaged or malicious.
    """
    kind = file_kind(path)
    if kind == "index":
        return _read_shards(path), {}
    if kind == "safetensors":
        return _read_safetensors(path)
    if kind == "torch":
        return _read_pickle(path)
    if kind == "tensorflow":
        described = tensorflow_files.read_description(path.parent)
        return tensorflow_files.read_bundle(path), {"config": described}
    with _open(path) as file:
        try:
            tensors, config = llm_c.read_llm_c(file)
        except Objection as reason:
            raise WeightsError(f"{path} {reason}") from None
    return tensors, {"config": config}


def describes_itself(path: Path) -> bool:
    """True for a file that says what model it holds, so that no config.json is read.

    Raises:
        WeightsError: as of `file_kind`.
    """
    kind = file_kind(path)
    if kind == "tensorflow":
        return (path.parent / tensorflow_files.DESCRIPTION).exists()
    if path.name == CHECKPOINT and kind == "torch":
        content = read_torch(path)
        return isinstance(content, dict) and isinstance(content.get("model_args"), dict)
    return kind == "llm.c"


def file_kind(path: Path) -> str:
    """The format of a file, of those that `read_tensors` reads: its first bytes decide.

    Returns:
        "index" (of shards), "safetensors", "torch", "tensorflow" (the index of a checkpoint) or
        "llm.c".

    Raises:
        WeightsError: it cannot be read, or is something else.
    """
    if path.name.endswith(".index.json"):
        return "index"
    with _open(path) as file:
        head = file.read(64)
    if head.startswith(b"version https://git-lfs"):
        raise WeightsError(f"{path} is a Git LFS pointer, not the weights: run `git lfs pull`")
    if path.suffix == ".safetensors" or _is_safetensors(head, path):
        return "safetensors"
    if head.startswith(llm_c.MAGIC):
        return "llm.c"
    if path.suffix == ".index" and tensorflow_files.is_index(path):
        return "tensorflow"
    if head.startswith((ZIP_MAGIC, LEGACY_MAGIC)):
        return "torch"
    what = explain_file(path, head)
    if what is not None:
        raise WeightsError(f"{path} is {what}")
    raise WeightsError(
        f"{path} is not a checkpoint: neither safetensors nor what torch.save writes"
        if head
        else f"{path} is empty; download or copy it again"
    )


def _is_safetensors(head: bytes, path: Path) -> bool:
    """True for a file that begins as safetensors does: the header's length, then the header."""
    length = int.from_bytes(head[:8], "little")
    return head[8:9] == b"{" and length <= min(_LARGEST_HEADER, path.stat().st_size - 8)


def write_safetensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write tensors (any device) and texts by name to a safetensors file, atomically.

    safetensors' own writer fixes neither durability nor alignment: here the data start at a
    multiple of 64 bytes, so that memory-mapped weights are aligned for vector loads.
    """
    # Wider elements first keep each tensor aligned to its element size.
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    end = 0
    for name in names:
        tensor = tensors[name]
        begin, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": _SAFETENSORS_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-(8 + len(encoded)) % 64)
    with atomic_write(path, "wb") as file:
        file.write(struct.pack("<Q", len(encoded)) + encoded)
        for name in names:
            flat = tensors[name].detach().to("cpu").contiguous().flatten()
            file.write(flat.view(torch.uint8).numpy().data)


def _open(path: Path) -> IO[bytes]:
    with unreadable_as(WeightsError, path):
        return open_file(path)


def _read_shards(index: Path) -> dict[str, Tensor]:
    weight_map = read_json(index, WeightsError).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise WeightsError(f"{index} has no weight_map from tensor names to files")
    for name, shard in weight_map.items():
        # A shard lies beside its index; "../x" or "/etc/x" is somebody's mistake or worse.
        if not is_file_name(shard):
            raise WeightsError(
                f"{index}: {shown(shard)}, the file of {shown(name)}, is no file name"
            )
        if shard.endswith(".index.json"):
            raise WeightsError(f"{index}: {shown(shard)}, the file of {shown(name)}, is an index")
    missing = [s for s in sorted(set(weight_map.values())) if not (index.parent / s).is_file()]
    if missing:
        named = ", ".join(map(shown, missing[:5]))
        more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
        raise WeightsError(
            f"{index} names files that are missing beside it: {named}{more}; download or copy them"
        )
    tensors: dict[str, Tensor] = {}
    for shard in sorted(set(weight_map.values())):
        part, _ = read_tensors(index.parent / shard)
        for name in part:
            if name in tensors:
                raise WeightsError(
                    f"{index}: {shown(name)} is in {shown(shard)} and in another file too"
                )
        tensors.update(part)
    for name, shard in weight_map.items():
        if name not in tensors:
            raise WeightsError(
                f"{index}: {shown(name)} is said to be in {shown(shard)}, and is not"
            )
    return tensors


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    from safetensors import SafetensorError, safe_open

    with _open(path) as file:
        size = os.fstat(file.fileno()).st_size
        start = file.read(8)
    # safetensors checks all the rest, but reads headers of up to 100 MB into 1.2 GB of memory.
    length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
    if len(start) < 8 or length > size - 8:
        raise WeightsError(
            f"{path} is not a safetensors file, or only its beginning: it has {size} bytes, "
            f"and its header ends at byte {8 + length}; download or copy it again"
        )
    if length > _LARGEST_HEADER:
        raise WeightsError(
            f"{path}: its header of {length} bytes is beyond the limit of {_LARGEST_HEADER}"
        )
    try:
        with (
            _open(path) as file,
            safe_open(_in_utf8(path, file), framework="pt", device="cpu") as opened,
        ):
            names = opened.keys()
            if len(names) > _MOST_TENSORS:
                raise WeightsError(
                    f"{path} holds {len(names)} tensors, beyond the limit of {_MOST_TENSORS}"
                )
            tensors = {name: opened.get_tensor(name) for name in names}
            return tensors, opened.metadata() or {}
    except WeightsError:
        raise
    except (SafetensorError, OSError, ValueError, RuntimeError, KeyError, AttributeError) as cause:
        raise _damaged(path, cause) from cause


def _in_utf8(path: Path, file: IO[bytes]) -> str:
    """A name of an open file that is UTF-8, as safetensors wants it."""
    try:
        os.fsencode(path).decode("utf-8")
    except UnicodeDecodeError:
        return f"/dev/fd/{file.fileno()}"
    return str(path)


def _read_pickle(path: Path) -> tuple[dict[str, Tensor], Mapping[str, Any]]:
    content = read_torch(path)
    if not isinstance(content, dict):
        raise WeightsError(
            f"{path} holds a {type(content).__name__}, not a state dict: "
            "write one with torch.save(model.state_dict(), path)"
        )
    found = _state_dicts(content)
    blocks = [state for state in found if names_blocks(state.tensors)]
    if not found:
        name, value = next(iter(content.items()), ("", None))
        raise WeightsError(
            f"{path} is not a state dict: its entry {shown(name)} is of type "
            f"{type(value).__name__}, not a tensor"
            if content
            else f"{path} is empty: it holds no tensors"
        )
    chosen = blocks or found[:1]
    if len(chosen) == 1:
        return chosen[0].tensors, chosen[0].beside
    # Two models, or two copies of one: their names tell them apart.
    return {
        ".".join((*state.keys, name)): tensor
        for state in chosen
        for name, tensor in state.tensors.items()
    }, {}


class _StateDict(NamedTuple):
    """A dict of tensors within a pickled object."""

    keys: tuple[str, ...]
    tensors: dict[str, Tensor]
    beside: Mapping[str, Any]
    """Other values: in the dict itself, or beside it in the one that holds it."""


def _state_dicts(content: dict[Any, Any]) -> list[_StateDict]:
    """All dicts of tensors in nested dicts, the outer ones first; an optimizer's left out."""
    found: list[_StateDict] = []
    level: list[tuple[tuple[str, ...], dict[Any, Any], Mapping[str, Any]]] = [((), content, {})]
    while level:
        below: list[tuple[tuple[str, ...], dict[Any, Any], Mapping[str, Any]]] = []
        for keys, values, around in level:
            tensors = {k: v for k, v in values.items() if type(k) is str and isinstance(v, Tensor)}
            if tensors:
                others = {k: v for k, v in values.items() if not isinstance(v, Tensor)}
                found.append(_StateDict(keys, tensors, {**around, **others}))
            for key, value in values.items():
                if isinstance(value, dict) and type(key) is str and not _OPTIMIZER.search(key):
                    beside = {k: v for k, v in values.items() if v is not value}
                    below.append(((*keys, key), value, beside))
        level = below if len(keys) < _DEEPEST else []
    return found


def read_torch(path: Path) -> Any:
    """The content of a file of torch.save: tensors, numbers and texts in containers.

    Raises:
        WeightsError: with the file's name, for a file that is missing, damaged or malicious.
    """
    try:
        with _open(path) as file:
            return read_torch_file(file)
    except Objection as objection:
        raise WeightsError(
            f"{path} {objection}, so it was not opened; what is read are tensors, numbers and "
            "texts, as torch.save(model.state_dict(), path) writes them"
        ) from None
    except WeightsError:
        raise
    except Exception as cause:  # a damaged pickle or archive fails in any way it likes
        raise _damaged(path, cause) from cause


def _damaged(path: Path, cause: BaseException) -> WeightsError:
    reason = f"{type(cause).__name__}: {reason_of(cause, 200)}"
    return WeightsError(f"{path} is damaged: {reason}; download or copy it again")
