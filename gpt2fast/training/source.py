"""From the `data` setting to a prepared folder: find it, and prepare plain text on the way."""

from __future__ import annotations

import os
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError, DataError
from ..output import say
from .config import TrainConfig

if TYPE_CHECKING:
    from ..data import DataMeta

KNOWN_TEXTS = {
    "tinyshakespeare.txt": (
        "the file input.txt of https://github.com/karpathy/char-rnn/tree/master/data/"
        "tinyshakespeare (1.1 MB)"
    ),
}
"""Texts that shipped recipes are made for, and where they are commonly had."""


def locate(data: str | None) -> Path:
    """The file or folder called `data`, here or in $GPT2FAST_DATA."""
    if not data:
        raise ConfigError(
            "data is not set: name a text file, a folder of text files, or a folder made by "
            "python -m gpt2fast.prepare, with --data PATH"
        )
    path = Path(data).expanduser()
    if path.exists():
        return path.resolve()
    shared = os.environ.get("GPT2FAST_DATA")
    if shared and not path.is_absolute() and (Path(shared) / path).exists():
        return (Path(shared) / path).resolve()
    where = f"here, nor in $GPT2FAST_DATA ({shared})" if shared else "here"
    known = KNOWN_TEXTS.get(path.name)
    way_out = f" It is {known}: download it, then add" if known else " Name it with"
    raise DataError(f"data {data!r} was not found {where}.{way_out} --data PATH")


def prepared_data(config: TrainConfig, *, resuming: bool) -> Path:
    """Folder with train.bin, val.bin and meta.json for `config.data`; made in OUT/data if it is
    text (a resumed run finds it there already)."""
    made_here = Path(config.out) / "data"
    if resuming and (made_here / "meta.json").is_file():
        return made_here
    path = locate(config.data)
    if (path / "meta.json").is_file():
        if not resuming:  # then the checkpoint tells whether the data are the same
            _check_agreement(config, path)
        return path
    if (path / "train.bin").exists():
        return path
    if (path / "log.csv").is_file() and (path / "config.yaml").is_file():
        _refuse_run(path)
    tokenizer = config.tokenizer or config.init_from or "char"
    if config.vocab_size is not None and tokenizer != "bpe":
        raise ConfigError(
            f"vocab_size is {config.vocab_size}, but the size of tokenizer {tokenizer!r} is given; "
            "set vocab_size to null, or --tokenizer bpe"
        )
    from ..data import prepare_data

    say(f"preparing {path} in {made_here}")
    prepare_data(
        [path],
        made_here,
        overwrite=True,
        tokenizer=tokenizer,
        split=config.split or "position",
        val_fraction=config.val_fraction or 0.1,
        vocab_size=config.vocab_size or 2048,
    )
    return made_here


def _refuse_run(path: Path) -> None:
    run = shlex.quote(str(path))
    raise DataError(
        f"{path} is the folder of a training run, not data; continue that run with --resume {run}, "
        f"start from its weights with --init-from {run}, or name a text or prepared data with "
        "--data PATH"
    )


def _check_agreement(config: TrainConfig, directory: Path) -> None:
    """Settings for text that contradict how the data were prepared are a mistake."""
    from ..data.meta import read_meta

    meta = read_meta(directory / "meta.json")
    for name in ("split", "val_fraction"):
        _require_agreement(name, getattr(config, name), (getattr(meta, name),), directory)
    _check_tokenizer(config.tokenizer, meta, directory)
    known = (meta.vocab_size, meta.asked_vocab_size)
    _require_agreement("vocab_size", config.vocab_size, known, directory)


def _check_tokenizer(asked: str | None, meta: DataMeta, directory: Path) -> None:
    if asked in (None, "char", "bpe") or meta.tokenizer_fingerprint is None:
        _require_agreement("tokenizer", asked, (meta.tokenizer,), directory)
        return
    from ..tokenizer import Tokenizer

    assert asked is not None
    if Tokenizer.from_pretrained(asked).fingerprint() != meta.tokenizer_fingerprint:
        found = f"{meta.tokenizer}, {meta.vocab_size} tokens"
        _require_agreement("tokenizer", asked, (found,), directory)


def _require_agreement(name: str, asked: Any, found: tuple[Any, ...], directory: Path) -> None:
    """`asked` must be None (not given) or in `found`; a None there is not known."""
    known = [value for value in found if value is not None]
    if asked is not None and known and asked not in known:
        raise ConfigError(
            f"{name} is {asked!r}, but {directory} was prepared with {known[-1]!r}: drop the "
            f"setting (--{name.replace('_', '-')} null), or prepare the data again with it"
        )
