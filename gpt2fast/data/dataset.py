"""Batches of token windows from prepared data, memory-mapped."""

from __future__ import annotations

import hashlib
import math
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from ..errors import DataError, TokenizerError
from .meta import ITEM_SIZE, DataMeta, read_meta

if TYPE_CHECKING:
    from ..config import GPT2Config
    from ..tokenizer import Tokenizer

Batch = tuple[Tensor, Tensor]
"""input_ids and targets, both (B, T) int64; targets[:, t] is the token after input_ids[:, t]."""

SPLITS = ("train", "val")
_SCAN_ITEMS = 1 << 22


class _TokenFile:
    """A memory-mapped array of unsigned little-endian tokens, read in int64."""

    def __init__(self, path: Path, dtype: str) -> None:
        self.path = path
        self.dtype = dtype
        if path.is_dir():
            raise DataError(f"{path} is a folder, not a file of tokens; prepare the data again")
        try:
            size = path.stat().st_size
        except OSError as error:
            raise DataError(f"{path} cannot be read: {error.strerror}") from None
        if size % ITEM_SIZE[dtype]:
            raise DataError(
                f"{path}: {size} bytes are not a whole number of {dtype} tokens; "
                "the file is cut short or of another type; prepare the data again"
            )
        self.count = size // ITEM_SIZE[dtype]
        if not self.count:
            raise DataError(f"{path} is empty; prepare the data again with more text")
        # Torch can index signed integers only; masking restores the unsigned value.
        signed = torch.int16 if dtype == "uint16" else torch.int32
        self._mask = (1 << 8 * ITEM_SIZE[dtype]) - 1
        self._signed = torch.from_file(str(path), size=self.count, dtype=signed)

    def __getstate__(self) -> tuple[Path, str]:
        return self.path, self.dtype  # a worker process maps the file itself

    def __setstate__(self, state: tuple[Path, str]) -> None:
        self.__init__(*state)  # type: ignore[misc]

    def slice(self, start: int, stop: int) -> Tensor:
        """Tokens start … stop - 1, (stop - start,) int64."""
        return self._signed[start:stop].to(torch.int64).bitwise_and_(self._mask)

    def windows(self, starts: Tensor, length: int) -> Tensor:
        """The `length` tokens from each of `starts` (B,) on, (B, length) int64."""
        # Not indexing: that wakes all threads, tens of milliseconds on a machine that is busy.
        rows = self._signed.unfold(0, length, 1).index_select(0, starts)
        return rows.to(torch.int64).bitwise_and_(self._mask)

    def find_at_least(self, limit: int) -> tuple[int, int] | None:
        """Position and value of the largest token of the first block with one >= limit."""
        for start in range(0, self.count, _SCAN_ITEMS):
            block = self._signed[start : start + _SCAN_ITEMS]
            low, high = (int(value) for value in block.aminmax())
            # Negative numbers are the upper half of the unsigned range.
            if low < 0 or high >= limit:
                tokens = self.slice(start, start + len(block))
                place = int(tokens.argmax())
                if tokens[place] >= limit:
                    return start + place, int(tokens[place])
        return None


class TokenDataset(Dataset[Batch]):
    """Windows of `block_size` tokens over a token file, for `torch.utils.data.DataLoader`.

    Item i is the window that starts at token i: (input_ids, targets), each (block_size,) int64,
    targets one token further on. There are `tokens - block_size` items.

    path: a directory of prepared data, or a .bin file (raw little-endian tokens, as nanoGPT's).
    split: which file of the directory, "train" or "val".
    dtype: of a .bin file without a meta.json beside it: "uint16" (the default) or "uint32".
    Raises DataError if the file is missing, cut short, or shorter than block_size + 1 tokens.
    """

    def __init__(
        self,
        path: str | Path,
        block_size: int,
        split: str = "train",
        dtype: str | None = None,
    ) -> None:
        if split not in SPLITS:
            raise DataError(f"split is {split!r}; choose train or val")
        path = Path(path)
        directory, file = (path, path / f"{split}.bin") if path.is_dir() else (path.parent, path)
        if not file.exists():
            raise DataError(f"{file} does not exist; make it with `python -m gpt2fast.prepare`")
        if dtype is None:
            meta = directory / "meta.json"
            dtype = read_meta(meta).dtype if meta.exists() else "uint16"
        if dtype not in ITEM_SIZE:
            raise DataError(f"dtype is {dtype!r}; choose uint16 or uint32")
        if block_size < 1:
            raise DataError(f"block_size is {block_size}; it must be at least 1")
        self.block_size = block_size
        self.tokens = _TokenFile(file, dtype)
        if self.tokens.count <= block_size:
            raise DataError(
                f"{file} holds {self.tokens.count} tokens, a block_size of {block_size} needs at "
                f"least {block_size + 1}; give a smaller block size or more text"
            )

    def __len__(self) -> int:
        return self.tokens.count - self.block_size

    def __getitem__(self, index: int) -> Batch:
        if not -len(self) <= index < len(self):
            raise IndexError(f"window {index} of {len(self)}")
        start = index % len(self)
        window = self.tokens.slice(start, start + self.block_size + 1)
        return window[:-1], window[1:]

    def windows(self, starts: Tensor) -> Batch:
        """The windows that begin at the tokens `starts` (B,): a batch, (B, block_size) int64."""
        tokens = self.tokens.windows(starts, self.block_size + 1)
        return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


class _RandomBatches:
    """An endless sequence of random batches; batch s depends on the seed and s alone."""

    def __init__(self, dataset: TokenDataset, batch_size: int, seed: int, start_step: int) -> None:
        self.dataset = dataset
        self.batch_size = batch_size
        self.seed = seed
        self.start_step = start_step

    def __getitem__(self, step: int) -> Batch:
        key = hashlib.sha256(f"{self.seed}:{step}".encode()).digest()[:8]
        generator = torch.Generator().manual_seed(int.from_bytes(key, "little") >> 1)
        starts = torch.randint(len(self.dataset), (self.batch_size,), generator=generator)
        return self.dataset.windows(starts)

    def __iter__(self) -> Iterator[Batch]:
        step = self.start_step
        while True:
            yield self[step]
            step += 1


class _OrderedBatches:
    """Every token of a split once as a target, but for the first: windows in order."""

    def __init__(self, dataset: TokenDataset, batch_size: int) -> None:
        self.dataset = dataset
        self.batch_size = batch_size
        self.predicted = dataset.tokens.count - 1
        """Targets in all."""
        self._whole = self.predicted // dataset.block_size
        self._rest = self.predicted % dataset.block_size

    def __len__(self) -> int:
        return math.ceil(self._whole / self.batch_size) + bool(self._rest)

    def __iter__(self) -> Iterator[Batch]:
        block_size = self.dataset.block_size
        for first in range(0, self._whole, self.batch_size):
            last = min(first + self.batch_size, self._whole)
            yield self.dataset.windows(torch.arange(first, last) * block_size)
        if self._rest:
            start = self._whole * block_size
            tokens = self.dataset.tokens.slice(start, start + self._rest + 1)[None]
            yield tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


class DataModule:
    """Training and validation batches of a directory that `gpt2fast.prepare` wrote.

    data_dir: the directory. One in nanoGPT's format (`train.bin` and `val.bin` alone) is read as
        `dtype` with a warning; its `meta.pkl` is not opened, since a pickle can run code.
    block_size, batch_size: T and B of the (B, T) batches.
    seed: chooses the random training windows.
    dtype: "uint16" or "uint32", for a directory without meta.json.

    Everything is checked here, before a first step: a missing, empty or cut file, a split shorter
    than block_size + 1, token ids beyond the vocabulary, tokenizer files that are not those the
    data were made with. Each is a DataError that says what to do.
    """

    meta: DataMeta
    tokenizer: Tokenizer | None
    """None where the directory holds none (nanoGPT's format)."""

    def __init__(
        self,
        data_dir: str | Path,
        block_size: int,
        batch_size: int,
        seed: int = 0,
        dtype: str | None = None,
    ) -> None:
        self.directory = Path(data_dir)
        self.block_size = block_size
        self.batch_size = batch_size
        self.seed = seed
        if batch_size < 1:
            raise DataError(f"batch_size is {batch_size}; it must be at least 1")
        if not self.directory.is_dir():
            raise DataError(
                f"{self.directory} is not a directory of prepared data; make one with "
                f"`python -m gpt2fast.prepare TEXT --out {self.directory}`"
            )
        described = (self.directory / "meta.json").exists()
        if (self.directory / ".unfinished").exists() and not described:
            raise DataError(
                f"{self.directory} holds an interrupted preparation; "
                "finish it by giving its `python -m gpt2fast.prepare` command again"
            )
        if described:
            self.meta = read_meta(self.directory / "meta.json")
            dtype = self.meta.dtype
        datasets = {s: TokenDataset(self.directory, block_size, s, dtype) for s in SPLITS}
        self.train, self.val = datasets["train"], datasets["val"]
        if described:
            self._check_counts()
            self.tokenizer = self._load_tokenizer()
        else:
            self.meta = self._assumed_meta(dtype or "uint16")
            self.tokenizer = None
        self._scanned: set[int] = set()
        if self.meta.vocab_size is not None:
            self._check_ids(self.meta.vocab_size, "the vocabulary of the data")

    def train_dataloader(self, start_step: int = 0) -> _RandomBatches:
        """Endless (B, T) batches of random windows, as nanoGPT draws them, from a step on.

        Batch s depends on `seed` and s alone: a run continued at step s sees what it would have.
        """
        return _RandomBatches(self.train, self.batch_size, self.seed, start_step)

    def val_dataloader(self) -> _OrderedBatches:
        """The validation split in order, in windows that do not overlap.

        The targets are all its tokens but the first, each once; so the last batches are smaller:
        (b <= B, T), then one (1, t < T).
        """
        return _OrderedBatches(self.val, self.batch_size)

    def check_model(self, config: GPT2Config) -> None:
        """Raise DataError if a model of this configuration cannot take these batches."""
        if self.block_size > config.n_positions:
            raise DataError(
                f"block_size {self.block_size} is more than the model's n_positions "
                f"{config.n_positions}; choose a smaller block size"
            )
        if self.meta.vocab_size is not None and self.meta.vocab_size > config.vocab_size:
            raise DataError(
                f"{self.directory} has a vocabulary of {self.meta.vocab_size} tokens, the model's "
                f"vocab_size is {config.vocab_size}; prepare the data with the model's tokenizer "
                "(--tokenizer) or train a model with the vocabulary of the data"
            )
        self._check_ids(config.vocab_size, "the model's vocab_size")

    def check_tokenizer(self, tokenizer: Tokenizer) -> None:
        """Raise DataError if the data were made with another tokenizer."""
        known = self.meta.tokenizer_fingerprint
        if known is not None and tokenizer.fingerprint() != known:
            raise DataError(
                f"{self.directory} was prepared with another tokenizer ({self.meta.tokenizer}, "
                f"{self.meta.vocab_size} tokens) than the model's ({tokenizer.vocab_size} tokens); "
                "prepare the data again with --tokenizer and the model's directory or name"
            )

    def _check_counts(self) -> None:
        for name, dataset in (("train", self.train), ("val", self.val)):
            told = getattr(self.meta, f"{name}_tokens")
            if dataset.tokens.count != told:
                raise DataError(
                    f"{dataset.tokens.path} holds {dataset.tokens.count} tokens, meta.json says "
                    f"{told}; the file is not the one that was prepared; prepare the data again"
                )

    def _load_tokenizer(self) -> Tokenizer:
        from ..tokenizer import Tokenizer

        try:
            tokenizer = Tokenizer.from_pretrained(str(self.directory), local_files_only=True)
        except TokenizerError as error:
            raise DataError(f"the tokenizer of the data: {error}") from error
        if tokenizer.fingerprint() != self.meta.tokenizer_fingerprint:
            raise DataError(
                f"the tokenizer files in {self.directory} are not those that the data were made "
                "with; put the right ones back or prepare the data again"
            )
        return tokenizer

    def _assumed_meta(self, dtype: str) -> DataMeta:
        warnings.warn(
            f"{self.directory} has no meta.json: its files are read as nanoGPT's, {dtype} tokens "
            "of an unknown tokenizer (a meta.pkl is not opened)",
            stacklevel=3,
        )
        unknown: dict[str, Any] = dict.fromkeys(
            (
                "vocab_size",
                "train_characters",
                "val_characters",
                "tokenizer",
                "tokenizer_fingerprint",
                "eos_token_id",
                "split",
            )
        )
        train, val = self.train.tokens.count, self.val.tokens.count
        return DataMeta(dtype=dtype, train_tokens=train, val_tokens=val, **unknown)

    def _check_ids(self, vocab_size: int, what: str) -> None:
        if any(vocab_size >= scanned for scanned in self._scanned):
            return
        for dataset in (self.train, self.val):
            found = dataset.tokens.find_at_least(vocab_size)
            if found:
                raise DataError(
                    f"{dataset.tokens.path}: token {found[0]} is {found[1]}, beyond {what} "
                    f"({vocab_size}); the file belongs to another tokenizer or is not "
                    f"{self.meta.dtype}; prepare the data again"
                )
        self._scanned.add(vocab_size)
