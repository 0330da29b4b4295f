"""The interface of a peer's module: storing a model, and an engine that decodes greedily.

A module of a peer has

    WEIGHTS = ("float32", ...)                             the formats it has
    def convert(checkpoint, weights, target): ...          writes the file or folder `target`
    class Engine:
        def __init__(self, target, weights, threads): ...
        version: str
        def generate(self, prompts, new) -> Run: ...

and imports nothing outside its environment but `checkpoint`, `gguf_file` and this file. A peer
without a format of its own (it reads the directory itself) leaves `convert` out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

Prompts = Sequence[Sequence[int]]
"""Token ids of each row; all rows have the same length."""


@dataclass(frozen=True)
class Run:
    """One greedy continuation of a batch."""

    prefill_seconds: float
    """From the call to the moment when every row has its first token."""
    decode_seconds: float
    """For the remaining tokens."""
    tokens: list[list[int]]
    """The new tokens of each row."""
    decode_bytes: int | None = None
    """Weights, keys and values that decoding read, where the engine knows."""
