"""The corpora of a training run, with weights, checked before the first step."""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError, DataError, TokenizerError
from .dataset import SAMPLINGS, SPLITS, OrderedBatches, TokenDataset, TrainingBatches
from .inputs import checked_weight
from .meta import META, DataMeta, read_meta
from .order import ORDERS
from .tokens import TOKEN_SUFFIXES, TokenRange, is_pattern, token_files

if TYPE_CHECKING:
    from ..config import GPT2Config
    from ..tokenizer import Tokenizer


class DataModule:
    """Training and validation batches of prepared data, of token shards, or of a mixture of them.

    Args:
        data_dir: a directory that `gpt2fast.prepare` wrote; or a directory, file or pattern of
            token files (see `TokenDataset`): nanoGPT's `train.bin` and `val.bin`, or llm.c's shards
            with "train" and "val" in their names. Such files are read as `dtype` where they have no
            header; nanoGPT's `meta.pkl` gives the tokenizer, read without running what is in it.
            A mapping of several of them to weights is a mixture: each batch holds windows of each
            in that proportion.
        block_size, batch_size: T and B of the (B, T) batches.
        seed: chooses the training windows.
        dtype: "uint16" or "uint32", for raw token files without meta.json.
        sampling: "random": each window may begin anywhere, as nanoGPT draws them; "epoch": every
            window once before one comes again (see `order.EpochOrder`).
        notify: gets what is assumed of files without meta.json, in a line.

    Raises:
        DataError: before a first step, and saying what to do: a missing, empty or cut file, a split
            shorter than block_size + 1, token ids beyond the vocabulary, tokenizer files that are
            not those the data were made with, corpora of different tokenizers, weights that are
            none.
    """

    meta: DataMeta
    """Facts about the data; for a mixture, tokens and characters of all corpora together."""
    tokenizer: Tokenizer | None
    """None where the data hold none (nanoGPT's and llm.c's formats)."""

    def __init__(
        self,
        data_dir: str | Path | Mapping[str, float],
        block_size: int,
        batch_size: int,
        seed: int = 0,
        dtype: str | None = None,
        sampling: str = "random",
        notify: Callable[[str], None] = warnings.warn,
    ) -> None:
        self.block_size = block_size
        self.batch_size = batch_size
        self.seed = seed
        self.sampling = sampling
        if batch_size < 1:
            raise DataError(f"batch_size is {batch_size}; it must be at least 1")
        if sampling not in SAMPLINGS:
            raise DataError(f"sampling is {sampling!r}; choose random or epoch")
        weights = data_dir if isinstance(data_dir, Mapping) else {str(data_dir): 1.0}
        if not weights:
            raise DataError("the mixture is empty; name a corpus and its weight")
        folders = [_Folder(Path(path), block_size, dtype, notify) for path in weights]
        self.directory = Path(" and ".join(str(folder.path) for folder in folders))
        self.corpora = [
            corpus
            for folder, weight in zip(folders, weights.values(), strict=True)
            for corpus in folder.corpora(checked_weight(str(folder.path), weight))
        ]
        self.meta = _together([folder.meta for folder in folders], self.directory)
        self.tokenizer = next((f.tokenizer for f in folders if f.tokenizer is not None), None)
        self._folders = folders
        self._scanned: set[int] = set()
        if self.meta.vocab_size is not None:
            self._check_ids(self.meta.vocab_size, "the vocabulary of the data")

    def train_dataloader(self, start_step: int = 0, order: int = ORDERS[-1]) -> TrainingBatches:
        """Endless (B, T) batches of training windows, from a step on; `[s]` gives batch s.

        Batch s depends on `seed` and s alone: a run continued at step s sees what it would have.
        Half the batch size gives the same windows in twice as many batches; not so with `order` 1,
        that of runs begun by older versions.

        Args:
            start_step: the first batch's number.
            order: version of the order of windows.
        """
        return TrainingBatches(
            [corpus.train for corpus in self.corpora],
            [corpus.weight for corpus in self.corpora],
            self.batch_size,
            self.seed,
            self.sampling,
            start_step,
            order,
        )

    def val_dataloader(self) -> OrderedBatches:
        """The validation split in order, in windows that do not overlap; `[i]` gives batch i.

        The targets are all its tokens but the first, each once; so the last batches are smaller:
        (b <= B, T), then one (1, t < T). The corpora of a mixture count by their tokens, not by
        their weights, and their batches are interleaved.
        """
        return OrderedBatches([corpus.val for corpus in self.corpora], self.batch_size)

    def check_model(self, config: GPT2Config) -> None:
        """Raise if a model of this configuration cannot take these batches.

        Raises:
            ConfigError: block_size is too large for it.
            DataError: the data have tokens that it does not know.
        """
        if self.block_size > config.n_positions:
            raise ConfigError(
                f"block_size {self.block_size} is more than the model's n_positions "
                f"{config.n_positions}; choose a smaller block size"
            )
        if self.meta.vocab_size is not None and self.meta.vocab_size > config.vocab_size:
            raise DataError(
                f"{self.directory} has a vocabulary of {self.meta.vocab_size} tokens, the model's "
                f"vocab_size is {config.vocab_size}; prepare the data with the model's tokenizer "
                "(--tokenizer), train a model with the vocabulary of the data, or, where that "
                "only adds tokens, grow the model (resize_token_embeddings)"
            )
        self._check_ids(config.vocab_size, "the model's vocab_size")

    def check_tokenizer(self, tokenizer: Any) -> None:
        """Raise DataError if the data were made with another tokenizer than a model's.

        One with more tokens at its end, and the same ids for all others, is fine.

        Args:
            tokenizer: the model's; transformers' objects are taken as well.
        """
        from ..tokenizer import Tokenizer

        own = Tokenizer.of(tokenizer)
        known = self.meta.tokenizer_fingerprint
        if known is None or own.fingerprint() == known:
            return
        reason = "" if self.tokenizer is None else self.tokenizer.difference(own)
        if reason is not None:
            raise DataError(
                f"{self.directory} was prepared with another tokenizer ({self.meta.tokenizer}, "
                f"{self.meta.vocab_size} tokens) than the model's ({own.vocab_size} tokens)"
                + (f": {reason}" if reason else "")
                + "; prepare the data again with --tokenizer and the model's directory or name "
                "(--add-tokens adds tokens to it)"
            )

    def first_from(self, id: int) -> int | None:
        """The first token that training or validation finds whose id is `id` or more; or None."""
        for dataset in self._datasets():
            if found := dataset.tokens.find_at_least(id):
                return found[1]
        return None

    def _check_ids(self, vocab_size: int, what: str) -> None:
        if any(vocab_size >= scanned for scanned in self._scanned):
            return
        for dataset in self._datasets():
            found = dataset.tokens.find_at_least(vocab_size)
            if found:
                raise DataError(
                    f"{dataset.tokens.path}: token {found[0]} is {found[1]}, outside {what} "
                    f"({vocab_size}); the file belongs to another tokenizer or is not "
                    f"{dataset.tokens.dtype}; prepare the data again"
                )
        self._scanned.add(vocab_size)

    def _datasets(self) -> list[TokenDataset]:
        return [dataset for folder in self._folders for dataset in (folder.train, folder.val)]


@dataclass(frozen=True)
class Corpus:
    """One of the texts that a run trains on, and the weight of its windows."""

    train: TokenDataset
    val: TokenDataset
    weight: float


class _Folder:
    """Prepared data, or token files: what one entry of a mixture names."""

    def __init__(
        self, path: Path, block_size: int, dtype: str | None, notify: Callable[[str], None]
    ) -> None:
        self.path = path
        self.block_size = block_size
        if not path.is_dir() and not is_pattern(path) and path.suffix not in TOKEN_SUFFIXES:
            raise DataError(
                f"{path} is not a directory of prepared data; make one with "
                f"`python -m gpt2fast.prepare TEXT --out {path}`"
            )
        described = (path / META).exists()
        if (path / ".unfinished").exists() and not described:
            raise DataError(
                f"{path} holds an interrupted preparation; "
                "finish it by giving its `python -m gpt2fast.prepare` command again"
            )
        self.tokenizer: Tokenizer | None = None
        if described:
            self.meta = read_meta(path / META)
            dtype = self.meta.dtype
        if path.is_file():
            self.train = TokenDataset(path, block_size, "train", dtype)
            self.val = TokenDataset(token_files(path, "val")[0], block_size, "val", dtype)
        else:
            self.train, self.val = (TokenDataset(path, block_size, s, dtype) for s in SPLITS)
        if described:
            self._check_counts()
            self.tokenizer = self._load_tokenizer()
        else:
            self.tokenizer = self._nanogpt_tokenizer(notify)
            self.meta = self._assumed_meta()
            whose = "an unknown tokenizer" if self.tokenizer is None else "meta.pkl's characters"
            notify(
                f"{path} has no meta.json: its files are read as llm.c's, nanoGPT's or NumPy's, "
                f"{self.meta.dtype} tokens of {whose}"
            )

    def corpora(self, weight: float) -> list[Corpus]:
        """The corpora that it holds; their weights add up to `weight`."""
        if self.meta.corpora is None:
            return [Corpus(self.train, self.val, weight)]
        total = math.fsum(told["weight"] for told in self.meta.corpora)
        found = []
        begins = {split: 0 for split in SPLITS}
        for told in self.meta.corpora:
            parts = {}
            for split, whole in (("train", self.train), ("val", self.val)):
                count = told[f"{split}_tokens"]
                if count <= self.block_size:
                    raise DataError(
                        f"{self.path}: the {split} part of {told['name']} has {count} tokens, a "
                        f"block_size of {self.block_size} needs at least {self.block_size + 1}; "
                        "give a smaller block size, more of that text, or leave it out"
                    )
                part = TokenRange(whole.tokens, begins[split], count)
                parts[split] = TokenDataset.of(part, self.block_size)
                begins[split] += count
            found.append(Corpus(parts["train"], parts["val"], weight * told["weight"] / total))
        return found

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
            tokenizer = Tokenizer.from_pretrained(str(self.path), local_files_only=True)
        except TokenizerError as error:
            raise DataError(f"the tokenizer of the data: {error}") from error
        if tokenizer.fingerprint() != self.meta.tokenizer_fingerprint:
            raise DataError(
                f"the tokenizer files in {self.path} are not those that the data were made "
                "with; put the right ones back or prepare the data again"
            )
        return tokenizer

    def _nanogpt_tokenizer(self, notify: Callable[[str], None]) -> Tokenizer | None:
        from ..tokenizer.nanogpt import NAME, load_nanogpt

        path = (self.path if self.path.is_dir() else self.path.parent) / NAME
        if not path.is_file():
            return None
        try:
            return load_nanogpt(path)
        except TokenizerError as error:
            notify(f"trained without a tokenizer: {error}")
            return None

    def _assumed_meta(self) -> DataMeta:
        train, val = self.train.tokens, self.val.tokens
        if train.dtype != val.dtype:
            raise DataError(
                f"{train.path} holds {train.dtype} tokens and {val.path} {val.dtype} tokens; both "
                "splits must have one type"
            )
        tokenizer = self.tokenizer
        is_char = tokenizer is not None  # a token for each character
        return DataMeta(
            dtype=train.dtype,
            vocab_size=None if tokenizer is None else tokenizer.vocab_size,
            train_tokens=train.count,
            val_tokens=val.count,
            train_characters=train.count if is_char else None,
            val_characters=val.count if is_char else None,
            tokenizer="char" if is_char else None,
            tokenizer_fingerprint=None if tokenizer is None else tokenizer.fingerprint(),
            eos_token_id=None,
            split=None,
        )


def _together(metas: list[DataMeta], where: Path) -> DataMeta:
    """The common facts of a mixture's corpora, and their sums."""
    if len(metas) == 1:
        return metas[0]
    known = [meta for meta in metas if meta.tokenizer_fingerprint is not None]
    if len({meta.tokenizer_fingerprint for meta in known}) > 1:
        kinds = ", ".join(f"{meta.tokenizer} of {meta.vocab_size} tokens" for meta in known)
        raise DataError(
            f"{where} were prepared with different tokenizers ({kinds}); prepare them with one "
            "(--tokenizer), or give their texts and weights to one `python -m gpt2fast.prepare`"
        )

    counts: dict[str, Any] = {}
    for name in ("train_tokens", "val_tokens", "train_characters", "val_characters"):
        values = [getattr(meta, name) for meta in metas]
        counts[name] = None if None in values else sum(values)
    return dataclasses.replace(
        (known or metas)[0],
        **counts,
        dtype=max(meta.dtype for meta in metas),
        split=None,
        val_fraction=None,
        seed=None,
        documents=None,
        corpora=None,
        sources=[source for meta in metas for source in meta.sources],
        files=[],
    )
