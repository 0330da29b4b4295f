"""What text is read from: text files and files of records, in blocks, from any place on.

A place is one number: bytes in a file of text or JSON lines, rows in a table, records in a JSON
array, and characters where records are the lines of one text. Reading never holds more than a block
and a record.
"""

from __future__ import annotations

import csv
import hashlib
import io
import itertools
import json
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from .._system.files import open_file
from .._system.parsing import Unreadable, parse_json
from ..errors import DataError, printable, shown
from .encodings import guess, not_utf8
from .opening import TextInput
from .text import END_OF_TEXT, Block, Cuts, Segment, last_cut, read_blocks, segments_of

BLOCK_CHARACTERS = 1 << 20
LONGEST_LINE = 1 << 28
"""Bytes; a longer line of JSON is taken for a mistake."""
_SURROGATE = re.compile("[\ud800-\udfff]")
_ROWS_AT_ONCE = 256
_READ_BYTES = 1 << 20
_BETWEEN_ITEMS = re.compile(r"[ \n\r\t]*([\[,\]])[ \n\r\t]*")


class Source(ABC):
    """A text, or a part of one, that is read from the start or from the end of any block."""

    name: str
    """What meta.json calls it."""
    identity: str
    """By which an interrupted run is recognised."""
    size: int
    """Bytes to read, about; what progress is measured against."""
    done: int = 0
    """Bytes read so far of `size`, about."""
    ends_document: bool = True
    """Its end is the end of a document (which its last block does not say)."""

    @abstractmethod
    def signature(self) -> dict[str, Any]:
        """What tells whether it is still the same, without reading all of it."""

    @abstractmethod
    def blocks(self, cuts: Cuts, start: int) -> Iterator[Block]:
        """The text from the place `start` (0 or the `end` of a block) on."""


class _File(Source):
    """A source that is one file.

    encoding: of its text; None means UTF-8, or what its byte order mark says.
    """

    def __init__(self, path: Path, encoding: str | None = None, name: str | None = None) -> None:
        self.path = path
        self.encoding = encoding
        self.name = name or path.name
        self.identity = str(path.resolve())
        self.size = file_signature(path)["size"]

    def signature(self) -> dict[str, Any]:
        return file_signature(self.path)

    def _input(self) -> TextInput:
        return TextInput(self.path, self.encoding)

    def _note_progress(self, text_input: TextInput, end: int | None = None) -> None:
        """What has been read; `end` is the place in the stream, where that is known."""
        done = text_input.done if end is None or not text_input.as_stored else end
        if done > self.size:
            raise changed_meanwhile(self.path)
        self.done = done


class TextFile(_File):
    """A file of text; see `text.read_blocks`."""

    ends_line = False
    """Another text follows: end the last line of this one, where it does not end itself."""

    def blocks(self, cuts: Cuts, start: int) -> Iterator[Block]:
        text_input = self._input()
        blocks = read_blocks(text_input, cuts, start)
        block = next(blocks, None)
        while block is not None:
            following = next(blocks, None) if self.ends_line else None
            if self.ends_line and following is None:
                _end_line(block.segments)
            self._note_progress(text_input, block.end)
            yield block
            block = following if self.ends_line else next(blocks, None)


def _end_line(segments: list[Segment]) -> None:
    last = segments[-1]
    if not last.separator and not last.text.endswith("\n"):
        segments[-1] = last._replace(text=last.text + "\n")


class Records(Source):
    """Texts one after another: each a document, or each a line of one text.

    lines: False ends every record with an `<|endoftext|>` and leaves blank records out. True joins
        the records as they are; one that does not end with a newline gets one, so that an empty
        record is an empty line.
    """

    field: str
    lines: bool

    def _read_as(self, field: str, lines: bool) -> None:
        self.field = field
        self.lines = self.ends_document = lines

    @abstractmethod
    def records(self, start: int) -> Iterator[tuple[str, int]]:
        """The texts of the records from the place `start` on, each with the place after it."""

    def blocks(self, cuts: Cuts, start: int) -> Iterator[Block]:
        return self._line_blocks(cuts, start) if self.lines else self._document_blocks(start)

    def _document_blocks(self, start: int) -> Iterator[Block]:
        segments: list[Segment] = []
        size = 0
        end = start
        for text, end in self.records(start):
            if text and not text.isspace():
                segments += _document(text)
                size += len(text)
            if size >= BLOCK_CHARACTERS:
                yield Block(segments, end)
                segments, size = [], 0
        if end != start:
            yield Block(segments, end)

    def _line_blocks(self, cuts: Cuts, start: int) -> Iterator[Block]:
        read, limit = 0, BLOCK_CHARACTERS
        pending: list[str] = []
        size, place = 0, start
        for text, _ in self.records(0):
            line = text if text.endswith("\n") else text + "\n"
            read += len(line)
            if read <= start:  # encoded before an interruption
                continue
            pending.append(line[max(0, start - (read - len(line))) :])
            size += len(pending[-1])
            if size < limit:
                continue
            joined = "".join(pending)
            cut = last_cut(joined, cuts)
            if cut:
                place += cut
                yield Block(segments_of(joined[:cut]), place)
            pending, size = [joined[cut:]], len(joined) - cut
            # Doubling keeps the work linear when a text has no boundary for a long way.
            limit = max(BLOCK_CHARACTERS, 2 * size)
        if size:
            yield Block(segments_of("".join(pending)), place + size)


class _RecordFile(_File, Records):
    """A file of records in text."""

    def __init__(
        self,
        path: Path,
        field: str,
        lines: bool,
        encoding: str | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(path, encoding, name)
        self._read_as(field, lines)


class JsonLines(_RecordFile):
    """A file with one JSON object a line."""

    def records(self, start: int) -> Iterator[tuple[str, int]]:
        end = start
        text_input = self._input()
        with text_input.open(start) as file:
            while line := file.readline(LONGEST_LINE):
                begin, end = end, end + len(line)
                self._note_progress(text_input, end)
                if line.strip():
                    yield self._text(line, begin), end

    def _text(self, line: bytes, begin: int) -> str:
        try:
            return _text_of_line(line, self.field, begin == 0, self.path)
        except BadRecord as error:
            number = self._line_number(begin)
            raise DataError(f"{self.path}, line {number}: {error}") from None

    def _line_number(self, begin: int) -> int:
        """Of the line that begins at this byte."""
        number = 1
        with self._input().open() as file:
            while begin and (piece := file.read(min(begin, 1 << 20))):
                number += piece.count(b"\n")
                begin -= len(piece)
        return number


class _DecodedFile(_RecordFile):
    """A file of records that is decoded as a whole."""

    @contextmanager
    def _text(self) -> Iterator[tuple[TextIO, TextInput]]:
        text_input = self._input()
        with text_input.open() as file:
            try:
                yield io.TextIOWrapper(file, "utf-8-sig", newline=""), text_input
            except UnicodeDecodeError as error:
                # Its offset counts from the beginning of a piece.
                data = bytes(error.object)
                raise not_utf8(self.path, data, error, max(0, file.tell() - len(data))) from None


class JsonArray(_DecodedFile):
    """A file that is one JSON array of objects."""

    def records(self, start: int) -> Iterator[tuple[str, int]]:
        with self._text() as (file, text_input):
            for number, record in enumerate(_items_of_array(file, self.path), 1):
                self._note_progress(text_input)
                if number <= start:
                    continue
                try:
                    yield _text_of_object(record, self.field, "each item"), number
                except BadRecord as error:
                    raise DataError(f"{self.path}, item {number}: {error}") from None


class DelimitedText(_DecodedFile):
    """A table in text, whose first row names its columns (CSV, RFC 4180; TSV).

    The delimiter is the one of `delimiters` that makes a column `field` of the first row, else the
    one that makes most columns of it.
    """

    def __init__(
        self,
        path: Path,
        field: str,
        lines: bool,
        encoding: str | None,
        name: str | None,
        delimiters: str,
    ) -> None:
        super().__init__(path, field, lines, encoding, name)
        self._delimiters = delimiters

    def records(self, start: int) -> Iterator[tuple[str, int]]:
        with self._text() as (file, text_input):
            names, lines, delimiter = self._header(file)
            column = names.index(self.field)
            rows = csv.reader(file, delimiter=delimiter, strict=True)
            for row in itertools.count(1):
                begin = rows.line_num
                try:
                    values = _next_row(rows)
                    if values is None:
                        return
                    self._note_progress(text_input)
                    if row <= start or not values:
                        continue
                    self._check_row(values, names, delimiter)
                    text = text_of(values[column], self.field)
                except (csv.Error, BadRecord) as error:
                    why = str(error)
                    if why == "unexpected end of data":
                        why = "a double quote is opened and not closed"
                    raise DataError(
                        f"{self.path}, row {row} (line {lines + begin + 1}): {why}"
                    ) from None
                yield text, row

    def _check_row(self, values: list[str], names: list[str], delimiter: str) -> None:
        if len(values) != len(names):
            raise BadRecord(
                f"{len(values)} values, but the first row names {len(names)} columns; a value with "
                "a delimiter or a new line in it needs double quotes"
            )
        if delimiter == "\t" and any(
            _looks_like_rows(value, place, len(names)) for place, value in enumerate(values)
        ):
            raise BadRecord(
                "a value in double quotes goes on over lines that look like rows of their own, as "
                "where a text begins with a quote in a table without quoting; double such quotes "
                'and put the value in quotes (""" at its beginning), or save the table as .csv '
                "with commas"
            )

    def _header(self, file: TextIO) -> tuple[list[str], int, str]:
        """The names of the columns, how many lines they and what stands before them take, and the
        delimiter."""
        lines = 0
        text = ""
        while line := file.readline(LONGEST_LINE):
            lines += 1
            text += line
            if text.strip() and text.count('"') % 2 == 0:
                if not re.fullmatch(r"sep=.?\s*", text):  # which Excel reads
                    break
                text = ""
            elif not text.strip():
                text = ""
        best: list[str] = []
        delimiter = self._delimiters[0]
        for candidate in self._delimiters:
            try:
                reader = csv.reader(io.StringIO(text, newline=""), delimiter=candidate, strict=True)
                names = [name.strip() for name in next(reader, [])]
            except csv.Error:
                continue
            if len(names) > len(best) or self.field in names:
                best, delimiter = names, candidate
            if self.field in names:
                break
        if not any(best):
            raise DataError(f"{self.path}: there is no first row that names the columns")
        if self.field not in best:
            raise DataError(
                f"{self.path}: its first row names no column {self.field!r}, only "
                f"{', '.join(shown(name) for name in best[:20])}; name the one that holds the text "
                "(--text-field), or call the file .txt to read all of it as text"
            )
        if best.count(self.field) > 1:
            raise DataError(f"{self.path}: two columns are called {self.field!r}; rename one")
        return best, lines, delimiter


class Table(Records):
    """Rows of a table, of which one column is read."""

    rows: int

    @abstractmethod
    def column(self, start: int) -> Iterator[Any]:
        """The values of the column from the row `start` on."""

    def records(self, start: int) -> Iterator[tuple[str, int]]:
        for row, value in enumerate(self.column(start), start):
            try:
                text = text_of(value, self.field)
            except BadRecord as error:
                raise DataError(f"{self.identity}, row {row}: {error}") from None
            self.done = self.size * (row + 1) // self.rows
            yield text, row + 1


class Parquet(_File, Table):
    """A column of a parquet file, read through pyarrow."""

    def __init__(self, path: Path, field: str, lines: bool) -> None:
        super().__init__(path)
        self._read_as(field, lines)
        with self._opened() as file:
            schema = file.schema_arrow
            if field not in schema.names:
                raise DataError(f"{path}: {missing(field, schema.names)}")
            self.rows = file.metadata.num_rows

    def column(self, start: int) -> Iterator[Any]:
        with self._opened() as file:
            first = 0
            for group in range(file.num_row_groups):
                rows = file.metadata.row_group(group).num_rows
                skipped = min(rows, max(0, start - first))
                first += rows
                if skipped == rows:
                    continue
                for batch in file.iter_batches(
                    _ROWS_AT_ONCE, row_groups=[group], columns=[self.field]
                ):
                    yield from batch.column(0)[skipped:].to_pylist()
                    skipped = max(0, skipped - len(batch))

    @contextmanager
    def _opened(self) -> Iterator[Any]:
        try:
            import pyarrow.parquet
        except ImportError:
            raise DataError(
                f"{self.path}: reading parquet needs pyarrow; "
                'pip install "gpt2fast[datasets]" brings it'
            ) from None
        try:
            # Otherwise it reads whole column chunks, and one of those can be all of the file.
            with pyarrow.parquet.ParquetFile(
                self.path, pre_buffer=False, buffer_size=_READ_BYTES
            ) as file:
                yield file
        except (pyarrow.ArrowException, OSError) as error:
            raise DataError(f"{self.path} cannot be read: {one_line(error)}") from None


class BadRecord(Exception):
    """A record without usable text; says why."""


def text_of(value: Any, field: str) -> str:
    """`value` if it is text that can be encoded, else BadRecord."""
    if not isinstance(value, str):
        found = "null" if value is None else f"of type {type(value).__name__}"
        raise BadRecord(f"{field!r} is {found}, not text; mend or leave out this record")
    if not value.isascii() and _SURROGATE.search(value):
        raise BadRecord(
            f"{field!r} holds half a surrogate pair, which is no character; mend or leave out this "
            "record"
        )
    return value


def missing(field: str, names: Iterable[str]) -> str:
    """What to say where records have no field of that name."""
    known = ", ".join(sorted(names)[:20])
    if not known:
        return f"there is no {field!r}, nor any other field"
    return f"there is no {field!r}, only {known}; name the one that holds the text (--text-field)"


def one_line(error: BaseException) -> str:
    """The text of another library's exception, in one line of bearable length."""
    return " ".join(str(error).split())[:300] or type(error).__name__


def file_signature(path: Path) -> dict[str, Any]:
    """What tells whether a file is still the same, without reading all of it."""
    edge = 1 << 16
    digest = hashlib.sha256()
    try:
        with open_file(path) as file:  # a pipe within a folder would be waited for
            stat = os.fstat(file.fileno())
            digest.update(file.read(edge))
            file.seek(max(0, stat.st_size - edge))
            digest.update(file.read(edge))
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from None
    return {
        "size": stat.st_size,
        "modified_ns": stat.st_mtime_ns,
        "sha256_of_ends": digest.hexdigest(),
    }


def changed_meanwhile(what: str | Path) -> DataError:
    """The error for a text that is no longer what it was when reading began."""
    return DataError(
        f"{what} has changed while it was being read; start over with --overwrite (overwrite=True)"
    )


def _text_of_line(line: bytes, field: str, first: bool, path: Path) -> str:
    if len(line) >= LONGEST_LINE:
        raise BadRecord(
            f"longer than {LONGEST_LINE >> 20} MB; every record needs a line of its own "
            "(`jq -c '.[]'` makes that of a JSON array)"
        )
    try:
        record = parse_json(line.decode("utf-8-sig" if first else "utf-8"), unique=False)
    except UnicodeDecodeError as error:
        found = f"byte 0x{line[error.start]:02x} at place {error.start}"
        raise BadRecord(
            f"not UTF-8 ({found} of the line); mend or leave out this line, or read all of the "
            f"file otherwise: {guess(path, line[error.start :])}"
        ) from None
    except Unreadable as error:
        raise BadRecord(f"{error}; each line must be an object with {field!r}") from None
    return _text_of_object(record, field, "each line")


def _text_of_object(record: Any, field: str, each: str) -> str:
    if not isinstance(record, dict):
        found = type(record).__name__
        raise BadRecord(f"a JSON {found}, but {each} must be an object with {field!r}")
    value = record.get(field)
    inner = (
        value
        if isinstance(value, list)
        else next((other for other in record.values() if isinstance(other, list)), None)
    )
    if inner and isinstance(inner[0], dict) and not isinstance(value, str):
        key = next(name for name, other in record.items() if other is inner)
        raise BadRecord(
            f"it holds a list of objects, {shown(key)}, and each line must be a record itself; "
            f"`jq -c '.{printable(key)}[]' FILE > records.jsonl` makes that"
        )
    if field not in record:
        raise BadRecord(missing(field, record))
    return text_of(value, field)


def _items_of_array(file: TextIO, path: Path) -> Iterator[Any]:
    """The items of a JSON array, decoded one by one."""
    decoder = json.JSONDecoder()
    text, expected, number = "", "[", 0
    why = "there is no array"
    while True:
        # As much again as could not be decoded, which keeps the work linear.
        piece = file.read(max(_READ_BYTES, len(text)))
        text += piece
        place = 0
        while (mark := _BETWEEN_ITEMS.match(text, place)) and not (
            piece and mark.end() == len(text)
        ):
            empty = mark[1] == expected == "[" and text[mark.end() : mark.end() + 1] == "]"
            if empty or (number and mark[1] == "]"):
                end = mark.end() + empty
                if text[end:].strip() or file.read(1 << 10).strip():
                    raise DataError(f"{path}: something follows the end of the JSON array")
                return
            if mark[1] != expected:
                why = f"a {expected!r} is missing before {text[mark.end() - 1 :][:20]!r}"
                break
            try:
                record, end = decoder.raw_decode(text, mark.end())
            except RecursionError:
                raise DataError(f"{path}, item {number + 1}: nested too deeply") from None
            except ValueError as error:
                why = getattr(error, "msg", str(error))
                break
            why = "the array does not end"
            if piece and end == len(text):  # a number may go on
                break
            place, expected, number = end, ",", number + 1
            yield record
        text = text[place:]
        if len(text) > LONGEST_LINE:
            why = f"longer than {LONGEST_LINE >> 20} MB, or not JSON ({why})"
        elif not piece:
            why = f"not JSON, or cut short ({why})"
        else:
            continue
        raise DataError(
            f"{path}, item {number + 1}: {why}; the file must be an array of objects, or hold one "
            "object a line"
        )


def _next_row(rows: Iterator[list[str]]) -> list[str] | None:
    """The next row, or None. The limit of a value's size is one for the whole process, in which
    others rely on theirs."""
    limit = csv.field_size_limit(LONGEST_LINE)
    try:
        return next(rows, None)
    finally:
        csv.field_size_limit(limit)


def _looks_like_rows(value: str, place: int, columns: int) -> bool:
    """Whether a value of a table with tabs could be the end of a row, whole rows, and the beginning
    of another up to the column `place`."""
    _, *lines = value.split("\n")
    return (
        columns > 1
        and bool(lines)
        and lines[-1].count("\t") == place
        and (place > 0 or len(lines) > 1)
        and all(line.count("\t") == columns - 1 for line in lines[:-1])
    )


def joined_text(source: Source) -> str:
    """All the text of a source, with the end-of-text token's text where that stands."""
    return "".join(
        segment.text + END_OF_TEXT if segment.separator else segment.text
        for block in source.blocks(Cuts(any_character=True), 0)
        for segment in block.segments
    )


def _document(text: str) -> list[Segment]:
    """A record as a document that an `<|endoftext|>` ends; one that it holds itself counts, too."""
    if "\r" in text:
        text = text.replace("\r\n", "\n").replace("\r", "\n")
    *ended, rest = text.split(END_OF_TEXT)
    segments = [Segment(part, True, False) for part in ended]
    if (rest and not rest.isspace()) or not segments:
        segments.append(Segment(rest, True, False))
    segments[-1] = segments[-1]._replace(ends_document=True)
    return segments
