"""Keys and values as 8-bit integers, with a float32 factor for each head's entry.

    scales[b, s, h]    = max_d |x[b, s, h, d]| / 127
    stored[b, s, h, d] = round(x[b, s, h, d] * 127 / max_d |x[b, s, h, d]|)     halves to even
    dequantized        = stored[b, s, h, d] * scales[b, s, h]

All of it is computed in float32, by every implementation alike, so that all write the same bytes.
64 elements of a head take 68 bytes, in bfloat16 128.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import ArgumentError
from .backend import Arguments


def stored(entries: Tensor) -> tuple[Tensor, Tensor]:
    """Entries (..., D) as int8, and their factors (...). An entry with a NaN has the factor NaN."""
    entries = entries.float()
    largest = entries.abs().amax(-1)
    # A tensor, since torch may multiply by the reciprocal of a number, which rounds twice.
    most = largest.new_full((), 127.0)
    # An entry of zeros has the factor 0.
    inverse = most / largest.clamp(min=1e-30)
    rounded = (entries * inverse[..., None]).round().clamp(-127, 127)
    return rounded.nan_to_num().to(torch.int8), largest / most


def dequantize(cache: Tensor, scales: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Entries (..., D) of a cache in `dtype`; a floating-point cache has no factors."""
    entries = cache.to(dtype)
    return entries if scales is None else entries * scales.to(dtype)[..., None]


def check_caches(call: Arguments, dims: int, says: str) -> None:
    """Check that caches have `dims` dimensions, one shape, and hold floating point or int8.

    Raises:
        ArgumentError: they do not.
    """
    k_cache, v_cache = call.k_cache, call.v_cache
    if k_cache.dim() != dims or k_cache.shape != v_cache.shape:
        raise ArgumentError(
            f"k_cache {tuple(k_cache.shape)} and v_cache {tuple(v_cache.shape)} must share one "
            f"shape {says}"
        )
    for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        if not (cache.is_floating_point() or cache.dtype == torch.int8):
            raise ArgumentError(f"{name} must be floating point or int8, not {cache.dtype}")


def check_scales(call: Arguments) -> None:
    """Check that caches (..., D) have the factors that they need, of shape (...), and no others.

    Raises:
        ArgumentError: they have not.
    """
    k_cache, v_cache = call.k_cache, call.v_cache
    for name, cache, scales in (("k", k_cache, call.k_scales), ("v", v_cache, call.v_scales)):
        if cache.dtype != torch.int8:
            if scales is not None:
                raise ArgumentError(
                    f"{name}_scales are the factors of an int8 cache, and {name}_cache is "
                    f"{cache.dtype}; leave them out"
                )
        elif scales is None:
            raise ArgumentError(
                f"{name}_cache is int8 and needs {name}_scales, a float32 factor for each head's "
                f"entry: {tuple(cache.shape[:-1])}; KVCache(dtype=torch.int8) has them"
            )
        elif scales.shape != cache.shape[:-1] or scales.dtype != torch.float32:
            raise ArgumentError(
                f"{name}_scales must be float32 {tuple(cache.shape[:-1])}, a factor for each "
                f"head's entry of {name}_cache, not {scales.dtype} {tuple(scales.shape)}"
            )
    if k_cache.dtype != v_cache.dtype and torch.int8 in (k_cache.dtype, v_cache.dtype):
        raise ArgumentError(
            f"k_cache is {k_cache.dtype} and v_cache {v_cache.dtype}; both are int8 or none"
        )
