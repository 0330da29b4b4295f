"""Perplexity of any text file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..data.detection import read_as_prepared
from .task import Cut, Document, TextTask


def plain(text: str) -> Document:
    """A text as it is: words are what white space separates, bytes those of UTF-8."""
    return Document(
        text,
        {"word": len(text.split()), "byte": len(text.encode()), "character": len(text)},
    )


class Perplexity(TextTask):
    """The whole file as one text, as `prepare` reads it: of records, the text of each."""

    name = "perplexity"
    about = "any text file (--data FILE): per token, word, byte and character"
    advice = "it is for any text of yours"
    metrics = {
        "token_perplexity": "token",
        "word_perplexity": "word",
        "byte_perplexity": "byte",
        "character_perplexity": "character",
        "bits_per_byte": "byte",
        "bits_per_character": "character",
    }

    def read(self, path: Path) -> list[Document]:
        """Same as `Task.read`."""
        return [plain(read_as_prepared(path))]

    def shorten(self, documents: Sequence[Document], count: int, cut: Cut) -> Sequence[Document]:
        """The part of the text that fits in the windows that --limit leaves."""
        return [plain(cut(document.text)) for document in documents]
