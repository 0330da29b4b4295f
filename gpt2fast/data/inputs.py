"""From what a user names to the sources to read: files, folders, `-`, corpora with weights."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from ..errors import DataError
from .sources import (
    JSON_LINES_SUFFIXES,
    PARQUET_SUFFIX,
    RECORD_SUFFIXES,
    JsonLines,
    Parquet,
    Source,
    TextFile,
)

TEXT_SUFFIXES = (".txt", ".md")
OUTPUT_MARKS = ("meta.json", "config.json", "tokenizer.json")
"""A folder that holds one of these is prepared data, a model or a tokenizer, not text."""


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
) -> tuple[list[Source | None], list[int]]:
    """The sources to read, in order, and the corpus (0, 1, …) that each belongs to.

    None stands for standard input.
    """
    sources: list[Source | None] = []
    corpus_of: list[int] = []
    items: Iterable[str | Path] = [inputs] if isinstance(inputs, (str, Path)) else inputs
    for number, item in enumerate(items):
        for path in _files(Path(item), out_dir):
            sources.append(_source(path, field, lines))
            corpus_of.append(number if isinstance(inputs, Mapping) else 0)
    if not sources:
        raise DataError("no input was given; name a text file, a folder, or - for standard input")
    if sources.count(None) > 1:
        raise DataError("standard input (-) was given more than once")
    return sources, corpus_of


def _source(path: Path, field: str, lines: bool) -> Source | None:
    name = path.name.lower()
    if path == Path("-"):
        return None
    if name.endswith(JSON_LINES_SUFFIXES):
        return JsonLines(path, field, lines)
    if name.endswith(PARQUET_SUFFIX):
        return Parquet(path, field, lines)
    return TextFile(path)


def _files(path: Path, out_dir: Path) -> list[Path]:
    if path == Path("-") or path.is_file():
        return [path]
    if path.is_dir():
        files = _files_below(path, out_dir)
        if not files:
            known = ", ".join((*TEXT_SUFFIXES, *RECORD_SUFFIXES[:-1]))
            raise DataError(
                f"{path} holds no {known} or {RECORD_SUFFIXES[-1]} files (in folders without "
                f"{', '.join(OUTPUT_MARKS[:-1])} or {OUTPUT_MARKS[-1]}, which hold data or "
                "models, not text); name the text file"
            )
        return files
    if path.exists():
        raise DataError(f"{path} is neither a file nor a folder; pipe it in and give - instead")
    raise DataError(f"{path} does not exist")


def _files_below(folder: Path, out_dir: Path) -> list[Path]:
    """Text files below `folder`, sorted, or its records where it holds no text file.

    Nothing hidden, and nothing that this package wrote.
    """
    files: list[Path] = []
    for directory, folders, names in os.walk(folder):
        here = Path(directory)
        folders[:] = [
            name
            for name in folders
            if not name.startswith(".") and (here / name).resolve() != out_dir.resolve()
        ]
        if not any(mark in names for mark in OUTPUT_MARKS):
            files += [here / name for name in names if not name.startswith(".")]
    for suffixes in (TEXT_SUFFIXES, RECORD_SUFFIXES):
        found = sorted(path for path in files if path.name.lower().endswith(suffixes))
        if found:
            return found
    return []
