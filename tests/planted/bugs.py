"""Planted bugs: a kernel's expression replaced by a wrong one, and tests that must notice."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Bug:
    """A mistake that somebody could make in a kernel."""

    name: str
    """The mistake, in the table's words."""
    file: str
    """Below the repository's root."""
    place: str
    """Text that the file has once, the expression that is replaced between « and »."""
    wrong: str
    """The expression that replaces it."""
    tests: tuple[str, ...]
    """Node ids below tests/ops, or below tests/ if they have a slash; one at least must fail."""
    isa: str = ""
    """The instruction set that has the place, if others have not."""

    def span(self, text: str) -> tuple[int, int]:
        """Begin and end of the expression in `text`."""
        before, _, rest = self.place.partition("«")
        right, mark, after = rest.partition("»")
        if not mark or not right:
            raise ValueError(f"{self.name}: the place marks no expression with « and »")
        found = text.count(before + right + after)
        if found != 1:
            raise ValueError(f"{self.name}: {self.file} has its place {found} times, not once")
        begin = text.index(before + right + after) + len(before)
        return begin, begin + len(right)

    def node_ids(self) -> list[str]:
        """The tests as pytest takes them from the repository's root."""
        return [f"tests/{name}" if "/" in name else f"tests/ops/{name}" for name in self.tests]


def planted(text: str, bugs: Sequence[Bug], replacement: Callable[[Bug, str], str]) -> str:
    """`text` with all of these bugs in it.

    Args:
        text: a file.
        bugs: of that file; no two may replace the same characters.
        replacement: what stands where a bug's right expression, its second argument, stood.
    """
    spans = sorted(((*bug.span(text), bug) for bug in bugs), key=lambda each: each[:2])
    for (_, end, one), (begin, _, other) in itertools.pairwise(spans):
        if begin < end:
            raise ValueError(f"{one.name!r} and {other.name!r} replace the same characters")
    for begin, end, bug in reversed(spans):
        text = text[:begin] + replacement(bug, text[begin:end]) + text[end:]
    return text
