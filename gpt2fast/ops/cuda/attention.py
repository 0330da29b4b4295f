"""Causal attention over whole sequences as CUDA kernels (csrc/kernels/attention*.cuh).

In 16 bits they read 16 bytes at a time, where queries, keys and values lie; what is not aligned to
that is copied, and heads of another size than a multiple of 8 are filled up with zeros. The seed of
dropout is read on the GPU. The backward pass adds up the queries' gradient with atomics, unless
`torch.use_deterministic_algorithms` asks for the same bits in every run.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from . import unsuitable

MAX_HEAD_DIM = 128
MAX_SCALE = 1000.0
"""In 16 bits: a score's exponent is its exact product with the scale less the rounded one of the
largest, which lie far apart where scores are beyond 10^8."""


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    mask: Tensor | None,
    dropout_p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    out, lse = torch.ops.gpt2fast_cuda.attention(
        *map(_heads, (q, k, v)), scale, *_optional(mask, dropout_p, seed)
    )
    return _without_filling(out, q), lse


def refuses(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    mask: Tensor | None,
    dropout_p: float,
    seed: Tensor | None,
) -> str | None:
    return _refuses(scale, mask, seed, q, k, v)


def backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
    mask: Tensor | None,
    dropout_p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    gradients = torch.ops.gpt2fast_cuda.attention_backward(
        *map(_heads, (grad, q, k, v, out)),
        lse.contiguous(),
        scale,
        *_optional(mask, dropout_p, seed),
        torch.are_deterministic_algorithms_enabled(),
    )
    grad_q, grad_k, grad_v = (_without_filling(gradient, q) for gradient in gradients)
    return grad_q, grad_k, grad_v


def backward_refuses(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
    mask: Tensor | None,
    dropout_p: float,
    seed: Tensor | None,
) -> str | None:
    return _refuses(scale, mask, seed, q, k, v, grad, out)


def _refuses(scale: float, mask: Tensor | None, seed: Tensor | None, *heads: Tensor) -> str | None:
    reason = unsuitable(*heads, mask, seed, one_dtype=True)
    if reason is not None:
        return reason
    if seed is not None and seed.dtype != torch.int64:
        return f"the CUDA kernels take a seed in int64, not {seed.dtype}"
    if heads[0].dtype != torch.float32 and abs(scale) > MAX_SCALE:
        return f"the CUDA kernels take scales up to {MAX_SCALE:g} in 16 bits, not {scale:g}"
    head_dim = heads[0].shape[-1]
    if head_dim > MAX_HEAD_DIM:
        return f"the CUDA kernels take heads of size up to {MAX_HEAD_DIM}, not {head_dim}"
    return None


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
    return x if x.shape == given.shape else x[..., : given.shape[-1]].contiguous()


def _optional(
    mask: Tensor | None, dropout_p: float, seed: Tensor | None
) -> tuple[Tensor | None, float, Tensor | None]:
    if seed is None or not dropout_p:
        dropout_p, seed = 0.0, None
    return None if mask is None else mask.contiguous(), dropout_p, seed
