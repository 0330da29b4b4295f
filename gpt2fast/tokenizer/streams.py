"""Texts that come in chunks of any size."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from .added_tokens import END_OF_TEXT, WHITESPACE

_LONGEST_WORD = 1 << 24


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


def _last_boundary(text: str, seen: int) -> int:
    """The last position after `seen` - 1 where white space follows something else, or 0."""
    for at in range(len(text) - 1, max(seen, 1) - 1, -1):
        if text[at] in WHITESPACE and text[at - 1] not in WHITESPACE:
            return at
    return 0
