"""The kind of source that a file is: text, records or a table, by its name or its beginning."""

from __future__ import annotations

import re
import warnings
import zipfile
from codecs import BOM_UTF8
from collections.abc import Callable
from pathlib import Path

from .._system.files import open_file
from ..errors import DataError, shown
from .kinds import PARQUET, begins_with_json_objects, compression_of, quoted, refused
from .opening import COMPRESSED_SUFFIXES, TextInput, members
from .records import JsonArray, JsonLines
from .sources import Source, TextFile, joined_text
from .tabular import DelimitedText, Parquet

TEXT_SUFFIXES = (".txt", ".md")
RECORD_SUFFIXES = (".jsonl", ".ndjson", ".parquet")
TABLE_SUFFIXES = (".csv", ".tsv", ".json")
_LONGEST_SNIFFED = 1 << 20
_DELIMITERS = {".csv": DelimitedText.delimiters, ".tsv": "\t", ".tab": "\t", ".psv": "|"}
_LIST_WITHIN = re.compile(rb'\s*\{\s*"([^"\\]{1,80})"\s*:\s*\[')


def file_source(
    path: Path,
    field: str = "text",
    lines: bool = False,
    encoding: str | None = None,
    name: str | None = None,
    notify: Callable[[str], None] = warnings.warn,
) -> Source:
    """The source that a file is: text, or the `field` of its records.

    Args:
        lines: its records are the lines of one text.
        encoding: as `known_encoding` gives it.
        name: another one than the file's own, which then does not tell its kind.
        notify: told where the name does not say how the file is read.

    Raises:
        DataError: it is no text, or not in the format that its name says.
    """
    called = name or path.name
    plain = "" if name else uncompressed_name(path)
    suffix = Path(plain).suffix
    of_records = (path, field, lines, encoding, name)
    if suffix in (".jsonl", ".ndjson"):
        return JsonLines(*of_records)
    if suffix in _DELIMITERS:
        table = DelimitedText(*of_records)
        table.delimiters = _DELIMITERS[suffix]
        return table
    with open_file(path) as raw:
        if raw.read(len(PARQUET)) == PARQUET or suffix == ".parquet":
            return Parquet(path, field, lines)
    with TextInput(path, encoding).open() as file:
        beginning = file.readline(_LONGEST_SNIFFED) + file.readline(_LONGEST_SNIFFED)
    beginning = beginning.removeprefix(BOM_UTF8)
    if suffix == ".bin":
        raise refused(
            path,
            "a file of tokens or weights by its name",
            "call it .txt if it is text; `python -m gpt2fast.train --data FOLDER` takes a folder "
            "of token files, with train and val in their names",
        )
    objects = begins_with_json_objects(beginning)
    if suffix in TEXT_SUFFIXES:
        if objects and field != "text":
            return JsonLines(*of_records)
        if objects:
            notify(
                f"{called} holds JSON lines, and is read as plain text, which its name says; to "
                "read a field of each line, call it .jsonl"
            )
        return TextFile(path, encoding, name)
    source: Source | None = None
    if objects:
        source, what = JsonLines(*of_records), "JSON lines"
    elif re.match(rb"\s*\[\s*(\{|\Z)", beginning) or (
        suffix == ".json" and beginning.lstrip().startswith(b"[")
    ):
        source, what = JsonArray(*of_records), "a JSON array"
    elif suffix == ".json":
        raise _not_records(path, beginning)
    elif _names_column(beginning, field):
        source, what = DelimitedText(*of_records), "a table"
    if source is None:
        return TextFile(path, encoding, name)
    if suffix != ".json":
        each = "a line of one text" if lines else "a document"
        notify(f"{called} is read as {what}: {shown(field)} of each is {each}")
    return source


def uncompressed_name(path: Path) -> str:
    """The name of a file in small letters, without the suffix that says how it is compressed; of
    a zip archive whose name says nothing else, the name of the file in it."""
    name = path.name.lower()
    suffix = next((end for end in COMPRESSED_SUFFIXES if name.endswith(end)), "")
    name = name.removesuffix(suffix)
    known = (*TEXT_SUFFIXES, *RECORD_SUFFIXES, *TABLE_SUFFIXES, *_DELIMITERS)
    if suffix != ".zip" or name.endswith((".jsonl", ".ndjson", *_DELIMITERS, ".json", ".parquet")):
        return name
    within = _name_in_zip(path)
    return within if within.endswith(known) else name


def read_as_prepared(path: Path) -> str:
    """All the text of a file as training on it sees it: the texts of records, with the
    end-of-text token after each; "\\n" for every kind of newline.

    Raises:
        DataError: as of `file_source`; the file is damaged.
    """
    return joined_text(file_source(path, notify=lambda _: None))


def _name_in_zip(path: Path) -> str:
    try:
        with open_file(path) as raw:
            if compression_of(raw.read(8)) != "zip":
                return ""
            raw.seek(0)
            with zipfile.ZipFile(raw) as archive:
                found = members(archive)
    except (OSError, zipfile.BadZipFile, ValueError, NotImplementedError):
        return ""  # said when it is read
    return found[0].filename.lower() if len(found) == 1 else ""


def _names_column(beginning: bytes, field: str) -> bool:
    """True for a text like a table: its first line names columns, `field` among them."""
    first = beginning.split(b"\n")[0].decode("utf-8", "replace").strip()
    for delimiter in _DELIMITERS[".csv"]:
        names = [name.strip().strip('"') for name in first.split(delimiter)]
        if len(names) > 1 and field in names and all(0 < len(name) <= 40 for name in names):
            return True
    return False


def _not_records(path: Path, beginning: bytes) -> DataError:
    within = _LIST_WITHIN.match(beginning)
    key = "records" if within is None else within[1].decode("utf-8", "replace")
    way = f"`jq -c '.{key}[]' {quoted(path)} > records.jsonl` makes that of an array in an object"
    if within is None and beginning.lstrip().startswith(b"{"):
        way = f"`jq -c . {quoted(path)} > records.jsonl` makes the latter of objects on many lines"
    return DataError(f"{path} is neither an array of objects nor one object a line; {way}")
