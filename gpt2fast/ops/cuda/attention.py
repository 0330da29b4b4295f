"""Attention over whole sequences as CUDA kernels (csrc/kernels/attention*.cuh).

In 16 bits they read 16 bytes at a time, where queries, keys and values lie; what is not aligned to
that is copied, and heads of another size than a multiple of 8 are filled up with zeros. The seed of
dropout is read on the GPU. The backward pass adds up the queries' gradient with atomics, unless
`torch.use_deterministic_algorithms` asks for the same bits in every run.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..backend import Arguments
from ..support import MAX_HEAD_SIZE, Tensors
from . import cuda

MAX_SCALE = 1000.0
"""In 16 bits: a score's exponent is its exact product with the scale less the rounded one of the
largest, which lie far apart where scores are beyond 10^8."""


def _refuses(call: Arguments) -> str | None:
    if call.q.dtype != torch.float32 and abs(call.scale) > MAX_SCALE:
        return f"the CUDA kernels take scales up to {MAX_SCALE:g} in 16 bits, not {call.scale:g}"
    return None


@cuda(
    Tensors("q", "k", "v", one_dtype=True, max_head_size=MAX_HEAD_SIZE),
    Tensors("mask", "seed"),
    refuses=_refuses,
)
def forward(call: Arguments) -> tuple[Tensor, Tensor]:
    out, lse = torch.ops.gpt2fast_cuda.attention(
        *map(_heads, (call.q, call.k, call.v)), *_options(call)
    )
    return _without_filling(out, call.q), lse


@cuda(
    Tensors("q", "k", "v", "grad", "out", one_dtype=True, max_head_size=MAX_HEAD_SIZE),
    Tensors("mask", "seed"),
    refuses=_refuses,
)
def backward(call: Arguments) -> tuple[Tensor, Tensor, Tensor]:
    gradients = torch.ops.gpt2fast_cuda.attention_backward(
        *map(_heads, (call.grad, call.q, call.k, call.v, call.out)),
        call.lse.contiguous(),
        *_options(call),
        torch.are_deterministic_algorithms_enabled(),
    )
    return tuple(_without_filling(gradient, call.q) for gradient in gradients)  # type: ignore


def _heads(x: Tensor) -> Tensor:
    if x.dtype != torch.float32 and x.shape[-1] % 8:
        return F.pad(x, (0, -x.shape[-1] % 8)).contiguous()
    aligned = x.dtype == torch.float32 or (
        x.data_ptr() % 16 == 0 and all(stride % 8 == 0 for stride in x.stride()[:3])
    )
    if aligned and x.stride(3) == 1:
        return x
    return x.clone(memory_format=torch.contiguous_format)


def _without_filling(x: Tensor, given: Tensor) -> Tensor:
    width = given.shape[-1]
    return x if x.shape[-1] == width else x[..., :width].contiguous()


def _options(call: Arguments) -> tuple[float, Tensor | None, float, Tensor | None, bool]:
    """Scale, visible keys, dropout, seed and causality, as the kernels take them."""
    mask = None if call.mask is None else call.mask.contiguous()
    if call.seed is None or not call.dropout_p:
        return call.scale, mask, 0.0, None, call.causal
    return call.scale, mask, call.dropout_p, call.seed, call.causal
