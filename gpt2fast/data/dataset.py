"""Windows of tokens, and batches of them: random, epoch by epoch, or in order."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset

from ..errors import DataError
from .meta import ITEM_SIZE, META, read_meta
from .order import ORDERS, EpochOrder, RandomOrder, Turns
from .tokens import Tokens, is_pattern, open_tokens

Batch = tuple[Tensor, Tensor]
"""input_ids and targets, both (B, T) int64; targets[:, t] is the token after input_ids[:, t]."""

SPLITS = ("train", "val")
SAMPLINGS = ("random", "epoch")


class TokenDataset(Dataset[Batch]):
    """Windows of `block_size` tokens over a token file, for `torch.utils.data.DataLoader`.

    Item i is the window that starts at token i: (input_ids, targets), each (block_size,) int64,
    targets one token further on. There are `tokens - block_size` items.

    Args:
        path: a directory of prepared data or of shards, a .bin file, or a pattern such as
            `fineweb_train_*.bin` (shards are read as one sequence, in the order of their names).
            Files are raw little-endian tokens, as nanoGPT's, or have llm.c's header.
        block_size: tokens in a window.
        split: which files of the directory, "train" or "val"; for a file, what to say of it.
        dtype: of raw files without a meta.json beside them: "uint16" (the default) or "uint32".

    Raises:
        DataError: a file is missing, cut short, or damaged, shards differ in dtype, or all
            together are shorter than block_size + 1 tokens.
    """

    tokens: Tokens

    def __init__(
        self,
        path: str | Path,
        block_size: int,
        split: str = "train",
        dtype: str | None = None,
    ) -> None:
        if split not in SPLITS:
            raise DataError(f"split is {split!r}; choose train or val")
        if dtype not in (None, *ITEM_SIZE):
            raise DataError(f"dtype is {dtype!r}; choose uint16 or uint32")
        path = Path(path)
        if not path.exists() and not is_pattern(path):
            raise DataError(f"{path} does not exist; make it with `python -m gpt2fast.prepare`")
        meta = (path if path.is_dir() else path.parent) / META
        if dtype is None and meta.exists():
            dtype = read_meta(meta).dtype
        # A file is what it is, whatever the split.
        self._take(open_tokens(path, "train" if path.is_file() else split, dtype), block_size)

    @classmethod
    def of(cls, tokens: Tokens, block_size: int) -> TokenDataset:
        """Windows of `block_size` over `tokens` that are open already."""
        dataset = cls.__new__(cls)
        dataset._take(tokens, block_size)
        return dataset

    def _take(self, tokens: Tokens, block_size: int) -> None:
        if block_size < 1:
            raise DataError(f"block_size is {block_size}; it must be at least 1")
        self.block_size = block_size
        self.tokens = tokens
        if tokens.count <= block_size:
            raise DataError(
                f"{tokens.path} holds {tokens.count} tokens, a block_size of {block_size} needs "
                f"at least {block_size + 1}; give a smaller block size or more text"
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


class TrainingBatches:
    """An endless sequence of batches; batch s depends on the seed and s alone.

    The windows of the run have numbers, and batch s of B holds windows s * B … (s + 1) * B - 1:
    several small batches are the same windows as a large one.

    datasets: the corpora; `weights` of their windows, one for each.
    sampling: "random" draws each window anywhere, as nanoGPT does; "epoch" takes every window of
        a corpus once before one comes again (see `order.EpochOrder`).
    order: of random windows, see `order.ORDERS`; with 1 they depend on the size of batches.
    """

    def __init__(
        self,
        datasets: Sequence[TokenDataset],
        weights: Sequence[float],
        batch_size: int,
        seed: int,
        sampling: str = "random",
        start_step: int = 0,
        order: int = ORDERS[-1],
    ) -> None:
        self.datasets = datasets
        self.batch_size = batch_size
        self.seed = seed
        self.start_step = start_step
        self._turns = Turns(weights)
        self._by_batch = sampling == "random" and order == 1
        self._orders: list[EpochOrder | RandomOrder] = []
        for corpus, dataset in enumerate(datasets):
            name = f"{seed}:{corpus}"
            self._orders.append(
                EpochOrder(dataset.tokens.count, dataset.block_size, name)
                if sampling == "epoch"
                else RandomOrder(len(dataset), name)
            )

    def __getitem__(self, step: int) -> Batch:
        first = step * self.batch_size
        turns = [self._turns[first + row] for row in range(self.batch_size)]
        generator = self._generator(step) if self._by_batch else None
        places, inputs, targets = [], [], []
        for corpus, dataset in enumerate(self.datasets):
            rows = [row for row, (owner, _) in enumerate(turns) if owner == corpus]
            if not rows:
                continue
            if generator is not None:
                starts = torch.randint(len(dataset), (len(rows),), generator=generator)
            else:
                numbers = [turns[row][1] for row in rows]
                starts = torch.tensor(self._orders[corpus].starts(numbers))
            batch = dataset.windows(starts)
            if len(rows) == self.batch_size:
                return batch
            places += rows
            inputs.append(batch[0])
            targets.append(batch[1])
        back = torch.tensor(places).argsort()
        return torch.cat(inputs)[back], torch.cat(targets)[back]

    def _generator(self, step: int) -> torch.Generator:
        key = hashlib.sha256(f"{self.seed}:{step}".encode()).digest()[:8]
        return torch.Generator().manual_seed(int.from_bytes(key, "little") >> 1)

    def __iter__(self) -> Iterator[Batch]:
        step = self.start_step
        while True:
            yield self[step]
            step += 1


class OrderedBatches(Sequence[Batch]):
    """Every token of a split once as a target, but for the first: windows in order.

    Of several corpora the batches are interleaved evenly, so that the first of them are a fair
    sample of all.
    """

    def __init__(self, datasets: Sequence[TokenDataset], batch_size: int) -> None:
        self.datasets = datasets
        self.batch_size = batch_size
        self.predicted = sum(dataset.tokens.count - 1 for dataset in datasets)
        """Targets in all."""
        counts = [self._count(dataset) for dataset in datasets]
        self._length = sum(counts)
        self._places: list[tuple[int, int]] | None = None
        if len(datasets) > 1:
            places = [(corpus, i) for corpus, count in enumerate(counts) for i in range(count)]
            self._places = sorted(places, key=lambda at: ((at[1] + 0.5) / counts[at[0]], at[0]))

    def _count(self, dataset: TokenDataset) -> int:
        whole, rest = divmod(dataset.tokens.count - 1, dataset.block_size)
        return math.ceil(whole / self.batch_size) + bool(rest)

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Batch:  # type: ignore[override]  # no slices
        if not -len(self) <= index < len(self):
            raise IndexError(f"batch {index} of {len(self)}")
        index %= len(self)
        corpus, index = (0, index) if self._places is None else self._places[index]
        dataset = self.datasets[corpus]
        block_size = dataset.block_size
        whole, rest = divmod(dataset.tokens.count - 1, block_size)
        first = index * self.batch_size
        if first < whole:
            last = min(first + self.batch_size, whole)
            return dataset.windows(torch.arange(first, last) * block_size)
        start = whole * block_size
        tokens = dataset.tokens.slice(start, start + rest + 1)[None]
        return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
