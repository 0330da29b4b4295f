"""Tensors out of files that nobody vouches for, and into files that others read.

Whatever a file holds, reading it runs no code of the file's, ends with tensors or with one
WeightsError that names the file, and takes memory in proportion to the file at most. Tensors are
memory-mapped where the format allows it (all but torch's format from before 1.6): private,
copy-on-write pages of the file. As everywhere with memory maps, the file may be deleted or
replaced by renaming another one over it, which is what this package's writers do, but must not be
truncated or overwritten in place while tensors from it are in use.

Formats: https://huggingface.co/docs/safetensors, https://docs.pytorch.org/docs/stable/notes/serialization.html.
"""

from __future__ import annotations

import json
import os
import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from .errors import ConfigError, Error, WeightsError
from .files import atomic_write
from .pickle_check import objection

# Far more than any GPT-2 needs; parsing takes about twelve times as much memory.
_LARGEST_HEADER = 8 << 20
_LARGEST_JSON = 8 << 20
_MOST_TENSORS = 10_000  # gpt2-xl has 580

_LEGACY_MAGIC = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."

_SAFETENSORS_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int8: "I8",
    torch.uint8: "U8",
}


def read_json(path: Path, error: type[Error] = ConfigError) -> dict[str, Any]:
    """The object in a JSON file; `error`, naming the file, for anything else."""
    try:
        if not path.is_file():
            raise error(f"{path} is missing")
        size = path.stat().st_size
        if size > _LARGEST_JSON:
            raise error(f"{path} has {size} bytes; at most {_LARGEST_JSON} are read as JSON")
        values = json.loads(path.read_text(encoding="utf-8"))
        repr(values)  # what is nested too deeply to be shown in an error fails here
    except Error:
        raise
    except (OSError, ValueError, RecursionError) as cause:  # UTF-8 and JSON errors are ValueErrors
        raise error(f"{path} cannot be read as JSON: {_brief(cause)}") from cause
    if not isinstance(values, dict):
        raise error(f"{path}: expected a JSON object, found {type(values).__name__}")
    return values


def read_tensors(path: Path) -> tuple[dict[str, Tensor], Mapping[str, Any]]:
    """All tensors of a checkpoint by name, on the CPU, and what a pickled one says beside them.

    Reads safetensors, pickles of torch.save (with `weights_only=True`), and the
    `*.index.json` of both kinds, whose shards lie in the same directory. A pickled dict that holds
    its tensors under "model", "state_dict" or "model_state_dict" is unwrapped; its other entries
    (nanoGPT's "model_args", ...) are the second result; of a safetensors file, that is its
    metadata, texts by name; of shards, it is empty.

    Raises:
        WeightsError: with the file's name, for a file that is missing, damaged or malicious.
    """
    if path.name.endswith(".index.json"):
        return _read_shards(path), {}
    with _open(path) as file:
        head = file.read(64)
    if head.startswith(b"version https://git-lfs"):
        raise WeightsError(f"{path} is a Git LFS pointer, not the weights: run `git lfs pull`")
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    return _read_pickle(path, head)


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
    # A pipe or a device could block for ever: only regular files are opened.
    try:
        if not path.is_file():
            raise WeightsError(f"{path} is {'not a file' if path.exists() else 'missing'}")
        return path.open("rb")
    except OSError as cause:
        raise WeightsError(f"{path} cannot be read: {_brief(cause)}") from cause


def _read_shards(index: Path) -> dict[str, Tensor]:
    weight_map = read_json(index, WeightsError).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise WeightsError(f"{index} has no weight_map from tensor names to files")
    for name, shard in weight_map.items():
        # A shard lies beside its index; "../x" or "/etc/x" is somebody's mistake or worse.
        if not isinstance(shard, str) or not shard or shard != os.path.basename(shard):
            raise WeightsError(f"{index}: {shard!r:.80}, the file of {name!r:.80}, is no file name")
        if shard.endswith(".index.json"):
            raise WeightsError(f"{index}: {shard!r:.80}, the file of {name!r:.80}, is an index")
    missing = [s for s in sorted(set(weight_map.values())) if not (index.parent / s).is_file()]
    if missing:
        more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
        raise WeightsError(
            f"{index} names files that are missing beside it: {', '.join(missing[:5])}{more}; "
            "download or copy them"
        )
    tensors: dict[str, Tensor] = {}
    for shard in sorted(set(weight_map.values())):
        part, _ = read_tensors(index.parent / shard)
        for name in part:
            if name in tensors:
                raise WeightsError(f"{index}: {name!r:.80} is in {shard} and in another file too")
        tensors.update(part)
    for name, shard in weight_map.items():
        if name not in tensors:
            raise WeightsError(f"{index}: {name!r:.80} is said to be in {shard}, and is not")
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
        with safe_open(path, framework="pt", device="cpu") as opened:
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


def _read_pickle(path: Path, head: bytes) -> tuple[dict[str, Tensor], Mapping[str, Any]]:
    is_zip = head.startswith(b"PK\x03\x04")
    if not is_zip and not head.startswith(_LEGACY_MAGIC):
        raise WeightsError(
            f"{path} is not a checkpoint written by torch.save, and does not end in .safetensors"
        )
    try:
        sizes = None
        if is_zip:
            sizes = _check_zip(path)
        else:
            _check_legacy(path)
        # Only the zip format can be mapped; the older one is read into memory, one copy either way.
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except WeightsError:
        raise
    except Exception as cause:  # a damaged pickle or archive fails in any way it likes
        raise _damaged(path, cause) from cause
    extra: Mapping[str, Any] = {}
    if isinstance(content, dict):
        for wrapper in ("model", "state_dict", "model_state_dict"):
            if isinstance(content.get(wrapper), dict):
                extra = {key: value for key, value in content.items() if key != wrapper}
                content = content[wrapper]
                break
    if not isinstance(content, dict):
        raise WeightsError(
            f"{path} holds a {type(content).__name__}, not a state dict: "
            "write one with torch.save(model.state_dict(), path)"
        )
    return {key: _checked(path, key, value, sizes) for key, value in content.items()}, extra


def _check_zip(path: Path) -> set[int]:
    """Refuse archives that torch.save does not write; return the sizes of the stored storages."""
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        if any(entry.filename.endswith("/constants.pkl") for entry in entries):
            raise WeightsError(
                f"{path} is a TorchScript program, not a state dict: "
                "write one with torch.save(model.state_dict(), path)"
            )
        # Compressed entries would be mapped as they are, or unpack to any size.
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
            raise WeightsError(f"{path} is a compressed archive, which torch.save does not write")
        pickles = [entry for entry in entries if entry.filename.endswith("/data.pkl")]
        if len(pickles) != 1 or pickles[0].file_size > path.stat().st_size:
            raise WeightsError(f"{path} is a zip archive, but not one that torch.save wrote")
        with archive.open(pickles[0]) as stream:
            _check_pickle(path, stream)
        return {entry.file_size for entry in entries if "/data/" in entry.filename}


def _check_legacy(path: Path) -> None:
    with _open(path) as file:
        for _ in range(5):  # magic number, version, system, the object, the keys of its storages
            _check_pickle(path, file)


def _check_pickle(path: Path, stream: IO[bytes]) -> None:
    reason = objection(stream)
    if reason is not None:
        raise WeightsError(
            f"{path} is a pickle that {reason}, so it was not opened; if you trust it, "
            "save its tensors alone with torch.save(model.state_dict(), path)"
        )


def _checked(path: Path, name: Any, tensor: Any, storage_sizes: set[int] | None) -> Tensor:
    """`tensor`, unless it is none, or claims more than the file holds."""
    if not isinstance(name, str) or not isinstance(tensor, Tensor):
        raise WeightsError(
            f"{path} is not a state dict: its entry {name!r:.80} is of type "
            f"{type(tensor).__name__}, not a tensor"
        )
    if tensor.layout is not torch.strided or tensor.device.type != "cpu" or tensor.is_quantized:
        raise WeightsError(f"{path}: {name!r:.80} is not a dense tensor; save it as one")
    stored = tensor.untyped_storage().nbytes()
    # Tensors may be views (transposed, sliced), but not repeat a few bytes many times.
    if tensor.numel() * tensor.element_size() > stored or (
        storage_sizes is not None and stored not in storage_sizes and tensor.numel()
    ):
        raise WeightsError(
            f"{path} is damaged: {name!r:.80} of shape {tuple(tensor.shape)} claims other bytes "
            "than the file holds; download or copy it again"
        )
    return tensor.detach()


def _damaged(path: Path, cause: BaseException) -> WeightsError:
    return WeightsError(f"{path} is damaged: {_brief(cause)}; download or copy it again")


def _brief(cause: BaseException) -> str:
    """The first line of an exception's text, with its type where the text says little."""
    lines = str(cause).strip().splitlines()
    return f"{type(cause).__name__}: {lines[0][:200]}" if lines else type(cause).__name__
