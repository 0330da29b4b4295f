"""A whole step of GPT-2 as CUDA kernels (csrc/kernels/decode.cuh)."""

from __future__ import annotations

from torch import Tensor

from ..backend import Arguments
from ..support import GPU_CACHE_DTYPES, MAX_HEAD_SIZE, Tensors
from . import cuda, kernels

ROWS = 64
"""Rows of the caches from which matrix products on tensor cores are faster."""
WIDTH = 6144
"""Largest width of a model: its activations have to fit in shared memory."""


def _refuses(call: Arguments) -> str | None:
    width = call.weights[0].shape[1]
    if call.activation != "gelu_new":
        return f"the CUDA kernels have gelu_new as activation, not {call.activation}"
    if len(call.tokens) > ROWS:
        return f"the CUDA kernels take up to {ROWS} rows, not {len(call.tokens)}"
    if width > WIDTH:
        return f"the CUDA kernels take models up to {WIDTH} wide, not {width}"
    if any(x.stride(-1) != 1 and x.shape[-1] != 1 for x in call.weights if x.dim() > 1):
        return "the CUDA kernels read matrices whose last dimension is contiguous"
    return None


@cuda(
    Tensors("weights", one_dtype=True),
    Tensors(
        "k_cache", "v_cache", dtypes=GPU_CACHE_DTYPES,
        one_dtype=True, contiguous_rows=True, max_head_size=MAX_HEAD_SIZE,
    ),
    Tensors("tokens", "positions", "lengths", "k_scales", "v_scales"),
    refuses=_refuses,
)  # fmt: skip
def run(call: Arguments) -> Tensor:
    weights = [weight.contiguous() if weight.dim() == 1 else weight for weight in call.weights]
    return kernels(call.tokens).decode_step(
        weights, call.k_cache, call.v_cache, call.tokens, call.positions, call.lengths,
        call.attention_scales, call.eps, call.k_scales, call.v_scales,
    )  # fmt: skip
