"""The split of a text into a part that trains and one that is held out for validation."""

from __future__ import annotations

import random
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..errors import DataError
from .sources import changed_meanwhile
from .text import END_OF_TEXT, Segment

TRAIN, VAL, BLANK = 0, 1, 2
HELD_OUT_NAMED = 1000
"""meta.json names at most so many held-out documents."""

Part = tuple[int, str, bool]
"""TRAIN or VAL, a text, and whether an end token follows it."""


@dataclass
class TextPosition:
    """The progress of a pass over the text; enough to go on from there."""

    source: int = 0
    offset: int = 0
    """Place in that source from which to read on."""
    corpus: int = 0
    character: int = 0
    """Characters read so far of the corpus; with the documents split, of the current held-out
    document."""
    document: int = 0
    head: str = ""
    """The beginning of the current document, if it is held out."""
    tokens: list[int] = field(default_factory=lambda: [0, 0])
    characters: list[int] = field(default_factory=lambda: [0, 0])
    corpus_tokens: list[list[int]] = field(default_factory=list)
    """The tokens of each corpus that has begun."""
    held_out: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True)
class Plan:
    """The part of the text that goes into each split; the outcome of counting."""

    corpus_of: Sequence[int]
    """The corpus of each source."""
    boundaries: Sequence[int] = ()
    """TextPosition split: so many characters of each corpus train."""
    assignment: bytes = b""
    """Documents split: TRAIN, VAL or BLANK for each document."""
    given: Sequence[int] = ()
    """Given split: TRAIN or VAL for each source."""

    def parts(self, segments: list[Segment], source: int, at: TextPosition) -> Iterator[Part]:
        """Yield the parts of some segments of a source, and move `at` along."""
        if self.corpus_of[source] != at.corpus:
            at.corpus, at.character = self.corpus_of[source], 0
        if self.given:
            yield from ((self.given[source], text, end) for text, end, _ in segments)
        elif self.assignment:
            yield from self._by_document(segments, at)
        else:
            yield from self._by_position(segments, at)

    def _by_position(self, segments: list[Segment], at: TextPosition) -> Iterator[Part]:
        for text, separator, _ in segments:
            room = max(0, self.boundaries[at.corpus] - at.character)
            at.character += len(text) + separator
            if room > len(text):
                yield TRAIN, text, separator
                continue
            if room:
                yield TRAIN, text[:room], False
            if separator or room < len(text):
                yield VAL, text[room:], separator

    def _by_document(self, segments: list[Segment], at: TextPosition) -> Iterator[Part]:
        for text, separator, ends_document in segments:
            if at.document == len(self.assignment):
                raise changed_meanwhile("the text")
            part = self.assignment[at.document]
            if part != BLANK:
                yield part, text, separator
            if part == VAL:
                at.head = (at.head + text)[:400]
                at.character += len(text) + separator
            if not ends_document:
                continue
            if part == VAL and len(at.held_out) < HELD_OUT_NAMED:
                named = {"document": at.document, "title": _title(at.head)}
                at.held_out.append({**named, "characters": at.character})
            at.head, at.character = "", 0
            at.document += 1


class PositionCount:
    """Counts the characters of each corpus, to hold out its end."""

    def __init__(self, corpora: int) -> None:
        self.characters = [0] * corpora

    def add(self, segments: list[Segment], corpus: int) -> None:
        self.characters[corpus] += sum(len(text) + separator for text, separator, _ in segments)

    def boundaries(self, fraction: float, names: Sequence[str]) -> list[int]:
        """Characters of each corpus that train."""
        found = []
        for name, characters in zip(names, self.characters, strict=True):
            require_text(characters, name)
            boundary = int(characters * (1 - fraction))
            if not 0 < boundary < characters:
                part = "training" if boundary == 0 else "validation"
                which = f" of {name}" if len(names) > 1 else ""
                raise DataError(
                    f"the {part} part{which} would be empty: val_fraction is {fraction} of "
                    f"{characters} characters; give more text or another --val-fraction"
                )
            found.append(boundary)
        return found


class DocumentCount:
    """Counts the characters of each document, to hold out whole ones of each corpus."""

    def __init__(self, corpora: int) -> None:
        # Nothing else grows with the text: eight bytes a document.
        self.lengths = [array("q") for _ in range(corpora)]
        self._length, self._blank = 0, True

    def add(self, segments: list[Segment], corpus: int) -> None:
        for text, separator, ends_document in segments:
            self._length += len(text) + separator
            self._blank = self._blank and not text.strip()
            if ends_document:
                self.lengths[corpus].append(0 if self._blank else self._length)
                self._length, self._blank = 0, True

    def assignment(self, fraction: float, seed: int, names: Sequence[str]) -> bytes:
        """TRAIN, VAL or BLANK for each document."""
        joined = bytearray()
        for name, lengths in zip(names, self.lengths, strict=True):
            characters = sum(lengths)
            require_text(characters, name)
            if sum(map(bool, lengths)) < 2:
                which = f"{name} holds" if len(names) > 1 else "there is"
                raise DataError(
                    f"{which} only one document, so none can be held out; end documents with a "
                    f"line {END_OF_TEXT}, give several files, or use --split position"
                )
            parts = bytearray(TRAIN if length else BLANK for length in lengths)
            for index in hold_out(lengths, fraction * characters, seed):
                parts[index] = VAL
            joined += parts
        return bytes(joined)


def require_text(characters: int, name: str) -> None:
    """Raise DataError if there are no characters."""
    if not characters:
        raise DataError(f"there is no text in the input ({name})")


def hold_out(lengths: Sequence[int], target: float, seed: int) -> list[int]:
    """Documents in an order drawn with `seed`, until they hold `target` characters."""
    order = array("q", (index for index, length in enumerate(lengths) if length))
    # Of Python's generators only random() and this seeding are promised to stay as they are.
    draw = random.Random(str(seed)).random
    chosen: list[int] = []
    total = 0
    for place in range(len(order) - 1):  # one document at least must train
        other = place + int(draw() * (len(order) - place))
        order[place], order[other] = order[other], order[place]
        length = lengths[order[place]]
        # A document much longer than what is still missing would distort the fraction.
        if total + length <= 1.1 * target:
            chosen.append(order[place])
            total += length
        if total >= target:
            break
    return chosen or [min(order, key=lambda index: lengths[index])]


def _title(head: str) -> str:
    """The first line that says something."""
    return next((line.strip(" \t#") for line in head.split("\n") if line.strip()), "")[:100]
