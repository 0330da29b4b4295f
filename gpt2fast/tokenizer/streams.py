"""Texts that come in chunks of any size."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from typing import Any

from .added_tokens import END_OF_TEXT, WHITESPACE

_LONGEST_WORD = 1 << 24
PIECE = 512
"""Characters of a word that BPE training looks at together; ordinary words are much shorter."""
_ALIGNED = PIECE // 2
"""A word of `PIECE` characters or more covers a whole block of these."""


def ordinary_text(texts: Iterable[str]) -> Iterator[str]:
    """The stream without its `<|endoftext|>`s, in parts that don't depend on how it was chunked.

    A part ends where a document does, or before white space that follows something else: GPT-2's
    pre-tokenization cuts there whatever comes next. Only a word of more than 16 million characters
    is cut inside, to keep memory bounded.
    """
    rest = ""
    for text in texts:
        seen = len(rest)
        *ended, rest = (rest + text).split(END_OF_TEXT)
        yield from filter(None, ended)
        cut = _last_boundary(rest, 0 if ended else seen)
        if not cut and len(rest) > _LONGEST_WORD:
            cut = len(rest) - len(END_OF_TEXT)
        if cut:
            yield rest[:cut]
            rest = rest[cut:]
    if rest:
        yield rest


def short_words(texts: Iterable[str]) -> Iterator[str]:
    """The texts, cut inside words of more than `PIECE` characters and nowhere else.

    A word is what GPT-2's pre-tokenization takes as one: a run of letters, of numbers, of white
    space, or of everything else. BPE training takes time that grows with the square of a word's
    length, and a genome, minified JSON or base64 may be one word of megabytes.
    """
    for text in texts:
        done = 0
        for start, end in _long_words(text):
            for cut in range(start + PIECE, end, PIECE):
                yield text[done:cut]
                done = cut
        yield text[done:] if done else text


def _long_words(text: str) -> Iterator[tuple[int, int]]:
    """Beginnings and ends of the words of more than `PIECE` characters."""
    end = 0
    for at in range(0, len(text) - _ALIGNED + 1, _ALIGNED):
        # Nearly every block of ordinary text has a space, which is found in no time.
        if at < end or (" " in text[at : at + _ALIGNED] and not text[at].isspace()):
            continue
        # A word that began earlier has covered the block before, and was looked at there.
        for match in _runs().finditer(text, max(end, at - _ALIGNED)):
            if match.end() > at:
                break
        if match.end() - match.start() > PIECE:
            end = match.end()
            yield match.start(), end


@functools.cache
def _runs() -> Any:
    import regex  # tiktoken brings it

    return regex.compile(r"\p{L}++|\p{N}++|\s++|[^\s\p{L}\p{N}]++")


def _last_boundary(text: str, seen: int) -> int:
    """The last position after `seen` - 1 where white space follows something else, or 0."""
    for at in range(len(text) - 1, max(seen, 1) - 1, -1):
        if text[at] in WHITESPACE and text[at - 1] not in WHITESPACE:
            return at
    return 0
