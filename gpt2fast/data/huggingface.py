"""Data sets of the Hugging Face hub and folders of the `datasets` library, as sources of text."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..errors import DataError, reason_of
from .records import missing
from .sources import Source
from .tabular import Table

VALIDATION_NAMES = ("validation", "valid", "val", "dev")
LINES_NOT_DOCUMENTS = ("wikitext",)
"""Data sets (by the last part of their name) whose rows are the lines of one text."""
_ROWS_AT_ONCE = 64


class Rows(Table):
    """The text column of one split."""

    def __init__(self, rows: Any, identity: str, field: str, lines: bool) -> None:
        self.name = self.identity = identity
        self.read_as(field, lines)
        if field not in rows.column_names:
            raise DataError(f"{identity}: {missing(field, rows.column_names)}")
        self._rows = rows.select_columns([field])
        self.rows = len(rows)
        self.size = rows.data.nbytes

    def column(self, start: int) -> Iterator[Any]:
        for first in range(start, self.rows, _ROWS_AT_ONCE):
            yield from self._rows[first : first + _ROWS_AT_ONCE][self.field]

    def signature(self) -> dict[str, Any]:
        digest = hashlib.sha256()
        for first in (0, max(0, self.rows - _ROWS_AT_ONCE)):
            digest.update(repr(self._rows[first : first + _ROWS_AT_ONCE]).encode())
        return {"size": self.rows, "sha256_of_ends": digest.hexdigest()}


def open_dataset(
    name: str, config: str | None, field: str, records: str | None
) -> tuple[Source, Source | None]:
    """The training split of a data set, and its validation split if it has one.

    name: on the hub, or a folder that `load_dataset` or `load_from_disk` reads.
    records: "documents" or "lines"; None for what is usual with this data set.

    Raises DataError where the library is missing, the data set cannot be had (without a network,
    say), or it has neither a split called train nor only one.
    """
    splits = _load(name, config)
    if records is None:
        records = "lines" if Path(name).name in LINES_NOT_DOCUMENTS else "documents"
    called = name if config is None else f"{name}/{config}"
    train = "train" if "train" in splits else next(iter(splits))
    if train != "train" and len(splits) > 1:
        raise DataError(
            f"data set {called} has no split called train, only {', '.join(splits)}; save the "
            "one to train on with save_to_disk and name that folder"
        )
    validation = next((split for split in VALIDATION_NAMES if split in splits), None)
    lines = records == "lines"
    training = Rows(splits[train], f"{called}/{train}", field, lines)
    if validation is None:
        return training, None
    return training, Rows(splits[validation], f"{called}/{validation}", field, lines)


@contextmanager
def silent_attempts() -> Iterator[None]:
    """Keep the hub's library from telling of each of its attempts where there is no network."""
    log = logging.getLogger("huggingface_hub")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)


def _load(name: str, config: str | None) -> dict[str, Any]:
    """The splits of a data set by name; its tables stay on the disk."""
    try:
        import datasets
    except ImportError:
        raise DataError(
            f"--dataset {name} needs the package datasets: "
            'pip install "gpt2fast[datasets]", or give a text file with --data'
        ) from None
    path = Path(name).expanduser()
    saved = [path / mark for mark in ("dataset_dict.json", "state.json")]
    try:
        if any(mark.is_file() for mark in saved):
            if config is not None:
                raise DataError(
                    f"{name} is a saved data set, without configurations; drop {config!r}"
                )
            found = datasets.load_from_disk(str(path))
        else:
            with silent_attempts():
                found = datasets.load_dataset(str(path) if path.exists() else name, config)
    except DataError:
        raise
    except Exception as error:  # whatever the library and the network come up with
        called = name if config is None else f"{name} ({config})"
        raise DataError(
            f"data set {called} could not be loaded: {reason_of(error)}. Without a network, name a "
            "folder made with save_to_disk, or a text, .jsonl or .parquet file with --data"
        ) from None
    return {"train": found} if isinstance(found, datasets.Dataset) else dict(found)
