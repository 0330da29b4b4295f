"""Attention to a cache as CUDA kernels (csrc/kernels/cached_attention.cuh)."""

from __future__ import annotations

from torch import Tensor

from ..backend import Arguments
from ..support import GPU_CACHE_DTYPES, MAX_HEAD_SIZE, Tensors
from . import cuda, kernels

_MOST_BLOCKS = 65535
"""In the second and third dimension of a grid."""


def _refuses(call: Arguments) -> str | None:
    batch, time, heads, _ = call.q.shape
    if batch > _MOST_BLOCKS or time * heads > _MOST_BLOCKS:
        return f"the CUDA kernel takes up to {_MOST_BLOCKS} rows, and queries of all heads"
    return None


@cuda(
    Tensors("q", may_be_empty=True, max_head_size=MAX_HEAD_SIZE),
    Tensors("k_cache", "v_cache", dtypes=GPU_CACHE_DTYPES, one_dtype=True, contiguous_rows=True),
    refuses=_refuses,
)
def run(call: Arguments) -> Tensor:
    q = call.q if call.q.stride(-1) == 1 else call.q.contiguous()
    return kernels(q).attention_with_cache(*call._replace(q=q))
