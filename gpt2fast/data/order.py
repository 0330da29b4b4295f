"""In which order training windows are drawn: each order is a function of the seed and a number.

Nothing is stored that grows with the data, and any place of an order is computed at once, so a run
can continue anywhere, and several processes can each draw their share.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate

import numpy as np

ORDERS = (1, 2)
"""Versions of the order of random windows: 1 draws a batch at a time, from the seed and the batch's
number, so that it depends on the size of batches; 2 draws window by window. Checkpoints say which
theirs is, those that do not have 1."""
_ROUNDS = 6
_WEIGHT_BITS = 53


class Permutation:
    """A random permutation of 0 … size - 1 that takes no memory: `permutation[i]`.

    A Feistel network over the next power of four, walked until it lands inside (Black & Rogaway,
    "Ciphers with Arbitrary Finite Domains", 2002): about two steps on average, four at most.
    """

    def __init__(self, size: int, key: str) -> None:
        self.size = size
        self._half_bits = max(1, ((size - 1).bit_length() + 1) // 2)
        self._mask = (1 << self._half_bits) - 1
        digest = hashlib.sha512(key.encode()).digest()
        self._keys = [int.from_bytes(digest[8 * i : 8 * i + 8], "little") for i in range(_ROUNDS)]

    def __getitem__(self, index: int) -> int:
        if not 0 <= index < self.size:
            raise IndexError(f"place {index} of a permutation of {self.size}")
        bits, mask = self._half_bits, self._mask
        while True:
            left, right = index >> bits, index & mask
            for key in self._keys:
                mixed = (right + key) * 0x9E3779B97F4A7C15 & 0xFFFFFFFFFFFFFFFF
                mixed = (mixed ^ mixed >> 32) * 0xD6E8FEB86659FD93 & 0xFFFFFFFFFFFFFFFF
                left, right = right, left ^ (mixed ^ mixed >> 32) & mask
            index = left << bits | right
            if index < self.size:
                return index


class RandomOrder:
    """Starts of windows drawn independently: number i is a function of the seed and i alone.

    SplitMix64 (Steele, Lea and Flood, "Fast Splittable Pseudorandom Number Generators", 2014),
    whose state after i steps is known at once.
    """

    def __init__(self, windows: int, seed: str) -> None:
        self._windows = np.uint64(windows)
        self._key = np.uint64(int.from_bytes(hashlib.sha256(seed.encode()).digest()[:8], "little"))

    def starts(self, indices: Sequence[int]) -> list[int]:
        """Starts of the windows number `indices` of the run."""
        mixed = np.array(indices, np.uint64) * np.uint64(0x9E3779B97F4A7C15) + self._key
        mixed = (mixed ^ mixed >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
        mixed = (mixed ^ mixed >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
        return ((mixed ^ mixed >> np.uint64(31)) % self._windows).tolist()


class EpochOrder:
    """Starts of windows such that an epoch takes every window exactly once.

    An epoch has an offset in [0, block_size), and its windows begin at offset, offset +
    block_size, … as long as the window and its last target fit: they do not overlap, and all but
    fewer than block_size tokens at either end are predicted once. The first offset is 0. In
    block_size epochs every offset comes once, so that every start in the text is used exactly once
    before one comes again. Offsets and the windows of an epoch are permuted by the seed.
    """

    def __init__(self, tokens: int, block_size: int, seed: str) -> None:
        self.block_size = block_size
        self.seed = seed
        self._tokens = tokens
        self._cycle_windows = tokens - block_size
        """Windows of block_size epochs together: every start that has a target."""
        self._cycle: tuple[int, list[int], list[int]] = (-1, [], [])

    def __getitem__(self, index: int) -> int:
        """Start of window number `index` of the run (0, 1, 2, …)."""
        cycle, place = divmod(index, self._cycle_windows)
        offsets, ends = self._offsets(cycle)
        turn = bisect_right(ends, place)
        first = ends[turn - 1] if turn else 0
        order = Permutation(ends[turn] - first, f"{self.seed}:{cycle}:{turn}")
        return offsets[turn] + order[place - first] * self.block_size

    def starts(self, indices: Sequence[int]) -> list[int]:
        """Starts of the windows number `indices` of the run."""
        return [self[index] for index in indices]

    def _offsets(self, cycle: int) -> tuple[list[int], list[int]]:
        """Offset of each epoch of the cycle, and the number of windows up to its end."""
        known, offsets, ends = self._cycle
        if known != cycle:
            size = self.block_size
            order = Permutation(size, f"{self.seed}:{cycle}")
            offsets = [(order[turn] - order[0]) % size for turn in range(size)]
            last = self._tokens - 1
            ends = list(accumulate(max(0, last - offset) // size for offset in offsets))
            self._cycle = cycle, offsets, ends
        return offsets, ends


class Turns:
    """The corpus that each window comes from, in fixed proportion to their weights.

    `turns[i]` is the corpus of window i of the run, and the number of windows before it that came
    from the same corpus. Among any n windows in a row each corpus has its share of n, give or take
    one for each corpus: no draw by chance, so nothing to be unlucky with.
    """

    def __init__(self, weights: Sequence[float]) -> None:
        rest, self._shares = list(accumulate(reversed(weights))), []
        for weight, total in zip(weights, reversed(rest), strict=True):
            self._shares.append(round(weight / total * (1 << _WEIGHT_BITS)))
        self._shares[-1] = 1 << _WEIGHT_BITS

    def __getitem__(self, index: int) -> tuple[int, int]:
        for corpus, share in enumerate(self._shares):
            before = index * share >> _WEIGHT_BITS
            if (index + 1) * share >> _WEIGHT_BITS > before:
                return corpus, before
            index -= before
        raise AssertionError("the last corpus takes what is left")
