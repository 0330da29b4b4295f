"""Philox 4x32-10 (Salmon et al., 2011), and which attention weights it drops, in numpy."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def philox(seed: int, *counter: np.ndarray) -> list[np.ndarray]:
    """Four words of 32 random bits (as uint64) for four counters of 32 bits and one 64-bit seed."""
    low, shift = np.uint64(0xFFFFFFFF), np.uint64(32)
    words = [word.astype(np.uint64) for word in np.broadcast_arrays(*counter)]
    key = [seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF]
    for _ in range(10):
        x, y = np.uint64(0xD2511F53) * words[0], np.uint64(0xCD9E8D57) * words[2]
        words = [
            (y >> shift) ^ words[1] ^ np.uint64(key[0]),
            y & low,
            (x >> shift) ^ words[3] ^ np.uint64(key[1]),
            x & low,
        ]
        key = [(key[0] + 0x9E3779B9) % 2**32, (key[1] + 0xBB67AE85) % 2**32]
    return words


def cpu_factors(p: float, seed: int, batch: int, heads: int, time: int) -> Tensor:
    """(batch, heads, query, key) factors of the CPU kernels' dropout: 24 bits a weight."""
    head, query, key = np.ogrid[: batch * heads, :time, : -(-time // 4)]
    words = philox(seed, key, query, head, np.zeros(1, np.int64))
    uniforms = np.stack([word >> np.uint64(8) for word in words], -1).astype(np.float32) * 2.0**-24
    kept = torch.from_numpy(uniforms.reshape(batch, heads, time, -1)[..., :time]) >= p
    return kept / (1.0 - p)


def gpu_factors(p: float, seed: int, batch: int, heads: int, time: int) -> Tensor:
    """(batch, heads, query, key) factors of the GPU kernels' dropout: 16 bits a weight."""
    head, query, key = np.ogrid[: batch * heads, :time, :time]
    counter = key // 32 * 4 + key % 8 // 2
    words = np.stack(philox(seed, counter, query, head, np.zeros(1, np.int64)))
    word = np.broadcast_to(key // 8 % 4, words.shape[1:])[None]
    bits = np.take_along_axis(words, word, 0)[0] >> (key % 2 * 16).astype(np.uint64)
    threshold = round(p * 65536)
    kept = torch.from_numpy((bits & np.uint64(0xFFFF)).astype(np.int64)) >= threshold
    return kept.view(batch, heads, time, time) * (65536 / (65536 - threshold))
