"""From the `data` setting to a prepared folder: find it, and prepare plain text on the way."""

from __future__ import annotations

import os
from pathlib import Path

from ..errors import ConfigError, DataError
from .config import TrainConfig

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
    if (path / "meta.json").is_file() or (path / "train.bin").is_file():
        return path
    tokenizer = config.tokenizer or config.init_from or "char"
    if config.vocab_size is not None and tokenizer != "bpe":
        raise ConfigError(
            f"vocab_size is {config.vocab_size}, but the size of tokenizer {tokenizer!r} is given; "
            "set vocab_size to null, or --tokenizer bpe"
        )
    from ..data import prepare_data

    print(f"preparing {path} in {made_here}", flush=True)
    prepare_data(
        [path],
        made_here,
        overwrite=True,
        tokenizer=tokenizer,
        split=config.split,
        val_fraction=config.val_fraction,
        vocab_size=config.vocab_size or 2048,
    )
    return made_here
