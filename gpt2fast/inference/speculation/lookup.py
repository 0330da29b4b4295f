"""Proposals without a model: what followed the same tokens earlier (prompt lookup, Saxena, 2023).

Code, JSON, quotations and answers about a text repeat what stands in it. The longest of the last
few tokens that occurred before are looked up in the row's own text, then in texts that have ended.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Sequence

from .drafter import DraftRow
from .lengths import Chance, DraftLengths

SIZES = (8, 5, 3, 2)
"""Numbers of tokens that are looked up in a row's own text, the most telling first."""
POOLED = 5
"""Number of tokens that are looked up in texts that have ended."""
_RATES = {8: 0.8, 5: 0.6, 3: 0.35, 2: 0.2}
"""Share of places that are right after so many equal tokens, before it is known."""


class TextIndex:
    """The places of the n-grams of one text, which grows at its end."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self._places: dict[int, dict[tuple[int, ...], int]] = {size: {} for size in SIZES}

    def extend(self, tokens: Sequence[int]) -> None:
        """Take over what a longer state of the text has more: O(1) for each token."""
        known = self.tokens
        for token in tokens[len(known) :]:
            end = len(known)
            for size, places in self._places.items():
                if end >= size:
                    places[tuple(known[end - size :])] = end
            known.append(token)

    def find(self) -> tuple[int, int] | None:
        """The place of what followed the longest end of the text that occurred before (the latest
        time that it did), and that end's size; None where even the shortest is new."""
        known = self.tokens
        for size, places in self._places.items():
            if len(known) >= size:
                place = places.get(tuple(known[-size:]))
                if place is not None:
                    return place, size
        return None

    def following(self, place: int, count: int) -> list[int]:
        """`count` tokens from a place on; past the end, the text is taken to go on repeating."""
        known = self.tokens
        period = len(known) - place
        return [known[place + number % period] for number in range(count)]


class NgramPool:
    """The n-grams of texts that have ended, for all rows that come after them, in any thread.

    Args:
        capacity: tokens of all texts together, each of which takes about 200 bytes; the oldest
            texts make room for new ones.
    """

    def __init__(self, capacity: int = 65_536):
        self.capacity = capacity
        self.size = 0
        """Tokens of all texts that are kept."""
        self._texts: deque[list[int]] = deque()
        self._lock = threading.Lock()
        self._places: dict[tuple[int, ...], tuple[list[int], int]] = {}

    def add(self, tokens: Sequence[int]) -> None:
        """Keep a text, or the end of one that is too long for the pool."""
        text = list(tokens[-self.capacity :])
        if len(text) <= POOLED:
            return
        with self._lock:
            self._texts.append(text)
            self.size += len(text)
            for end in range(POOLED, len(text)):
                self._places[tuple(text[end - POOLED : end])] = (text, end)
            while self.size > self.capacity:
                self._drop(self._texts.popleft())

    def find(self, tokens: Sequence[int], count: int) -> list[int]:
        """Up to `count` tokens that followed the end of `tokens` in the latest text that has it."""
        found = self._places.get(tuple(tokens[-POOLED:]))
        return [] if found is None else found[0][found[1] : found[1] + count]

    def _drop(self, text: list[int]) -> None:
        self.size -= len(text)
        for end in range(POOLED, len(text)):
            key = tuple(text[end - POOLED : end])
            found = self._places.get(key)
            if found is not None and found[0] is text:
                del self._places[key]


class LookupDrafter:
    """A `Drafter` that looks up how a row's text, or one before it, went on.

    Args:
        pool: of texts that have ended; None keeps none, so that nothing of a row outlives it.
        lengths: decides how many tokens to propose.
    """

    def __init__(self, pool: NgramPool | None = None, lengths: DraftLengths | None = None):
        self._pool = pool
        self._lengths = DraftLengths() if lengths is None else lengths
        self._texts: dict[int, TextIndex] = {}

    def propose(self, rows: Sequence[DraftRow]) -> list[list[int]]:
        """See `Drafter`."""
        found: list[tuple[int, list[int]]] = []
        chances: list[Chance] = []
        for place, row in enumerate(rows):
            if row.most < 1:
                continue
            kind, size, draft = self._find(row)
            if draft:
                found.append((place, draft))
                chances.append(Chance(row.id, kind, _RATES[size], len(draft)))
        proposals: list[list[int]] = [[] for _ in rows]
        if chances:
            lengths = self._lengths.choose(chances, len(rows))
            for (place, draft), length in zip(found, lengths, strict=True):
                proposals[place] = draft[:length]
        self._lengths.start(len(rows) + sum(map(len, proposals)))
        return proposals

    def observe(self, row_id: int, proposed: int, accepted: int, tokens: Sequence[int]) -> None:
        """See `Drafter`."""
        self._lengths.observe(row_id, proposed, accepted)

    def forget(self, row_id: int) -> None:
        """See `Drafter`."""
        self._lengths.forget(row_id)
        text = self._texts.pop(row_id, None)
        if text is not None and self._pool is not None:
            self._pool.add(text.tokens)

    def _find(self, row: DraftRow) -> tuple[str, int, list[int]]:
        """Where the longest match is, its size, and the tokens that followed."""
        text = self._texts.setdefault(row.id, TextIndex())
        text.extend(row.tokens)
        most = min(row.most, self._lengths.most)
        own = text.find()
        if self._pool is not None and (own is None or own[1] < POOLED):
            draft = self._pool.find(text.tokens, most)
            if draft:
                return "pool", POOLED, draft
        if own is None:
            return "own", 0, []
        return f"own {own[1]}", own[1], text.following(own[0], most)
