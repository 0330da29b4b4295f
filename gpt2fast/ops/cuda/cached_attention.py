"""What attention to a cache asks of its arguments on CUDA tensors."""

from __future__ import annotations

import torch
from torch import Tensor

from . import CACHE_DTYPES, kernels, unsuitable

HEAD_DIM = 128
"""Elements that a head has at most."""


def run(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    scale: float,
    k_scales: Tensor | None = None,
    v_scales: Tensor | None = None,
) -> Tensor:
    """`attention_with_cache`."""
    if q.stride(-1) != 1:
        q = q.contiguous()
    return kernels(q).attention_with_cache(q, k_cache, v_cache, lengths, scale, k_scales, v_scales)


def refuses(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    scale: float,
    k_scales: Tensor | None = None,
    v_scales: Tensor | None = None,
) -> str | None:
    """Why `run` cannot take these, or None."""
    return (
        unsuitable(q, may_be_empty=True)
        or unsuitable(k_cache, v_cache, dtypes=CACHE_DTYPES, one_dtype=True)
        or unsuitable(
            q, k_cache, lengths, k_scales, v_scales, dtypes=CACHE_DTYPES, may_be_empty=True
        )
        or _refuses_shape(q, k_cache, v_cache, lengths)
    )


def _refuses_shape(q: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor) -> str | None:
    if q.shape[-1] > HEAD_DIM:
        return f"the CUDA kernel takes heads of size up to {HEAD_DIM}, not {q.shape[-1]}"
    if q.shape[0] > 65535 or q.shape[1] * q.shape[2] > 65535:
        return "the CUDA kernel takes up to 65535 rows, and queries of all heads"
    if any(cache.stride(-1) != 1 and cache.shape[-1] != 1 for cache in (k_cache, v_cache)):
        return "the CUDA kernel reads caches whose last dimension is contiguous"
    if lengths.dtype != torch.int64:
        return f"the CUDA kernel takes lengths in int64, not {lengths.dtype}"
    return None
