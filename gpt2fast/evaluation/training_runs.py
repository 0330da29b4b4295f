"""The training data of a model, found through the folder of its run: seen text, held-out text."""

from __future__ import annotations

import math
import mmap
import os
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..checkpoints import run_folder
from ..data.meta import read_meta
from ..data.tokens import Tokens, open_tokens, token_files
from ..errors import DataError, Error
from ..tokenizer import Tokenizer
from ..training.logs.runs import LoggedRun, read_runs

_SAMPLES, _SAMPLE_TOKENS = 16, 32
_SEARCHED_BYTES = 1 << 32
"""Searching takes about a second per gigabyte and sample."""
_COUNTED_AT_ONCE = 1 << 24


@dataclass(frozen=True)
class TrainingRun:
    """A run, and the folders of tokens that it was trained on, where they are still there."""

    run: LoggedRun
    data: tuple[Path, ...]

    def seen(self, tokens: Sequence[int], tokenizer: Tokenizer) -> tuple[int, int]:
        """The numbers of samples of a text found in the training data, and of samples searched for.

        Args:
            tokens: ids of the text.
            tokenizer: that made them; data of another one are not searched.
        """
        files = [
            (file, opened.dtype)
            for folder in self.data
            if _made_with(folder, tokenizer)
            for file, opened in _files(folder)
        ]
        size = sum(file.stat().st_size for file, _ in files)
        if not size or len(tokens) < _SAMPLE_TOKENS // 4:
            return 0, 0
        count = max(4, min(_SAMPLES, _SEARCHED_BYTES // size))
        step = max(1, (len(tokens) - _SAMPLE_TOKENS) // count)
        starts = range(0, max(1, len(tokens) - _SAMPLE_TOKENS), step)[:count]
        samples = [tokens[start : start + _SAMPLE_TOKENS] for start in starts]
        left = samples
        for file, dtype in files:
            left = [sample for sample in left if not _holds(file, dtype, sample)]
        return len(samples) - len(left), len(samples)

    def losses(self) -> str:
        """The last losses of the run, for a sentence; empty where none is known."""
        known = [
            f"{self.run.last(column):.4f} {where}"
            for column, where in (("train_loss", "in training"), ("val_loss", "held out"))
            if self.run.last(column) is not None
        ]
        return " and ".join(known)


def training_run(model: str | os.PathLike[str]) -> TrainingRun | None:
    """The training run that `model` is the folder or a checkpoint of; None for other models."""
    path = Path(model)
    for folder in (path, path.parent, *path.parents[1:2]):
        if run_folder.is_run(folder):
            try:
                (run,) = read_runs([folder])
            except Error:
                return None
            return TrainingRun(run, _data_of(run))
    return None


def held_out_text(folder: Path, tokenizer: Tokenizer) -> tuple[str, str]:
    """The held-out part of prepared data, of token files, or of a run's data.

    Args:
        folder: one of these.
        tokenizer: for token files that do not name theirs.

    Returns:
        The place where it was found, and its text.

    Raises:
        DataError: there is no such part, or its tokens cannot be decoded.
    """
    run = training_run(folder)
    folders = (folder,) if run is None else run.data
    if not folders:
        raise DataError(
            f"{folder} is a training run whose data are no longer where they were; name a text "
            "or a folder of prepared data with --data"
        )
    parts = []
    for one in folders:
        if not (one / "meta.json").is_file() and not _holds_tokens(one, "val"):
            raise DataError(
                f"{one} is neither prepared data nor a training run; name one of these, or a text"
            )
        made_with = _tokenizer_of(one) or tokenizer
        tokens = _open(one, "val")
        found = tokens.find_at_least(made_with.vocab_size)
        if found is not None:
            raise DataError(
                f"{tokens.path}: token {found[0]} is {found[1]}, and the tokenizer has "
                f"{made_with.vocab_size}; name the one that made the data with --tokenizer"
            )
        parts.append(made_with.decode(tokens.slice(0, tokens.count).tolist()))
    return " and ".join(str(one) for one in folders), "".join(parts)


def unigram_loss(
    tokens: Sequence[int], tokenizer: Tokenizer, run: TrainingRun | None
) -> tuple[float, str]:
    """Mean loss, in nats, of a unigram model, which knows only how frequent each token is.

    Returns:
        The loss, and where the tokens were counted: in the training data of `run`, with add-one
        smoothing; without such data, in the text itself.
    """
    ids = torch.tensor(tokens)
    size = max(tokenizer.vocab_size, int(ids.max()) + 1)
    counts = torch.zeros(size, dtype=torch.int64)
    for folder in () if run is None else run.data:
        if _made_with(folder, tokenizer):
            counts += _counts(_open(folder, "train"), size)
    where = "in the training data"
    if counts.any():
        counts += 1
    else:
        where = "in this text"
        counts = torch.bincount(ids, minlength=size)
    logprobs = counts.double().log() - math.log(int(counts.sum()))
    return -logprobs[ids].mean().item(), where


def _counts(tokens: Tokens, size: int) -> Tensor:
    counts = torch.zeros(size, dtype=torch.int64)
    for start in range(0, tokens.count, _COUNTED_AT_ONCE):
        part = tokens.slice(start, min(tokens.count, start + _COUNTED_AT_ONCE))
        counts += torch.bincount(part.clamp_(max=size - 1), minlength=size)
    return counts


def _data_of(run: LoggedRun) -> tuple[Path, ...]:
    """The folders of tokens of a run that are still there."""
    made_here = run.folder / run_folder.DATA
    if (made_here / "meta.json").is_file():
        return (made_here,)
    mixture = run.settings.get("mixture")
    named: list[Any] = list(mixture) if isinstance(mixture, dict) else [run.settings.get("data")]
    folders = [Path(name).expanduser() for name in named if isinstance(name, str)]
    if folders and all(_holds_tokens(folder) for folder in folders):
        return tuple(folders)
    return ()


def _holds_tokens(folder: Path, split: str = "train") -> bool:
    try:
        return folder.is_dir() and bool(token_files(folder, split))
    except (DataError, OSError):
        return False


def _open(folder: Path, split: str) -> Tokens:
    meta = folder / "meta.json"
    return open_tokens(folder, split, read_meta(meta).dtype if meta.is_file() else None)


def _files(folder: Path) -> list[tuple[Path, Tokens]]:
    whole = _open(folder, "train")
    return [(file, whole) for file in token_files(folder, "train")]


def _tokenizer_of(folder: Path) -> Tokenizer | None:
    if not (folder / "meta.json").is_file():
        return None
    return Tokenizer.from_pretrained(str(folder), local_files_only=True)


def _made_with(folder: Path, tokenizer: Tokenizer) -> bool:
    """True unless the data say that another tokenizer made them."""
    meta = folder / "meta.json"
    if not meta.is_file():
        return True
    return read_meta(meta).tokenizer_fingerprint in (None, tokenizer.fingerprint())


def _holds(file: Path, dtype: str, sample: Sequence[int]) -> bool:
    code = {"uint16": "H", "uint32": "I", "int32": "i", "uint64": "Q", "int64": "q"}[dtype]
    wanted = array(code, sample)
    if max(sample) >= 1 << 8 * wanted.itemsize - dtype.startswith("int"):
        return False
    with (
        open(file, "rb") as opened,
        mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as data,
    ):
        place = data.find(wanted.tobytes())
        while place >= 0 and place % wanted.itemsize:
            place = data.find(wanted.tobytes(), place + 1)
    return place >= 0
