"""Added tokens: strings that are cut out of a text whole, before anything else looks at it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

END_OF_TEXT = "<|endoftext|>"

GPT2_SPECIAL_TOKENS = dict.fromkeys(("bos_token", "eos_token", "unk_token"), END_OF_TEXT)
"""The tokens that play a part in GPT-2's tokenizer, by transformers' names."""

FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
"""Options of an added token, as its class, the files and Hugging Face's library call them."""

# Unicode's White_Space. Python's own \s and str.strip() count U+001C to U+001F as well.
WHITESPACE = (
    "\t\n\v\f\r \x85\xa0\u1680\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a"
    "\u2028\u2029\u202f\u205f\u3000"
)
_SPACES = re.compile(f"[{WHITESPACE}]*")
_WORD = re.compile(r"\w")


@dataclass(frozen=True)
class AddedToken:
    """A token that is matched as a whole string; field names and meaning as in HF tokenizers."""

    content: str
    id: int
    single_word: bool = False
    """Match only where no word character touches it."""
    lstrip: bool = False
    """Take the white space before it too."""
    rstrip: bool = False
    """Take the white space after it too."""
    normalized: bool = False
    """Look for it only in what the tokens with `normalized=False` have left."""
    special: bool = True


def flags_of(token: Any) -> dict[str, bool]:
    """The options of an `AddedToken`, ours or the library's."""
    return {flag: getattr(token, flag) for flag in FLAGS}


class AddedTokenSplitter:
    """Cuts a text at its added tokens: leftmost first, the longest where several begin."""

    def __init__(self, tokens: Iterable[AddedToken]) -> None:
        tokens = list(tokens)
        self._passes = [
            (re.compile("|".join(re.escape(content) for content in contents)), by_content)
            for normalized in (False, True)
            if (by_content := {t.content: t for t in tokens if t.normalized is normalized})
            for contents in [sorted(by_content, key=len, reverse=True)]
        ]

    def split(self, text: str) -> Iterator[str | int]:
        """The text's parts in order: str of ordinary text (never empty), int for an added token."""
        parts: Iterable[str | int] = (text,)
        for pattern, by_content in self._passes:
            parts = _split_parts(parts, pattern, by_content)
        return (part for part in parts if part != "")


def _split_parts(
    parts: Iterable[str | int], pattern: re.Pattern[str], by_content: dict[str, AddedToken]
) -> Iterator[str | int]:
    for part in parts:
        if isinstance(part, int):
            yield part
        else:
            yield from _split_text(part, pattern, by_content)


def _split_text(
    text: str, pattern: re.Pattern[str], by_content: dict[str, AddedToken]
) -> Iterator[str | int]:
    done = 0
    for match in pattern.finditer(text):
        token = by_content[match.group()]
        start, end = match.span()
        if token.single_word and (
            _WORD.match(text, end) or (start > 0 and _WORD.match(text, start - 1))
        ):
            continue
        if token.lstrip:
            start = done + len(text[done:start].rstrip(WHITESPACE))
        if token.rstrip:
            end = _SPACES.match(text, end).end()  # type: ignore[union-attr]  # matches always
        if start > done:
            yield text[done:start]
        yield token.id
        done = end
    if done < len(text):
        yield text[done:]
