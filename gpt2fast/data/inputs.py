"""From what a user names to the sources to read: files, folders, `-`, corpora with weights."""

from __future__ import annotations

import math
import os
import warnings
from codecs import BOM_UTF8
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from ..errors import DataError
from ..files import open_file
from .encodings import known_encoding
from .kinds import PARQUET, begins_with_json_objects
from .opening import COMPRESSED_SUFFIXES, TextInput
from .sources import DelimitedText, JsonArray, JsonLines, Parquet, Source, TextFile

TEXT_SUFFIXES = (".txt", ".md")
RECORD_SUFFIXES = (".jsonl", ".ndjson", ".parquet")
TABLE_SUFFIXES = (".csv", ".tsv", ".json")
OUTPUT_MARKS = ("meta.json", "config.json", "tokenizer.json")
"""A folder that holds one of these is prepared data, a model or a tokenizer, not text."""
_LONGEST_SNIFFED = 1 << 20


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

    None stands for standard input. `notify` is told of files that are copies. Raises DataError
    where there is no source, where one is no text, and where a file is named twice.
    """
    encoding = known_encoding(encoding)
    sources: list[Source | None] = []
    corpus_of: list[int] = []
    items: Iterable[str | Path] = [inputs] if isinstance(inputs, (str, Path)) else inputs
    for number, item in enumerate(items):
        for path in _files(Path(item), out_dir):
            sources.append(None if path == Path("-") else file_source(path, field, lines, encoding))
            corpus_of.append(number if isinstance(inputs, Mapping) else 0)
    if not sources:
        raise DataError("no input was given; name a text file, a folder, or - for standard input")
    if sources.count(None) > 1:
        raise DataError("standard input (-) was given more than once")
    _check_copies([source for source in sources if source is not None], notify)
    return sources, corpus_of


def file_source(
    path: Path, field: str, lines: bool, encoding: str | None, name: str | None = None
) -> Source:
    """The source that a file is: by its name, whether or not it is compressed, else by how it
    begins.

    Args:
        path: the file.
        field: of its records, that holds the text.
        lines: its records are the lines of one text.
        encoding: as `known_encoding` gives it.
        name: what it is called; None means the file's own name. A file with another name than
            its own has no suffix that tells what it is.
    """
    plain = "" if name else uncompressed_name(path)
    if plain.endswith((".jsonl", ".ndjson")):
        return JsonLines(path, field, lines, encoding, name)
    if plain.endswith((".csv", ".tsv")):
        return DelimitedText(path, field, lines, encoding, name)
    if plain.endswith(TEXT_SUFFIXES):
        return TextFile(path, encoding, name)
    with open_file(path) as raw:
        if raw.read(len(PARQUET)) == PARQUET or plain.endswith(".parquet"):
            return Parquet(path, field, lines)
    with TextInput(path, encoding).open() as file:
        beginning = file.readline(_LONGEST_SNIFFED) + file.readline(_LONGEST_SNIFFED)
    if begins_with_json_objects(beginning):
        return JsonLines(path, field, lines, encoding, name)
    if plain.endswith(".json") and beginning.lstrip(BOM_UTF8 + b" \n\r\t").startswith(b"["):
        return JsonArray(path, field, lines, encoding, name)
    if plain.endswith(".json"):
        raise DataError(
            f"{path} is neither an array of objects nor one object a line; `jq -c '.records[]' "
            "FILE > records.jsonl` makes that of an array within an object"
        )
    return TextFile(path, encoding, name)


def uncompressed_name(path: Path) -> str:
    """The name of a file in small letters, without the suffix that says how it is compressed."""
    name = path.name.lower()
    suffix = next((end for end in COMPRESSED_SUFFIXES if name.endswith(end)), "")
    return name.removesuffix(suffix)


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


def _files(path: Path, out_dir: Path) -> list[Path]:
    if path == Path("-") or path.is_file():
        return [path]
    if path.is_dir():
        files = _files_below(path, out_dir)
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


def _files_below(folder: Path, out_dir: Path) -> list[Path]:
    """Text files below `folder`, sorted, or its records where it holds no text file, or its tables
    where it holds neither; compressed or not.

    Nothing hidden, nothing that this package wrote, and regular files only.
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
    for suffixes in (TEXT_SUFFIXES, RECORD_SUFFIXES, TABLE_SUFFIXES):
        named = (path for path in files if uncompressed_name(path).endswith(suffixes))
        if found := sorted(path for path in named if path.is_file()):
            return found
    return []
