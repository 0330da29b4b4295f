"""Texts out of records: a field of each JSON object, in lines or in one array."""

from __future__ import annotations

import io
import json
import re
from abc import abstractmethod
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from .._system.parsing import Unreadable, parse_json
from ..errors import DataError, printable, shown
from .charsets import guess, not_utf8
from .opening import TextInput
from .sources import FileSource, Source
from .text import END_OF_TEXT, Block, Cuts, Segment, last_cut, segments_of

LONGEST_LINE = 1 << 28
"""Bytes; a longer line of JSON is taken for a mistake."""
_SURROGATE = re.compile("[\ud800-\udfff]")
READ_BYTES = 1 << 20
_BETWEEN_ITEMS = re.compile(r"[ \n\r\t]*([\[,\]])[ \n\r\t]*")


class Records(Source):
    """Texts one after another: each a document, or each a line of one text.

    lines: False ends every record with an `<|endoftext|>` and leaves blank records out. True joins
        the records as they are; one that does not end with a newline gets one, so that an empty
        record is an empty line.
    """

    field: str
    lines: bool

    def read_as(self, field: str, lines: bool) -> None:
        self.field = field
        self.lines = self.ends_document = lines

    @abstractmethod
    def records(self, start: int) -> Iterator[tuple[str, int]]:
        """The texts of the records from the place `start` on, each with the place after it."""

    def blocks(self, cuts: Cuts, start: int) -> Iterator[Block]:
        return self._line_blocks(cuts, start) if self.lines else self._document_blocks(cuts, start)

    def _document_blocks(self, cuts: Cuts, start: int) -> Iterator[Block]:
        segments: list[Segment] = []
        size = 0
        end = start
        for text, end in self.records(start):
            if text and not text.isspace():
                segments += _document(text)
                size += len(text)
            if size >= cuts.block_size:
                yield Block(segments, end)
                segments, size = [], 0
        if end != start:
            yield Block(segments, end)

    def _line_blocks(self, cuts: Cuts, start: int) -> Iterator[Block]:
        read, limit = 0, cuts.block_size
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
            limit = max(cuts.block_size, 2 * size)
        if size:
            yield Block(segments_of("".join(pending)), place + size)


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


class RecordFile(FileSource, Records):
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
        self.read_as(field, lines)


class JsonLines(RecordFile):
    """A file with one JSON object a line."""

    def records(self, start: int) -> Iterator[tuple[str, int]]:
        end = start
        text_input = self.input()
        with text_input.open(start) as file:
            while line := file.readline(LONGEST_LINE):
                begin, end = end, end + len(line)
                self.note_progress(text_input, end)
                if line.strip():
                    yield self._text(line, begin), end

    def _text(self, line: bytes, begin: int) -> str:
        try:
            return _text_of_line(line, self.field, begin == 0, self.path)
        except BadRecord as error:
            number = self._line_number(begin)
            raise DataError(f"{self.path}, line {number}: {error}") from None

    def _line_number(self, begin: int) -> int:
        """The number of the line that begins at this byte."""
        number = 1
        with self.input().open() as file:
            while begin and (piece := file.read(min(begin, 1 << 20))):
                number += piece.count(b"\n")
                begin -= len(piece)
        return number


class DecodedFile(RecordFile):
    """A file of records that is decoded as a whole."""

    @contextmanager
    def text(self) -> Iterator[tuple[TextIO, TextInput]]:
        text_input = self.input()
        with text_input.open() as file:
            try:
                yield io.TextIOWrapper(file, "utf-8-sig", newline=""), text_input
            except UnicodeDecodeError as error:
                # Its offset counts from the beginning of a piece.
                data = bytes(error.object)
                raise not_utf8(self.path, data, error, max(0, file.tell() - len(data))) from None


class JsonArray(DecodedFile):
    """A file that is one JSON array of objects."""

    def records(self, start: int) -> Iterator[tuple[str, int]]:
        with self.text() as (file, text_input):
            for number, record in enumerate(_items_of_array(file, self.path), 1):
                self.note_progress(text_input)
                if number <= start:
                    continue
                try:
                    yield _text_of_object(record, self.field, "each item"), number
                except BadRecord as error:
                    raise DataError(f"{self.path}, item {number}: {error}") from None


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
    """The message for records that have no field of that name."""
    known = ", ".join(sorted(names)[:20])
    if not known:
        return f"there is no {field!r}, nor any other field"
    return f"there is no {field!r}, only {known}; name the one that holds the text (--text-field)"


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
        # Read as much again as is not decoded yet, which keeps the work linear.
        piece = file.read(max(READ_BYTES, len(text)))
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
