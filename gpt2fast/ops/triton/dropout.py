"""Which weights of attention dropout drops.

Dropout drops the weight of query t and key s where 16 bits of Philox 4x32-10 (Salmon et al., 2011)
are below a threshold: counter (s / 32 * 4 + s % 8 / 2, t, b * H + h, 0), word s / 8 % 4, low half
for even s. It is the mask of the CUDA kernels.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..backend import Arguments


@triton.jit
def keep_mask(seed, rows, first, head, threshold, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """(BLOCK_M, BLOCK_N): true where dropout keeps the weight of a query in `rows` and a key."""
    counters = first // 8 + tl.arange(0, BLOCK_N // 8)
    words = tl.philox(seed, counters[None, :], rows[:, None], head, 0)
    a, b, c, d = (
        _halves(words[0], threshold, BLOCK_M, BLOCK_N),
        _halves(words[1], threshold, BLOCK_M, BLOCK_N),
        _halves(words[2], threshold, BLOCK_M, BLOCK_N),
        _halves(words[3], threshold, BLOCK_M, BLOCK_N),
    )
    # (query, key / 32, key % 8 / 2, key % 2, key / 16 % 2, key / 8 % 2)
    joined = tl.join(tl.join(a, c), tl.join(b, d))
    return tl.reshape(tl.permute(joined, (0, 1, 4, 5, 2, 3)), (BLOCK_M, BLOCK_N)) != 0


@triton.jit
def _halves(words, threshold, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    words = tl.reshape(words, (BLOCK_M, BLOCK_N // 32, 4))
    low = ((words & 0xFFFF) >= threshold).to(tl.int8)
    return tl.join(low, ((words >> 16) >= threshold).to(tl.int8))


def dropout_of(call: Arguments) -> tuple[Tensor | None, int, float]:
    """Seed (None without dropout), threshold below which 16 random bits drop a weight, and the
    factor on kept weights."""
    threshold = round(call.dropout_p * 65536)
    if call.seed is None or not threshold:
        return None, 0, 1.0
    return call.seed, threshold, 65536 / (65536 - threshold) if threshold < 65536 else 0.0
