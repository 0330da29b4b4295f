"""Masks of tokens, from booleans to bits and back, and draws under them, in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor


def words_of(allowed: Tensor, beyond: int = 1) -> Tensor:
    """(B, ceil(V / 32)) int32 of (B, V) bool; `beyond` is the value of the bits from V on."""
    rows, size = allowed.shape
    words = -(-size // 32)
    bits = torch.full((rows, 32 * words), beyond, dtype=torch.int64)
    bits[:, :size] = allowed.long()
    values = (bits.view(rows, words, 32) << torch.arange(32)).sum(-1)
    return torch.where(values >= 2**31, values - 2**32, values).int()


def tokens_of(words: Tensor, size: int) -> list[int]:
    """The tokens below `size` that one row of words allows."""
    return [i for i in range(size) if int(words[i // 32]) >> (i % 32) & 1]


def assert_follows(counts: Tensor, expected: Tensor) -> None:
    """Pearson's test of counts against what is expected: it fails once in a thousand by chance."""
    statistic = float(((counts - expected) ** 2 / expected).sum())
    freedom = len(counts) - 1
    # Wilson and Hilferty: the cube root is nearly normal.
    part = 2 / (9 * freedom)
    assert (statistic / freedom) ** (1 / 3) < 1 - part + 3.09 * part**0.5, statistic
