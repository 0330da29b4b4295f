"""Tokenizers: text to token ids and back, the same ids as transformers' for the same files."""

from __future__ import annotations

from .added_tokens import END_OF_TEXT, AddedToken
from .base import StreamDecoder, Tokenizer
from .bpe import BPETokenizer
from .char import CharTokenizer
from .huggingface import LibraryTokenizer

__all__ = [
    "END_OF_TEXT",
    "AddedToken",
    "BPETokenizer",
    "CharTokenizer",
    "LibraryTokenizer",
    "StreamDecoder",
    "Tokenizer",
]
