"""What a whole step of GPT-2 asks of its arguments on CUDA tensors."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from . import CACHE_DTYPES, kernels, unsuitable
from .cached_attention import HEAD_DIM

ROWS = 64
"""Rows of the caches from which matrix products on tensor cores are faster."""
WIDTH = 6144
"""Of a model at most: its activations have to fit into shared memory."""


def run(
    weights: Sequence[Tensor],
    k_cache: Tensor,
    v_cache: Tensor,
    tokens: Tensor,
    positions: Tensor,
    lengths: Tensor,
    n_head: int,
    scales: Sequence[float],
    activation: str,
    eps: float,
    k_scales: Tensor | None = None,
    v_scales: Tensor | None = None,
) -> Tensor:
    """`decode_step`."""
    weights = [weight.contiguous() if weight.dim() == 1 else weight for weight in weights]
    return kernels(tokens).decode_step(
        weights, k_cache, v_cache, tokens, positions, lengths, scales, eps, k_scales, v_scales
    )


def refuses(
    weights: Sequence[Tensor],
    k_cache: Tensor,
    v_cache: Tensor,
    tokens: Tensor,
    positions: Tensor,
    lengths: Tensor,
    n_head: int,
    scales: Sequence[float],
    activation: str,
    eps: float,
    k_scales: Tensor | None = None,
    v_scales: Tensor | None = None,
) -> str | None:
    """Why `run` cannot take these, or None."""
    reason = (
        unsuitable(*weights, one_dtype=True)
        or unsuitable(k_cache, v_cache, dtypes=CACHE_DTYPES, one_dtype=True)
        or unsuitable(
            *(weights[0], k_cache, tokens, positions, lengths, k_scales, v_scales),
            dtypes=CACHE_DTYPES,
        )
    )
    if reason is not None:
        return reason
    if activation != "gelu_new":
        return f"the CUDA kernels have gelu_new as activation, not {activation}"
    if len(tokens) > ROWS:
        return f"the CUDA kernels take up to {ROWS} rows, not {len(tokens)}"
    if weights[0].shape[1] > WIDTH:
        return f"the CUDA kernels take models up to {WIDTH} wide, not {weights[0].shape[1]}"
    if k_cache.shape[-1] > HEAD_DIM:
        return f"the CUDA kernels take heads of size up to {HEAD_DIM}, not {k_cache.shape[-1]}"
    matrices = [x for x in (*weights, k_cache, v_cache) if x.dim() > 1]
    if any(x.stride(-1) != 1 and x.shape[-1] != 1 for x in matrices):
        return "the CUDA kernels read matrices and caches whose last dimension is contiguous"
    return None
