"""Dropout of attention weights, a function of the seed and of the weight's place alone.

The kernels draw Philox 4x32-10 (Salmon et al., 2011) as they go. Here the same numbers come out of
torch's integer operations, for the reference and for derivatives of any order. Kernels on a CPU
spend 24 bits on a weight, those on a GPU 16, laid out as their threads hold the weights.
"""

from __future__ import annotations

import torch
from torch import Tensor

_LOW = 0xFFFFFFFF


def dropout_factors(
    shape: tuple[int, int, int, int], p: float, seed: Tensor, dtype: torch.dtype, *, on_gpu: bool
) -> Tensor:
    """Dropout factors of attention weights: 0, or 1 / the probability of keeping one.

    Args:
        shape: (B, H, T, S) of the weights.
        p: probability of dropping one.
        seed: (1,) int64.
        dtype: of the factors.
        on_gpu: use the layout of random bits of the kernels for GPUs, else of those for CPUs.

    Returns:
        `shape`.
    """
    batch, heads, queries, keys = shape
    device = seed.device
    head = torch.arange(batch * heads, device=device)[:, None, None]
    query = torch.arange(queries, device=device)[:, None]
    per_counter = 8 if on_gpu else 4
    # 32 keys share four counters on a GPU: their last group is drawn whole.
    padded = -(-keys // 32) * 32 if on_gpu else -(-keys // 4) * 4
    counter = torch.arange(padded // per_counter, device=device)
    words = torch.stack(_philox(seed, counter, query, head), -1)
    if on_gpu:
        # Key 32 g + 8 n + 2 j + h has the half h of word n of counter 4 g + j.
        halves = torch.stack([words & 0xFFFF, words >> 16], -1)
        halves = halves.reshape(*words.shape[:2], -1, 4, 4, 2).transpose(3, 4)
        drawn = halves.reshape(*words.shape[:2], padded)[..., :keys]
        threshold = round(p * 65536)
        kept, factor = drawn >= threshold, 65536 / max(1, 65536 - threshold)
    else:
        drawn = words.reshape(*words.shape[:2], padded)[..., :keys]
        kept = (drawn >> 8).to(torch.float32) * 2.0**-24 >= p
        factor = 1.0 / (1.0 - p) if p < 1.0 else 0.0
    return kept.reshape(shape).to(dtype) * factor


def _philox(seed: Tensor, *counters: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four words of 32 random bits for counters of three words that broadcast."""
    c0, c1, c2 = counters
    c3 = torch.zeros_like(c0)
    low, high = seed & _LOW, (seed >> 32) & _LOW
    for _ in range(10):
        # int64 products have the right 64 bits in spite of the sign; the mask cuts off sign bits
        # that the shift brings in.
        x, y = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (
            ((y >> 32) & _LOW) ^ c1 ^ low,
            y & _LOW,
            ((x >> 32) & _LOW) ^ c3 ^ high,
            x & _LOW,
        )
        low, high = (low + 0x9E3779B9) & _LOW, (high + 0xBB67AE85) & _LOW
    c0, c1, c2, c3 = torch.broadcast_tensors(c0, c1, c2, c3)
    return c0, c1, c2, c3
