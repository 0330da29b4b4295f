"""Memory-mapped token files: raw arrays (nanoGPT's `.bin`), llm.c's headed shards and `.npy`.

A headed shard begins with 256 little-endian int32 numbers: magic 20240520, version (1: uint16
tokens, 7: uint32 tokens), number of tokens, zeros (llm.c, dev/data/data_common.py). A `.npy` file
begins with its type and shape (NumPy, `numpy.lib.format`). Everything else is read as raw
little-endian tokens.
"""

from __future__ import annotations

import glob
import mmap
import re
import struct
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from .._system.files import open_file
from ..errors import DataError

MAGIC = 20240520
HEADER_BYTES = 1024
DTYPE_OF_VERSION = {1: "uint16", 7: "uint32"}
NPY_MAGIC = b"\x93NUMPY"
TOKEN_SUFFIXES = (".bin", ".npy")
_SIGNED = {
    "uint16": torch.int16,
    "uint32": torch.int32,
    "int32": torch.int32,
    "uint64": torch.int64,
    "int64": torch.int64,
}
"""By the type of tokens, that which torch maps and indexes: it indexes signed integers only."""
_LONGEST_NPY_HEADER = 1 << 12
_NPY_HEADER = re.compile(
    rb"\{'descr': '([<>|=]?[A-Za-z][0-9]{0,4})', 'fortran_order': (True|False), "
    rb"'shape': \(((?:[0-9]{1,18}(?:, ?|(?=\))))*)\),? ?\}[ \n]*"
)
_NPY_TYPES = {
    b"<u2": "uint16", b"<u4": "uint32", b"<i4": "int32", b"<u8": "uint64", b"<i8": "int64",
}  # fmt: skip
_SCAN_ITEMS = 1 << 22


class Tokens(Protocol):
    """A sequence of `count` tokens that is read in int64."""

    path: Path
    count: int
    dtype: str

    def slice(self, start: int, stop: int) -> Tensor:
        """Tokens start … stop - 1, (stop - start,) int64."""

    def windows(self, starts: Tensor, length: int) -> Tensor:
        """The `length` tokens from each of `starts` (B,) on, (B, length) int64."""

    def find_at_least(self, limit: int) -> tuple[int, int] | None:
        """Position and value of a token of the first block with one that is >= limit, or < 0."""


class TokenFile:
    """One memory-mapped file of little-endian tokens.

    dtype: "uint16" or "uint32" of a raw file; None looks for a header, and takes a file without
        one for raw uint16.
    """

    def __init__(self, path: Path, dtype: str | None) -> None:
        self.path = path
        self._asked = dtype
        if path.is_dir():
            raise DataError(f"{path} is a folder, not a file of tokens; prepare the data again")
        try:
            size = path.stat().st_size
            header = None if dtype else _read_header(path)
        except OSError as error:
            raise DataError(f"{path} cannot be read: {error.strerror}") from None
        self.dtype = dtype or "uint16"
        skipped = 0
        if header is not None:
            self.dtype, self.count, skipped = header
            expected = skipped + self.count * self._item_size
            if size != expected:
                raise DataError(
                    f"{path}: the header tells of {self.count} {self.dtype} tokens, which makes "
                    f"{expected} bytes, but the file has {size}; it is cut short or damaged, "
                    "fetch or write it again"
                )
        elif size % self._item_size:
            raise DataError(
                f"{path}: {size} bytes are not a whole number of {self.dtype} tokens; "
                "the file is cut short or of another type; prepare the data again"
            )
        else:
            self.count = size // self._item_size
        if not self.count:
            raise DataError(f"{path} is empty; prepare the data again with more text")
        signed = _SIGNED[self.dtype]
        # Masking restores the unsigned value. One of 64 bits that is negative is no token anyway.
        self._mask = -1 if signed == torch.int64 else (1 << 8 * self._item_size) - 1
        with open(path, "rb") as file:  # torch.from_file takes names in UTF-8 alone
            mapped = mmap.mmap(file.fileno(), size, access=mmap.ACCESS_COPY)
        self._signed = torch.frombuffer(mapped, dtype=signed)[skipped // self._item_size :]

    @property
    def _item_size(self) -> int:
        return _SIGNED[self.dtype].itemsize

    def __getstate__(self) -> tuple[Path, str | None]:
        return self.path, self._asked  # a worker process maps the file itself

    def __setstate__(self, state: tuple[Path, str | None]) -> None:
        self.__init__(*state)  # type: ignore[misc]

    def slice(self, start: int, stop: int) -> Tensor:
        return self._signed[start:stop].to(torch.int64).bitwise_and_(self._mask)

    def windows(self, starts: Tensor, length: int) -> Tensor:
        # Not indexing: that wakes all threads, tens of milliseconds on a machine that is busy.
        rows = self._signed.unfold(0, length, 1).index_select(0, starts)
        return rows.to(torch.int64).bitwise_and_(self._mask)

    def find_at_least(self, limit: int) -> tuple[int, int] | None:
        for start in range(0, self.count, _SCAN_ITEMS):
            block = self._signed[start : start + _SCAN_ITEMS]
            low, high = (int(value) for value in block.aminmax())
            # Negative numbers are the upper half of the unsigned range.
            if low < 0 or high >= limit:
                tokens = self.slice(start, start + len(block))
                for place in (int(tokens.argmax()), int(tokens.argmin())):
                    if not 0 <= tokens[place] < limit:
                        return start + place, int(tokens[place])
        return None


class TokenShards:
    """Several files as one sequence: the last token of one is followed by the next one's first."""

    def __init__(self, files: Sequence[TokenFile], path: Path) -> None:
        self.path = path
        self.dtype = files[0].dtype
        for file in files:
            if file.dtype != self.dtype:
                raise DataError(
                    f"{files[0].path} holds {self.dtype} tokens and {file.path} {file.dtype} "
                    "tokens: shards of one data set must have one type; leave out one kind"
                )
        self._files = list(files)
        self._ends = list(accumulate(file.count for file in files))
        self.count = self._ends[-1]

    def slice(self, start: int, stop: int) -> Tensor:
        parts = []
        shard = bisect_right(self._ends, start)
        while start < stop:
            begin = self._ends[shard - 1] if shard else 0
            end = min(stop, self._ends[shard])
            parts.append(self._files[shard].slice(start - begin, end - begin))
            start, shard = end, shard + 1
        return torch.cat(parts)

    def windows(self, starts: Tensor, length: int) -> Tensor:
        return torch.stack([self.slice(start, start + length) for start in starts.tolist()])

    def find_at_least(self, limit: int) -> tuple[int, int] | None:
        for file, end in zip(self._files, self._ends, strict=True):
            found = file.find_at_least(limit)
            if found:
                return end - file.count + found[0], found[1]
        return None


class TokenRange:
    """Tokens start … start + count - 1 of others, as a sequence of their own."""

    def __init__(self, tokens: Tokens, start: int, count: int) -> None:
        self.path, self.dtype = tokens.path, tokens.dtype
        self._tokens, self._start, self.count = tokens, start, count

    def slice(self, start: int, stop: int) -> Tensor:
        return self._tokens.slice(self._start + start, self._start + stop)

    def windows(self, starts: Tensor, length: int) -> Tensor:
        return self._tokens.windows(starts + self._start, length)

    def find_at_least(self, limit: int) -> tuple[int, int] | None:
        return self._tokens.find_at_least(limit)


def open_tokens(path: Path, split: str, dtype: str | None) -> Tokens:
    """The tokens of a split of `path`: a folder, a file, or a pattern such as `a_train_*.bin`."""
    files = [TokenFile(file, dtype) for file in token_files(path, split)]
    return files[0] if len(files) == 1 else TokenShards(files, path)


def token_files(path: Path, split: str) -> list[Path]:
    """The files that hold a split ("train" or "val"), in the order of their names.

    A folder: `<split>.bin`, else every .bin or .npy file with the split in its name. A file or a
    pattern with "train" in its name: that, and for validation the same with "val" in its place.
    """
    if path.is_dir():
        single = path / f"{split}.bin"
        shards = sorted(
            file
            for end in TOKEN_SUFFIXES
            for file in path.glob(f"*{split}*{end}")
            if file.is_file()
        )
        if not single.exists() and not shards:
            raise DataError(f"{single} does not exist; make it with `python -m gpt2fast.prepare`")
        return [single] if single.exists() else shards
    pattern = str(path)
    if split == "val" and "train" in path.name:
        pattern = str(path.with_name("val".join(path.name.rsplit("train", 1))))
    elif split == "val":
        raise DataError(
            f"{path} does not tell where the validation tokens are: call the files "
            "…train….bin and …val….bin (or .npy), or put train.bin and val.bin in a folder"
        )
    if Path(pattern).exists():
        return [Path(pattern)]
    found = sorted(map(Path, glob.glob(pattern)))
    if not found:
        made = "no file fits that name" if is_pattern(path) else "it does not exist"
        raise DataError(f"{pattern}: {made}; give a folder or a pattern of token files")
    return found


def is_pattern(path: Path | str) -> bool:
    """`path` is a pattern of token files, and no file or folder as it stands."""
    name = str(path)
    return glob.has_magic(name) and name.endswith(TOKEN_SUFFIXES) and not Path(path).exists()


def _read_header(path: Path) -> tuple[str, int, int] | None:
    """dtype, number of tokens and bytes before them, or None for a file without a header."""
    with open_file(path) as file:
        start = file.read(12)
    if start.startswith(NPY_MAGIC):
        return _read_npy_header(path)
    if len(start) < 12 or struct.unpack("<i", start[:4])[0] != MAGIC:
        return None
    _, version, count = struct.unpack("<3i", start)
    if version not in DTYPE_OF_VERSION:
        known = " and ".join(f"{v} ({dtype})" for v, dtype in DTYPE_OF_VERSION.items())
        raise DataError(
            f"{path}: version {version} of llm.c's token files is not known, only {known}; "
            "write the file again in one of these"
        )
    if count < 0:
        raise DataError(f"{path}: the header tells of {count} tokens; the file is damaged")
    return DTYPE_OF_VERSION[version], count, HEADER_BYTES


def _read_npy_header(path: Path) -> tuple[str, int, int]:
    with open_file(path) as file:
        start = file.read(8)
        size = file.read(2 if start[6:7] == b"\1" else 4)
        length = int.from_bytes(size, "little")
        told = file.read(min(length, _LONGEST_NPY_HEADER))
        skipped = len(start) + len(size) + length
    found = _NPY_HEADER.fullmatch(told)
    if found is None:
        raise DataError(
            f"{path}: its header is damaged, or not that of a plain array; save it again"
        )
    stored, _, sizes = found.groups()
    shape = [int(size) for size in sizes.split(b",") if size.strip()]
    dtype = _NPY_TYPES.get(stored)
    if dtype is None or len(shape) != 1:
        kind = stored.decode()
        raise DataError(
            f"{path} is an array of the shape {tuple(shape)} and of NumPy's type {kind}; tokens "
            f"are one sequence of {', '.join(_SIGNED)}, in little-endian order: save them as such"
        )
    return dtype, shape[0], skipped
