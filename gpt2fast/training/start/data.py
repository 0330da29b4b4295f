"""The data that a run's settings name: find them, and prepare text."""

from __future__ import annotations

import functools
import logging
import os
import shlex
from contextlib import suppress
from glob import glob
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..._system.output import tell, warn
from ...checkpoints.run_folder import DATA, is_run
from ...errors import ConfigError, DataError, Error, MissingTokenizerError, why_not_written
from ..config import DATA_SETTINGS, TrainConfig

if TYPE_CHECKING:
    from ...data import DataMeta

_log = logging.getLogger(__name__)

KNOWN_TEXTS = {
    "tinyshakespeare.txt": (
        "the file input.txt of https://github.com/karpathy/char-rnn/tree/master/data/"
        "tinyshakespeare (1.1 MB)"
    ),
}
"""Texts that shipped recipes are made for, and where to download them."""


def locate(data: str | None) -> Path:
    """The file or folder called `data`, or the pattern, here or in $GPT2FAST_DATA."""
    if not data:
        raise ConfigError(
            "data is not set: name a text file, a folder of text files, or a folder made by "
            "python -m gpt2fast.prepare, with --data PATH (or --dataset NAME)"
        )
    path = Path(data).expanduser()
    if _is_there(path):
        return path.resolve()
    shared = os.environ.get("GPT2FAST_DATA")
    if shared and not path.is_absolute() and _is_there(Path(shared) / path):
        return (Path(shared) / path).resolve()
    where = f"here, nor in $GPT2FAST_DATA ({shared})" if shared else "here"
    known = KNOWN_TEXTS.get(path.name)
    way_out = f" It is {known}: download it, then add" if known else " Name it with"
    raise DataError(f"data {data!r} was not found {where}.{way_out} --data PATH")


def located(config: TrainConfig) -> dict[str, Any]:
    """The settings that name data, with whole paths: they hold in any folder.

    A path is left as it was given where a recipe cannot hold the whole one.
    """
    values: dict[str, Any] = {}
    with suppress(Error):
        if config.data is not None:
            values["data"] = str(locate(config.data))
        elif config.mixture is not None:
            values["mixture"] = {str(locate(name)): w for name, w in config.mixture.items()}
        elif config.dataset is not None and Path(config.dataset).expanduser().exists():
            values["dataset"] = str(Path(config.dataset).expanduser().resolve())
    paths = [
        path for value in values.values() for path in ([value] if isinstance(value, str) else value)
    ]
    return {} if any(map(why_not_written, paths)) else values


def source_of(config: TrainConfig) -> dict[str, Any]:
    """The settings that say which text is prepared in OUT/data, and how; whole paths."""
    return {**{name: getattr(config, name) for name in DATA_SETTINGS}, **located(config)}


def prepared_data(config: TrainConfig, *, resuming: bool) -> Path | dict[str, float]:
    """The prepared data for `config`: a folder, or folders and their weights.

    Text and data sets are prepared in OUT/data (a resumed run finds them there already).
    """
    made_here = Path(config.out) / DATA
    if resuming and (made_here / "meta.json").is_file():
        return made_here
    if config.dataset is not None:
        return _prepared(config, made_here, (), f"data set {config.dataset}")
    if config.mixture is not None:
        return _prepared_mixture(config, config.mixture, made_here, resuming)
    path = locate(config.data)
    if _holds_tokens(path):
        _check_prepared(config, path, resuming)
        return path
    _refuse_run(path)
    return _prepared(config, made_here, [path], str(path))


def _prepared_mixture(
    config: TrainConfig, mixture: dict[str, float], made_here: Path, resuming: bool
) -> Path | dict[str, float]:
    weights = {str(locate(name)): weight for name, weight in mixture.items()}
    if len(weights) < len(mixture):
        raise ConfigError("two names of the mixture are the same file; give it one weight")
    ready = [name for name in weights if _holds_tokens(Path(name))]
    if len(ready) == len(weights):
        for name in ready:
            _check_prepared(config, Path(name), resuming)
        return weights
    if ready:
        text = next(name for name in weights if name not in ready)
        raise DataError(
            f"the mixture has prepared data ({ready[0]}) and text ({text}); prepare the text with "
            f"the same tokenizer first: python -m gpt2fast.prepare {shlex.quote(text)} --tokenizer "
            f"{shlex.quote(ready[0])}"
        )
    for name in weights:
        _refuse_run(Path(name))
    return _prepared(config, made_here, weights, f"{len(weights)} corpora")


def _prepared(config: TrainConfig, out: Path, inputs: Any, what: str) -> Path:
    tokenizer = config.tokenizer or config.init_from or "char"
    if config.vocab_size is not None and tokenizer != "bpe":
        raise ConfigError(
            f"vocab_size is {config.vocab_size}, but the size of tokenizer {tokenizer!r} is given; "
            "set vocab_size to null, or --tokenizer bpe"
        )
    from ...data.encoders import available_cores
    from ...data.meta import DEFAULT_VOCAB_SIZE
    from ...data.prepare import prepare_data
    from ...data.working_folder import OtherRunError

    tell(_log, f"preparing {what} in {out}")
    prepare = functools.partial(
        prepare_data,
        inputs,
        out,
        tokenizer=tokenizer,
        split=config.split,
        val_fraction=config.val_fraction,
        vocab_size=config.vocab_size or DEFAULT_VOCAB_SIZE,
        dataset=config.dataset,
        dataset_config=config.dataset_config,
        text_field=config.text_field,
        records=config.records,
        notify=functools.partial(warn, _log),
        add_tokens=config.add_tokens or (),
        workers=available_cores(),
    )
    begun = (out / ".unfinished" / "run.json").exists()
    try:
        try:
            prepare(overwrite=not begun)
        except OtherRunError:
            prepare(overwrite=True)
    except MissingTokenizerError as error:
        if tokenizer != config.init_from:
            raise
        raise ConfigError(
            f"{tokenizer} has no tokenizer beside it ({error}); put it there, or name it with "
            "--tokenizer: gpt2 for OpenAI's, or a folder"
        ) from None
    return out


def _is_there(path: Path) -> bool:
    from ...data.tokens import is_pattern

    return path.exists() or (is_pattern(path) and bool(glob(str(path))))


def _holds_tokens(path: Path) -> bool:
    """Prepared data, or token files of other projects."""
    from ...data.tokens import TOKEN_SUFFIXES

    if not path.is_dir():
        # A path that does not exist is a pattern.
        return not path.exists() or path.suffix in TOKEN_SUFFIXES
    if (path / "meta.json").is_file() or (path / "train.bin").exists():
        return True
    return any(
        any(path.glob(f"*train*{end}")) and any(path.glob(f"*val*{end}")) for end in TOKEN_SUFFIXES
    )


def _check_prepared(config: TrainConfig, path: Path, resuming: bool) -> None:
    # In a resumed run the checkpoint tells whether the data are the same.
    if resuming:
        return
    if (path / "meta.json").is_file():
        _check_agreement(config, path)
    elif config.add_tokens is not None:
        raise ConfigError(
            f"add_tokens is {config.add_tokens!r}, but {path} holds token files: drop the setting, "
            "or name the text that they were made of"
        )


def _refuse_run(path: Path) -> None:
    """Raise DataError if this is the folder of a training run."""
    if not is_run(path):
        return
    run = shlex.quote(str(path))
    raise DataError(
        f"{path} is the folder of a training run, not data; continue that run with --resume {run}, "
        f"start from its weights with --init-from {run}, or name a text or prepared data with "
        "--data PATH"
    )


def _check_agreement(config: TrainConfig, directory: Path) -> None:
    """Settings for text that contradict how the data were prepared are a mistake."""
    from ...data.meta import read_meta

    meta = read_meta(directory / "meta.json")
    for name in ("split", "val_fraction"):
        _require_agreement(name, getattr(config, name), (getattr(meta, name),), directory)
    _check_tokenizer(config.tokenizer, meta, directory)
    known = (meta.vocab_size, meta.asked_vocab_size)
    _require_agreement("vocab_size", config.vocab_size, known, directory)
    _check_added(config.add_tokens, directory)


def _check_added(asked: list[str] | None, directory: Path) -> None:
    if asked is None:
        return
    from ...tokenizer import Tokenizer

    added = Tokenizer.from_pretrained(directory, local_files_only=True).added_tokens
    there = [token.content for token in added]
    if not set(asked) <= set(there):
        _require_agreement("add_tokens", asked, (there,), directory)


def _check_tokenizer(asked: str | None, meta: DataMeta, directory: Path) -> None:
    if asked in (None, "char", "bpe") or meta.tokenizer_fingerprint is None:
        _require_agreement("tokenizer", asked, (meta.tokenizer,), directory)
        return
    from ...tokenizer import Tokenizer

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
