"""Texts out of a column of a table: CSV, TSV and parquet."""

from __future__ import annotations

import csv
import io
import itertools
import re
from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from ..errors import DataError, reason_of, shown
from .records import LONGEST_LINE, BadRecord, DecodedFile, Records, missing, text_of
from .sources import FileSource

ROWS_AT_ONCE = 256
_READ_BYTES = 1 << 20


class DelimitedText(DecodedFile):
    """A table in text, whose first row names its columns (CSV, RFC 4180; TSV).

    The delimiter is the one of `delimiters` that makes a column `field` of the first row, else the
    one that makes most columns of it.
    """

    delimiters = ",;\t|"

    def records(self, start: int) -> Iterator[tuple[str, int]]:
        with self.text() as (file, text_input):
            names, lines, delimiter = self._header(file)
            column = names.index(self.field)
            rows = csv.reader(file, delimiter=delimiter, strict=True)
            for row in itertools.count(1):
                begin = rows.line_num
                try:
                    values = _next_row(rows)
                    if values is None:
                        return
                    self.note_progress(text_input)
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
        delimiter = self.delimiters[0]
        for candidate in self.delimiters:
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


def _next_row(rows: Iterator[list[str]]) -> list[str] | None:
    """The next row, or None. The limit of a value's size is one for the whole process, in which
    others rely on theirs."""
    limit = csv.field_size_limit(LONGEST_LINE)
    try:
        return next(rows, None)
    finally:
        csv.field_size_limit(limit)


def _looks_like_rows(value: str, place: int, columns: int) -> bool:
    """True for a value of a table with tabs that could be the end of a row, whole rows, and the
    beginning of another up to the column `place`."""
    _, *lines = value.split("\n")
    return (
        columns > 1
        and bool(lines)
        and lines[-1].count("\t") == place
        and (place > 0 or len(lines) > 1)
        and all(line.count("\t") == columns - 1 for line in lines[:-1])
    )


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


class Parquet(FileSource, Table):
    """A column of a parquet file, read through pyarrow."""

    def __init__(self, path: Path, field: str, lines: bool) -> None:
        super().__init__(path)
        self.read_as(field, lines)
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
                    ROWS_AT_ONCE, row_groups=[group], columns=[self.field]
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
            raise DataError(f"{self.path} cannot be read: {reason_of(error)}") from None
