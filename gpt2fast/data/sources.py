"""Texts that are read in blocks, from any place on: the kinds of source, and files of plain text.

A place is one number: bytes in a file of text or JSON lines, rows in a table, records in a JSON
array, and characters where records are the lines of one text. Reading never holds more than a block
and a record.
"""

from __future__ import annotations

import hashlib
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .._system.files import open_file
from .._system.parsing import unreadable_as
from ..errors import DataError
from .opening import TextInput
from .text import END_OF_TEXT, Block, Cuts, Segment, read_blocks


class Source(ABC):
    """A text, or a part of one, that is read from the start or from the end of any block."""

    name: str
    """The name that meta.json has for it."""
    identity: str
    """The name by which an interrupted run is recognized."""
    size: int
    """Bytes to read, about; all of it is 100 % of the progress."""
    done: int = 0
    """Bytes read so far of `size`, about."""
    ends_document: bool = True
    """Its end is the end of a document (which its last block does not say)."""

    @abstractmethod
    def signature(self) -> dict[str, Any]:
        """Facts that differ where it has changed, found without reading all of it."""

    @abstractmethod
    def blocks(self, cuts: Cuts, start: int) -> Iterator[Block]:
        """The text from the place `start` (0 or the `end` of a block) on."""


class FileSource(Source):
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

    def input(self) -> TextInput:
        return TextInput(self.path, self.encoding)

    def note_progress(self, text_input: TextInput, end: int | None = None) -> None:
        """Note how far the file is read; `end` is the place in the stream, where that is known."""
        done = text_input.done if end is None or not text_input.as_stored else end
        if done > self.size:
            raise changed_meanwhile(self.path)
        self.done = done


class TextFile(FileSource):
    """A file of text; see `text.read_blocks`."""

    ends_line = False
    """Another text follows: end the last line of this one, where it does not end itself."""

    def blocks(self, cuts: Cuts, start: int) -> Iterator[Block]:
        text_input = self.input()
        blocks = read_blocks(text_input, cuts, start)
        block = next(blocks, None)
        while block is not None:
            following = next(blocks, None) if self.ends_line else None
            if self.ends_line and following is None:
                _end_line(block.segments)
            self.note_progress(text_input, block.end)
            yield block
            block = following if self.ends_line else next(blocks, None)


def _end_line(segments: list[Segment]) -> None:
    last = segments[-1]
    if not last.separator and not last.text.endswith("\n"):
        segments[-1] = last._replace(text=last.text + "\n")


def file_signature(path: Path) -> dict[str, Any]:
    """Facts that differ where a file has changed, found without reading all of it."""
    edge = 1 << 16
    digest = hashlib.sha256()
    with unreadable_as(DataError, path), open_file(path) as file:  # no pipe: it would be waited for
        stat = os.fstat(file.fileno())
        digest.update(file.read(edge))
        file.seek(max(0, stat.st_size - edge))
        digest.update(file.read(edge))
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


def joined_text(source: Source) -> str:
    """All the text of a source, with the end-of-text token's text where that stands."""
    return "".join(
        segment.text + END_OF_TEXT if segment.separator else segment.text
        for block in source.blocks(Cuts(any_character=True), 0)
        for segment in block.segments
    )
