"""TensorFlow's checkpoints, as OpenAI released GPT-2 in them, read without TensorFlow.

    model.ckpt.index                   names, and where each tensor lies: a table of LevelDB
    model.ckpt.data-00000-of-00001     the numbers, one tensor after the other
    hparams.json                       OpenAI's description of the model

The table ends in a footer that points to its index block; that points to blocks of entries, whose
keys are written as what they have beyond the key before. Values are protocol buffers
(BundleHeaderProto for the empty key, BundleEntryProto for names), of which the few fields are read
that tell where a tensor is. Every number is held against the files before it is used.
https://github.com/tensorflow/tensorflow/blob/master/tensorflow/core/protobuf/tensor_bundle.proto
https://github.com/google/leveldb/blob/main/doc/table_format.md
"""

from __future__ import annotations

import functools
import math
import mmap
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .._system.files import open_file, read_file
from .._system.parsing import read_json
from .._system.pickle_check import Objection
from ..config import PRESETS, GPT2Config
from ..errors import ConfigError, WeightsError, shown

FOOTER_MAGIC = struct.pack("<Q", 0xDB4775248B80FB57)
"""The end of a checkpoint's index."""

DESCRIPTION = "hparams.json"

_LARGEST_INDEX = 1 << 20  # that of the model of 1.5B parameters has less than 30 kB
_MOST_TENSORS = 10_000
_MOST_AXES = 8
_MOST_SHARDS = 1000
_FOOTER = 48
_DTYPES = {
    1: torch.float32,
    2: torch.float64,
    3: torch.int32,
    4: torch.uint8,
    6: torch.int8,
    9: torch.int64,
    10: torch.bool,
    14: torch.bfloat16,
    19: torch.float16,
}
_HPARAMS = {
    "n_vocab": "vocab_size",
    "n_ctx": "n_positions",
    "n_embd": "n_embd",
    "n_head": "n_head",
    "n_layer": "n_layer",
}


@dataclass
class _Entry:
    """The place of a tensor in the data files: a BundleEntryProto."""

    dtype: int = 0
    shape: list[int] = field(default_factory=list)
    shard: int = 0
    offset: int = 0
    size: int = 0


def is_index(path: Path) -> bool:
    """True for the index of a TensorFlow checkpoint.

    Raises:
        OSError: it cannot be read.
    """
    with open_file(path) as file:
        size = file.seek(0, 2)
        file.seek(max(0, size - len(FOOTER_MAGIC)))
        return file.read() == FOOTER_MAGIC


def read_bundle(index: Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint by TensorFlow's names, memory-mapped, copy-on-write.

    The data lie beside the `index`. Strings are left out, and so is what an optimizer keeps beside
    a variable (`…/w/Adam`).

    Raises:
        WeightsError: a file is missing, damaged, or of a kind that is not read.
    """
    try:
        shards, entries = _entries(read_file(index, _LARGEST_INDEX))
        maps = [_mapped(_data_file(index, shard, shards)) for shard in range(shards)]
        claimed = sum(entry.size for entry in entries.values())
        if claimed > sum(map(len, maps)):
            raise Objection("describes more bytes than its data files have")
        tensors = {
            name: _tensor(name, entry, maps)
            for name, entry in entries.items()
            if entry.dtype in _DTYPES
        }
    except Objection as reason:
        raise WeightsError(
            f"{index} {reason}; download or copy it and the data beside it again"
        ) from None
    except OSError as error:
        name = index if error.filename is None else error.filename
        raise WeightsError(f"{name} cannot be read: {error.strerror or error}") from None
    except (ValueError, IndexError, TypeError, struct.error) as cause:
        raise WeightsError(f"{index} is damaged: {str(cause)[:200]}; download it again") from None
    return {name: t for name, t in tensors.items() if name.rpartition("/")[0] not in tensors}


def read_description(folder: Path) -> GPT2Config | None:
    """The configuration in OpenAI's hparams.json; None without that file.

    Raises:
        ConfigError: it cannot be read, or describes no GPT-2.
    """
    path = folder / DESCRIPTION
    if not path.exists():
        return None
    values = read_json(path)
    missing = [name for name in _HPARAMS if name not in values]
    if missing:
        raise ConfigError(f"{path} does not say {', '.join(missing)}")
    settings = {ours: values[theirs] for theirs, ours in _HPARAMS.items()}
    if settings["vocab_size"] != PRESETS["gpt2"].vocab_size:  # its ids are others
        settings.update(bos_token_id=None, eos_token_id=None)
    return GPT2Config.from_dict(settings, source=str(path))


def _data_file(index: Path, shard: int, shards: int) -> Path:
    return index.with_name(f"{index.stem}.data-{shard:05d}-of-{shards:05d}")


def _mapped(path: Path) -> Any:
    with open_file(path) as file:
        size = file.seek(0, 2)
        # An empty file cannot be mapped.
        return mmap.mmap(file.fileno(), size, access=mmap.ACCESS_COPY) if size else b""


def _tensor(name: str, entry: _Entry, maps: list[Any]) -> Tensor:
    dtype = _DTYPES[entry.dtype]
    count = math.prod(entry.shape)
    if not 0 <= entry.shard < len(maps):
        raise Objection(f"has {shown(name)} in data file {entry.shard} of {len(maps)}")
    data = maps[entry.shard]
    if entry.size != count * dtype.itemsize or entry.offset + entry.size > len(data):
        raise Objection(
            f"says that {shown(name)} has the shape {shown(tuple(entry.shape))} and {entry.size} "
            f"bytes from byte {entry.offset} on, in a data file of {len(data)}"
        )
    if not count:
        return torch.empty(entry.shape, dtype=dtype)
    numbers = torch.frombuffer(data, dtype=torch.uint8, count=entry.size, offset=entry.offset)
    if numbers.data_ptr() % dtype.itemsize:
        numbers = numbers.clone()
    return numbers.view(dtype).view(entry.shape)


def _entries(table: bytes) -> tuple[int, dict[str, _Entry]]:
    """The number of data files, and the entry of each name."""
    if len(table) < _FOOTER or not table.endswith(FOOTER_MAGIC):
        raise Objection("is not the index of a TensorFlow checkpoint, or only its beginning")
    footer = table[-_FOOTER:]
    _, place = _handle(footer, 0)  # of the meta index, which holds nothing
    index, _ = _handle(footer, place)
    shards = 0
    entries: dict[str, _Entry] = {}
    read = 0
    for _, value in _block(table, index):
        handle, _ = _handle(value, 0)
        read += handle[1]
        if read > len(table):
            raise Objection("names blocks that overlap")
        for key, content in _block(table, handle):
            if not key:
                shards = _shards(content)
                continue
            name = key.decode("utf-8", "backslashreplace")
            entries[name] = _entry(name, content)
            if len(entries) > _MOST_TENSORS:
                raise Objection(f"has more than {_MOST_TENSORS} tensors")
    if not 1 <= shards <= _MOST_SHARDS:
        raise Objection(f"says that there are {shards} data files")
    return shards, entries


def _block(table: bytes, handle: tuple[int, int]) -> Iterator[tuple[bytes, bytes]]:
    """Keys and values of a block: entries, restart points, their number, kind, checksum."""
    offset, size = handle
    block, trailer = table[offset : offset + size], table[offset + size :][:5]
    if len(block) != size or size < 4 or len(trailer) < 5:
        raise Objection("points beyond its end")
    if struct.unpack("<I", trailer[1:])[0] != _masked_crc32c(block + trailer[:1]):
        raise Objection("does not have the checksum that it tells")
    if trailer[0] == 1:
        block = _snappy(block)
    elif trailer[0]:
        raise Objection(f"has a block compressed in way {trailer[0]}, which is not known")
    (restarts,) = struct.unpack("<I", block[-4:])
    end = len(block) - 4 - 4 * restarts
    if end < 0:
        raise Objection("has a block of restart points alone")
    key, place, total = b"", 0, 0
    while place < end:
        shared, place = _varint(block, place)
        fresh, place = _varint(block, place)
        length, place = _varint(block, place)
        if shared > len(key) or place + fresh + length > end:
            raise Objection("has an entry that is longer than its block")
        key = key[:shared] + block[place : place + fresh]
        total += len(key)
        if total > _LARGEST_INDEX:  # a long key that is shared by many
            raise Objection("has names of more bytes than are read")
        place += fresh + length
        yield key, block[place - length : place]


def _handle(data: bytes, place: int) -> tuple[tuple[int, int], int]:
    offset, place = _varint(data, place)
    size, place = _varint(data, place)
    return (offset, size), place


def _shards(header: bytes) -> int:
    """The number of data files in a BundleHeaderProto."""
    shards = 0
    for number, value in _fields(header):
        if number == 1:
            shards = value
        elif number == 2 and value:
            raise Objection("was written by a big-endian machine")
    return shards


def _entry(name: str, message: bytes) -> _Entry:
    entry = _Entry()
    for number, value in _fields(message):
        if number == 1:
            entry.dtype = value
        elif number == 2:
            for part, axis in _fields(value):
                if part == 2:
                    entry.shape.append(sum(v for k, v in _fields(axis) if k == 1))
        elif number == 3:
            entry.shard = value
        elif number == 4:
            entry.offset = value
        elif number == 5:
            entry.size = value
        elif number == 7:
            raise Objection(f"has {shown(name)} in slices, which are not put together here")
    if len(entry.shape) > _MOST_AXES or any(length >= 1 << 40 for length in entry.shape):
        raise Objection(f"says that {shown(name)} has the shape {shown(tuple(entry.shape))}")
    return entry


def _fields(message: bytes) -> Iterator[tuple[int, Any]]:
    """Numbers and values of a protocol buffer's fields: integers, or bytes."""
    place = 0
    while place < len(message):
        tag, place = _varint(message, place)
        kind = tag & 7
        if kind == 0:
            value, place = _varint(message, place)
            yield tag >> 3, value
            continue
        if kind == 2:
            length, place = _varint(message, place)
        elif kind in (1, 5):
            length = 8 if kind == 1 else 4
        else:
            raise Objection("holds a message of an unknown kind")
        if place + length > len(message):
            raise Objection("holds a message that is cut off")
        yield tag >> 3, message[place : place + length]
        place += length


def _varint(data: bytes, place: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        byte = data[place]
        place += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, place
    raise Objection("holds a number of more than 64 bits")


def _snappy(data: bytes) -> bytes:
    """Data in Google's Snappy format, uncompressed.

    https://github.com/google/snappy/blob/main/format_description.txt
    """
    length, place = _varint(data, 0)
    if length > _LARGEST_INDEX:
        raise Objection(f"has a block of {length} bytes")
    out = bytearray()
    while place < len(data):
        tag, place = data[place], place + 1
        kind, count = tag & 3, tag >> 2
        # Bytes that follow the tag: the length of a long literal, or how far back a copy begins.
        extra = (max(0, count - 59), 1, 2, 4)[kind]
        number = int.from_bytes(data[place : place + extra], "little")
        place += extra
        if kind == 0:
            count = (number if extra else count) + 1
            out += data[place : place + count]
            place += count
        else:
            back = number
            if kind == 1:
                count, back = (count & 7) + 3, (tag >> 5) << 8 | number
            count += 1
            if not 1 <= back <= len(out):
                raise Objection("has a block that repeats what it does not hold")
            start = len(out) - back
            for at in range(start, start + count):  # it may repeat what it has just written
                out.append(out[at])
        if len(out) > length or place > len(data):
            break
    if len(out) != length or place > len(data):
        raise Objection("has a compressed block of another length than it says")
    return bytes(out)


@functools.cache
def _crc_table() -> list[int]:
    table = []
    for byte in range(256):
        for _ in range(8):
            byte = byte >> 1 ^ (0x82F63B78 if byte & 1 else 0)
        table.append(byte)
    return table


def _masked_crc32c(data: bytes) -> int:
    """CRC-32C in LevelDB's masked form (a checksum of data that contain checksums)."""
    table, crc = _crc_table(), 0xFFFFFFFF
    for byte in data:
        crc = crc >> 8 ^ table[(crc ^ byte) & 255]
    crc ^= 0xFFFFFFFF
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF
