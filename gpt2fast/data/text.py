"""Reading text files of any size in blocks that can be encoded one by one.

A block ends only where a tokenizer puts a boundary anyway, so the tokens of the blocks, put
together, are the tokens of the whole text. GPT-2's pre-tokenizer,

    's|'t|'re|'ve|'m|'ll|'d| ?\\p{L}+| ?\\p{N}+| ?[^\\s\\p{L}\\p{N}]+|\\s+(?!\\S)|\\s+

has no alternative in which whitespace follows a visible character, and none in which punctuation
follows a letter or digit; so each such place is a boundary. The part before the cut ends in a
visible character, so the look-ahead, which only tests what follows whitespace, sees what it saw in
the whole text. BPE merges never cross such a boundary.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterator
from typing import NamedTuple

from ..tokenizer.added_tokens import END_OF_TEXT
from .charsets import check_text, not_utf8
from .opening import TextInput

# Only characters about which no two Unicode versions disagree.
_BOUNDARY = re.compile(
    r"(?<=\S)(?=[ \n\r\t])"
    r"|(?<=[0-9A-Za-zА-яぁ-ゖァ-ヺ一-鿋가-힣])(?=[.,;:!?，。！？、；：])"
)
_BEFORE_SPACE = re.compile(r"(?<=\S)(?= )")
# "^" cannot match by accident in the middle of a line: a block begins with <|endoftext|> only where
# the file does.
_SEPARATOR = re.compile(r"^<\|endoftext\|>(?:\n|\Z)|<\|endoftext\|>", re.MULTILINE)


class Segment(NamedTuple):
    """Text without special tokens, and what follows it."""

    text: str
    separator: bool
    """An `<|endoftext|>` follows."""
    ends_document: bool
    """It is a line of its own (whose newline is dropped)."""


class Block(NamedTuple):
    segments: list[Segment]
    end: int
    """Byte offset in the file where the block ends; reading can start again there."""


class Cuts(NamedTuple):
    """The places at which a tokenizer's text may be cut, and about how far apart they are."""

    any_character: bool = False
    """Between any two characters (character tokenizers)."""
    before_space: bool = False
    """Only before a space (tokenizers that put one before a text that does not begin with one)."""
    nowhere: bool = False
    """Not at all: the tokenizer may look at all of a text at once."""
    whole: tuple[str, ...] = (END_OF_TEXT,)
    """Strings that no cut may touch: the tokens that are matched as a whole."""
    block_size: int = 1 << 20
    """About how much is read at a time: bytes of a text, characters of records."""


def read_blocks(text_input: TextInput, cuts: Cuts, start: int = 0) -> Iterator[Block]:
    """Yield a text from byte `start` of its UTF-8 form (0 or the `end` of a block) on.

    A byte order mark is dropped and "\\r\\n" and "\\r" become "\\n", as in Python's text mode.
    Blocks have about `cuts.block_size`; a text without a boundary is held until one comes.
    Raises DataError with the byte offset where the text is not UTF-8.
    """
    with text_input.open(start) as file:
        pending = file.read(3) if start == 0 else b""
        if pending == codecs.BOM_UTF8:
            pending, start = b"", 3
        while True:
            # Doubling keeps the work linear when a text has no boundary for a long way.
            data = file.read(max(cuts.block_size, len(pending)))
            pending += data
            try:
                text, used = codecs.utf_8_decode(pending, "strict", not data)
            except UnicodeDecodeError as error:
                raise not_utf8(text_input.path, pending, error, start) from None
            check_text(text_input.path, pending, start)
            if not data:
                if text:
                    yield Block(segments_of(text), start + used)
                return
            cut = last_cut(text, cuts)
            if cut:
                size = len(text[:cut].encode())
                yield Block(segments_of(text[:cut]), start + size)
                pending = pending[size:]
                start += size


def last_cut(text: str, cuts: Cuts) -> int:
    """The last place where `text`, which goes on, may be cut; 0 if there is none."""
    if cuts.nowhere:
        return 0
    # A whole string that begins at the end of the text cannot be recognized yet.
    limit = len(text) - max(map(len, cuts.whole))
    boundary = _BEFORE_SPACE if cuts.before_space else _BOUNDARY
    window = 4096
    while limit > 0:
        begin = max(1, limit - window)
        places = [match.start() for match in boundary.finditer(text, begin, limit + 1)]
        for place in reversed(places):
            if not _touches(text, place, cuts.whole):
                return place
        if cuts.any_character:
            for place in range(limit, begin - 1, -1):
                # "\r\n" is one character in the end.
                if text[place - 1] != "\r" and not _touches(text, place, cuts.whole):
                    return place
        if begin == 1:
            break
        window *= 16
    return 0


def _touches(text: str, place: int, whole: tuple[str, ...]) -> bool:
    return any(token in text[max(0, place - len(token)) : place + len(token)] for token in whole)


def segments_of(text: str) -> list[Segment]:
    """A text in parts that end at each `<|endoftext|>`, with "\\n" for every kind of newline."""
    if "\r" in text:
        text = text.replace("\r\n", "\n").replace("\r", "\n")
    segments = []
    begin = 0
    for match in _SEPARATOR.finditer(text):
        line = match.start() == 0 or text[match.start() - 1] == "\n"
        whole = line and (match.end() == len(text) or text[match.end() - 1] == "\n")
        segments.append(Segment(text[begin : match.start()], True, whole))
        begin = match.end()
    if begin < len(text):
        segments.append(Segment(text[begin:], False, False))
    return segments
