"""From names on a command line to sources: files, folders, `-`, corpora with weights."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from ..config import CONFIG_FILE
from ..errors import DataError
from ..tokenizer.saving import TOKENIZER_JSON
from .charsets import known_encoding
from .detection import (
    RECORD_SUFFIXES,
    TABLE_SUFFIXES,
    TEXT_SUFFIXES,
    file_source,
    uncompressed_name,
)
from .meta import META
from .sources import Source

OUTPUT_MARKS = (META, CONFIG_FILE, TOKENIZER_JSON)
"""A folder that holds one of these is prepared data, a model or a tokenizer, not text."""
_ABOUT = (
    *("readme", "license", "licence", "notice", "copying"),
    *("changelog", "contributing", "authors"),
)
"""Files called so are about the data, where there are records."""


def parse_weights(inputs: Sequence[str]) -> list[str] | dict[str, float]:
    """`a.txt=0.7 b.jsonl=0.3` as {"a.txt": 0.7, "b.jsonl": 0.3}; other lists stay as they are.

    What exists as it stands is a name, even with an equals sign and a number in it. Raises
    DataError where only some have a weight, where one comes twice, or where a weight is no number
    above 0.
    """
    weights: dict[str, float] = {}
    for item in inputs:
        name, equals, number = item.rpartition("=")
        if not equals or Path(item).exists():
            continue
        try:
            weight = float(number)
        except ValueError:
            continue
        if name in weights:
            raise DataError(f"{name} is named twice; give it one weight")
        weights[name] = checked_weight(name, weight)
    if weights and len(weights) < len(inputs):
        bare = next(item for item in inputs if item.rpartition("=")[0] not in weights)
        raise DataError(f"{bare} has no weight, but other inputs have; write {bare}=0.5, say")
    return weights or list(inputs)


def checked_weight(name: str, weight: float) -> float:
    """`weight` as a float, if it is one that a corpus can have."""
    if isinstance(weight, bool) or not isinstance(weight, (int, float)):
        raise DataError(f"the weight of {name} is {weight!r}; it must be a number above 0")
    if not (math.isfinite(weight) and weight > 0):
        raise DataError(f"the weight of {name} is {weight}; it must be a finite number above 0")
    return float(weight)


def find_sources(
    inputs: str | Path | Sequence[str | Path] | Mapping[str, float],
    out_dir: Path,
    field: str = "text",
    lines: bool = False,
    encoding: str | None = None,
    notify: Callable[[str], None] = warnings.warn,
) -> tuple[list[Source | None], list[int]]:
    """The sources to read, in order, and the corpus (0, 1, …) that each belongs to.

    None stands for standard input. `notify` is told of files that are copies, that a folder holds
    and that are not read, and that are read as something that their names do not say. Raises
    DataError where there is no source, where one is no text, and where a file is named twice.
    """
    encoding = known_encoding(encoding)
    sources: list[Source | None] = []
    corpus_of: list[int] = []
    items: Iterable[str | Path] = [inputs] if isinstance(inputs, (str, Path)) else inputs
    for number, item in enumerate(items):
        for path in _files(Path(item), out_dir, notify):
            sources.append(
                None
                if path == Path("-")
                else file_source(path, field, lines, encoding, notify=notify)
            )
            corpus_of.append(number if isinstance(inputs, Mapping) else 0)
    if not sources:
        raise DataError("no input was given; name a text file, a folder, or - for standard input")
    if sources.count(None) > 1:
        raise DataError("standard input (-) was given more than once")
    _check_copies([source for source in sources if source is not None], notify)
    return sources, corpus_of


def _check_copies(sources: Sequence[Source], notify: Callable[[str], None]) -> None:
    """Refuse a file that is named twice; tell of copies of a file."""
    first: dict[tuple[int, str], Source] = {}
    for source in sources:
        signature = source.signature()
        other = first.setdefault((signature["size"], signature["sha256_of_ends"]), source)
        if other is source or not source.size:
            continue
        if other.identity == source.identity:
            raise DataError(f"{source.identity} is named twice; name it once")
        notify(
            f"{other.identity} and {source.identity} seem to be copies: text that is held out of "
            "one may be trained on in the other, and the validation loss be too good; leave one out"
        )


def _files(path: Path, out_dir: Path, notify: Callable[[str], None]) -> list[Path]:
    if path == Path("-") or path.is_file():
        return [path]
    if path.is_dir():
        files = _files_below(path, out_dir, notify)
        if not files:
            known = (*TEXT_SUFFIXES, *RECORD_SUFFIXES, *TABLE_SUFFIXES)
            raise DataError(
                f"{path} holds no {', '.join(known[:-1])} or {known[-1]} files (in folders without "
                f"{', '.join(OUTPUT_MARKS[:-1])} or {OUTPUT_MARKS[-1]}, which hold data or "
                "models, not text); name the text file"
            )
        return files
    if path.exists():
        raise DataError(f"{path} is neither a file nor a folder; pipe it in and give - instead")
    raise DataError(f"{path} does not exist")


def _files_below(folder: Path, out_dir: Path, notify: Callable[[str], None]) -> list[Path]:
    """Text files below `folder`, sorted, or its records where it holds no text file (but such as
    README.md), or its tables where it holds neither; compressed or not.

    Nothing hidden, nothing that this package wrote, and regular files only. `notify` is told what
    is left out.
    """
    files: list[Path] = []
    left: list[Path] = []
    for directory, folders, names in os.walk(folder):
        here = Path(directory)
        folders[:] = [
            name
            for name in folders
            if not name.startswith(".") and (here / name).resolve() != out_dir.resolve()
        ]
        left += [here / name for name in folders if (here / name).is_symlink()]
        visible = [here / name for name in names if not name.startswith(".")]
        if any(mark in names for mark in OUTPUT_MARKS):
            left += [path for path in visible if _has(path, TEXT_SUFFIXES + RECORD_SUFFIXES)]
        else:
            files += [path for path in visible if path.is_file()]
    texts, records, tables = (
        sorted(path for path in files if _has(path, suffixes))
        for suffixes in (TEXT_SUFFIXES, RECORD_SUFFIXES, TABLE_SUFFIXES)
    )
    about = all(path.stem.lower().split(".")[0] in _ABOUT for path in texts)
    chosen = ((records or tables) if about else texts) or texts
    read = set(chosen)
    left += [path for path in files if path not in read]
    if chosen and left:
        named = ", ".join(str(path.relative_to(folder)) for path in sorted(left)[:5])
        more = f" and {len(left) - 5} more" if len(left) > 5 else ""
        kinds = ", ".join(sorted({path.suffix.lower() for path in chosen}))
        notify(
            f"{folder}: reading {len(chosen)} files ({kinds}), not {named}{more}; name those that "
            "belong to the text themselves"
        )
    return chosen


def _has(path: Path, suffixes: tuple[str, ...]) -> bool:
    return uncompressed_name(path).endswith(suffixes)
