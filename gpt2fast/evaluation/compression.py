"""enwik8 and text8 (Mahoney, 2011): bits per byte and per character of Wikipedia."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from ..data.opening import TextInput
from ..errors import DataError
from .perplexity import plain
from .task import Cut, Document, TextTask

_WHOLE = 100_000_000
_TEST = 5_000_000


class Enwik8(TextTask):
    """The last five of its hundred million bytes, the customary test set.

    A file of another size is taken for the test set itself. A character that begins before the cut
    is left out.
    """

    name = "enwik8"
    about = "enwik8, its last 5 MB: bits per byte"
    files = ("enwik8", "enwik8.zip", "enwik8.test")
    advice = "mattmahoney.net/dc/enwik8.zip"
    metrics = {"bits_per_byte": "byte", "bits_per_character": "character"}
    published = {"bits_per_byte": (1.16, 1.01, 0.97, 0.93)}
    difference = "the paper does not say which part it measured, nor its windows."

    def read(self, path: Path) -> list[Document]:
        """Same as `Task.read`."""
        data = TextInput(path).read_bytes()
        if len(data) == _WHOLE:
            data = data[-_TEST:]
        start = next((at for at, byte in enumerate(data[:4]) if byte & 0xC0 != 0x80), 0)
        try:
            text = data[start:].decode()
        except UnicodeDecodeError as error:
            if error.end < len(data) - start or len(data) - start - error.start > 3:
                raise DataError(
                    f"{path} is not UTF-8 text: at byte {start + error.start}, {error.reason}"
                ) from None
            text = data[start : start + error.start].decode()
        self._check(path, text)
        return [plain(text)] if text else []

    def _check(self, path: Path, text: str) -> None:
        if text and "</" not in text:
            raise DataError(
                f"{path} has no markup: it is not enwik8, Wikipedia in XML; task perplexity scores "
                "any text"
            )

    def shorten(self, documents: Sequence[Document], count: int, cut: Cut) -> Sequence[Document]:
        """Same as `Perplexity.shorten`."""
        return [plain(cut(document.text)) for document in documents]


class Text8(Enwik8):
    """enwik8 reduced to 27 characters of one byte each."""

    name = "text8"
    about = "text8, its last 5 MB: bits per character"
    files = ("text8", "text8.zip", "text8.test")
    advice = "mattmahoney.net/dc/text8.zip"
    metrics = {"bits_per_character": "character"}
    published = {"bits_per_character": (1.17, 1.06, 1.02, 0.98)}

    def _check(self, path: Path, text: str) -> None:
        other = re.search("[^a-z ]", text)
        if other is not None:
            raise DataError(
                f"{path} holds {other[0]!r}: it is not text8, small letters and spaces; task "
                "perplexity scores any text"
            )
