"""Causal attention, over whole sequences and against a cache (Vaswani et al., 2017, eq. 1).

    scores[b, h, t, s] = scale * sum_d q[b, t, h, d] * k[b, s, h, d]         for visible s
    out[b, t, h, :]    = sum_s softmax_s(scores[b, h, t, :])[s] * v[b, s, h, :]

Position s is visible from t when s <= t and, where a mask is given, mask[b, s] is true. A query
that sees nothing gives zeros. Scores and softmax are computed in at least float32.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..errors import ArgumentError
from .backend import Implementation, Op, autocast, requested_backend, statistics_dtype
from .cuda import attention as on_cuda
from .cuda import by_device, cuda, takes
from .cuda import cached_attention as cached_on_cuda
from .derivatives import is_transformed, wants_graph
from .dropout import dropout_factors
from .int8_cache import check_caches, check_scales, read
from .native import native, refuses_int8, refuses_tensors
from .requirements import (
    check_below_one,
    check_constants,
    check_dim,
    check_finite,
    check_floating,
    check_indices,
    check_integers,
    check_shape,
)
from .triton import refuses_strided_caches, triton, unsuitable


def causal_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None = None,
    mask: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """Attention of each position to itself and the positions before it.

    Args:
        q, k, v: (B, T, H, D), floating point; strided views of one packed (B, T, 3, H, D) tensor
            are read in place.
        scale: finite factor on the scores; None means 1 / sqrt(D).
        mask: (B, T) bool or 0/1, false where a position must not be seen by any other.
        dropout_p: probability of dropping an attention weight, in [0, 1).
        seed: (1,) int64, required with dropout; one seed always drops the same weights.

    Returns:
        (B, T, H, D) in q's dtype.
    """
    if mask is not None:
        mask = mask.bool()
    check_constants(scale=scale, dropout_p=dropout_p)
    q, k, v = autocast(q, k, v)
    scale = _usual_scale(q) if scale is None else scale
    return _forward.call(q, k, v, scale, mask, dropout_p, seed)[0]


def attention_with_cache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    scale: float | None = None,
    k_scales: Tensor | None = None,
    v_scales: Tensor | None = None,
) -> Tensor:
    """Attention of new queries to a cache that already holds their own keys and values.

    Args:
        q: (B, T, H, D), the T newest positions of each row.
        k_cache, v_cache: (B, T_max, H, D).
        lengths: (B,) int64 in 0 .. T_max, entries stored before the new ones: query t of row b
            sees entries 0 .. lengths[b] + t. Of queries that lie past the end of the cache, as
            padding may, the result is unspecified.
        scale: factor on the scores; None means 1 / sqrt(D).
        k_scales, v_scales: (B, T_max, H) float32 factors of int8 caches.

    Returns:
        (B, T, H, D) in q's dtype. Not differentiable.

    Raises:
        ArgumentError: an int8 cache without factors, or factors that don't fit.
    """
    check_constants(scale=scale)
    scale = _usual_scale(q) if scale is None else scale
    return _cached.call(q, k_cache, v_cache, lengths, scale, k_scales, v_scales)


def _usual_scale(q: Tensor) -> float:
    return 1.0 / math.sqrt(max(1, q.shape[-1])) if q.dim() else 1.0


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    mask: Tensor | None,
    dropout_p: float,
    seed: Tensor | None,
) -> None:
    check_floating(q=q, k=k, v=v)
    if q.shape != k.shape or k.shape != v.shape or q.dim() != 4:
        raise ArgumentError(
            f"q, k and v must share one shape (B, T, H, D), not {tuple(q.shape)}, "
            f"{tuple(k.shape)} and {tuple(v.shape)}"
        )
    check_finite(scale=scale)
    if mask is not None:
        check_shape("mask", mask, *q.shape[:2], says="(B, T)")
        if mask.dtype != torch.bool:
            raise ArgumentError(f"mask must be bool, not {mask.dtype}")
    check_below_one(dropout_p=dropout_p)
    if seed is not None:
        check_integers(seed=seed)
        check_shape("seed", seed, 1, says="one number")
    elif dropout_p:
        raise ArgumentError(f"dropout_p={dropout_p} needs seed, a (1,) int64 tensor")


def _check_backward(
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
) -> None:
    _check(q, k, v, scale, mask, dropout_p, seed)
    check_floating(grad=grad, out=out)
    for name, like_q in (("grad", grad), ("out", out)):
        check_shape(name, like_q, *q.shape, says="q's shape")
    batch, time, heads, _ = q.shape
    check_shape("lse", lse, batch, heads, time, says="(B, H, T)")
    if lse.dtype != statistics_dtype(q.dtype):
        raise ArgumentError(f"lse of {q.dtype} queries must not be {lse.dtype}")


def _check_cached(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    scale: float,
    k_scales: Tensor | None = None,
    v_scales: Tensor | None = None,
) -> None:
    check_floating(q=q)
    check_dim("q", q, 4, says="(B, T, H, D)")
    check_caches(k_cache, v_cache, 4, "(B, T_max, H, D)")
    batch, _, heads, width = q.shape
    check_shape(
        "k_cache", k_cache, batch, k_cache.shape[1], heads, width, says="(B, T_max, H, D) beside q"
    )
    check_scales(k_cache, v_cache, k_scales, v_scales)
    check_integers(lengths=lengths)
    check_shape("lengths", lengths, batch, says="(B,)")
    check_finite(scale=scale)


def _check_cached_values(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor, *others: Any
) -> None:
    check_indices("lengths", lengths, 0, k_cache.shape[1], of="what a row of the cache holds")


def _visible(length: int, mask: Tensor | None, device: torch.device) -> Tensor:
    causal = torch.ones(length, length, dtype=torch.bool, device=device).tril()
    return causal if mask is None else causal & mask[:, None, None, :]


def _factors(weights: Tensor, dropout_p: float, seed: Tensor) -> Tensor:
    """By which dropout multiplies them: the kernels' own, wherever these tensors are."""
    batch, heads, queries, keys = weights.shape
    return dropout_factors(
        (batch, heads, queries, keys),
        dropout_p,
        seed,
        weights.dtype,
        on_gpu=takes(weights) or requested_backend() == "triton",
    )


def _weights(
    q: Tensor, k: Tensor, scale: float, mask: Tensor | None, lse: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Attention weights (B, H, T, T) before dropout, and their log-normaliser (B, H, T)."""
    visible = _visible(q.shape[1], mask, q.device)
    scores = torch.einsum("bthd,bshd->bhts", q, k) * scale
    # Of a query that sees nothing, the scores stay finite, and with them the sum's derivatives:
    # exp(score - inf) = 0 makes its weights vanish.
    blind = ~visible.any(-1)
    scores = scores.masked_fill(~(visible | blind[..., None]), -math.inf)
    if lse is None:
        lse = scores.logsumexp(-1).masked_fill(blind, math.inf)
    return (scores - lse[..., None]).exp(), lse


def _reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    mask: Tensor | None,
    dropout_p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    dtype = statistics_dtype(q.dtype)
    weights, lse = _weights(q.to(dtype), k.to(dtype), scale, mask, None)
    if seed is not None and dropout_p:
        weights = weights * _factors(weights, dropout_p, seed)
    out = torch.einsum("bhts,bshd->bthd", weights, v.to(dtype))
    return out.to(q.dtype).contiguous(), lse


def _backward_reference(
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
    dtype = statistics_dtype(q.dtype)
    given = q.dtype
    grad, q, k, v, out = (tensor.to(dtype) for tensor in (grad, q, k, v, out))
    weights, _ = _weights(q, k, scale, mask, lse)
    grad_weights = torch.einsum("bthd,bshd->bhts", grad, v)
    dropped = weights
    if seed is not None and dropout_p:
        factors = _factors(weights, dropout_p, seed)
        dropped = weights * factors
        grad_weights = grad_weights * factors
    grad_v = torch.einsum("bhts,bthd->bshd", dropped, grad)
    inner = (grad * out).sum(-1).transpose(1, 2)
    grad_scores = weights * (grad_weights - inner[..., None]) * scale
    grad_q = torch.einsum("bhts,bshd->bthd", grad_scores, k)
    grad_k = torch.einsum("bhts,bthd->bshd", grad_scores, q)
    return tuple(g.to(given).contiguous() for g in (grad_q, grad_k, grad_v))  # type: ignore


def _flash_refuses(
    scale: float, mask: Tensor | None, dropout_p: float, q: Tensor, *others: Tensor
) -> str | None:
    if scale <= 0:  # it scales after hiding: minus infinity times 0 is no number
        return f"torch's flash attention takes scales above 0, not {scale}"
    if any(other.dtype != q.dtype for other in others):
        return "torch's flash attention takes tensors of one dtype"
    if q.device.type != "cpu":
        return "torch's flash attention is used on the CPU only"
    if mask is not None:
        return "torch's flash attention takes no padding mask here"
    if dropout_p:
        return "torch's flash attention on the CPU has no dropout"
    if not q.numel():
        return "torch's flash attention needs at least one element"
    return None


def _heads_first(*tensors: Tensor) -> list[Tensor]:
    # The kernel takes the last dimension's stride to be 1 without looking.
    return [
        (tensor if tensor.stride(-1) == 1 else tensor.contiguous()).transpose(1, 2)
        for tensor in tensors
    ]


def _flash(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    mask: Tensor | None,
    dropout_p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        *_heads_first(q, k, v), 0.0, True, scale=scale
    )
    return out.transpose(1, 2).contiguous(), lse.contiguous()


def _flash_backward(
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
    gradients = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        *_heads_first(grad, q, k, v, out), lse, 0.0, True, scale=scale
    )
    return tuple(gradient.transpose(1, 2).contiguous() for gradient in gradients)  # type: ignore


def _contiguous_heads(*tensors: Tensor) -> list[Tensor]:
    return [tensor if tensor.stride(-1) == 1 else tensor.contiguous() for tensor in tensors]


def _seed(dropout_p: float, seed: Tensor | None) -> int:
    return int(seed.item()) if seed is not None and dropout_p else 0


def _visible_keys(mask: Tensor | None) -> Tensor | None:
    return None if mask is None else mask.contiguous()


def _native(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    mask: Tensor | None,
    dropout_p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    return torch.ops.gpt2fast_native.attention(
        *_contiguous_heads(q, k, v), scale, _visible_keys(mask), dropout_p, _seed(dropout_p, seed)
    )


def _backward_native(
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
    return torch.ops.gpt2fast_native.attention_backward(
        *_contiguous_heads(grad, q, k, v, out),
        lse.contiguous(),
        scale,
        _visible_keys(mask),
        dropout_p,
        _seed(dropout_p, seed),
    )


def _native_refuses(*tensors: Tensor) -> str | None:
    if not tensors[0].numel():
        return "the native kernels need at least one element"
    return refuses_tensors(*tensors)


def _cached_reference(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    scale: float,
    k_scales: Tensor | None = None,
    v_scales: Tensor | None = None,
) -> Tensor:
    if q.device.type == "cpu" and not is_transformed():
        # Only the part in use; elsewhere, reading the longest row's length would wait for the GPU.
        longest = int(lengths.max()) if len(lengths) else 0
        used = min(longest + q.shape[1], k_cache.shape[1])
        k_cache, v_cache = k_cache[:, :used], v_cache[:, :used]
        if k_scales is not None and v_scales is not None:
            k_scales, v_scales = k_scales[:, :used], v_scales[:, :used]
    dtype = statistics_dtype(q.dtype)
    scores = torch.einsum("bthd,bshd->bhts", q.to(dtype), read(k_cache, k_scales, dtype)) * scale
    newest = lengths[:, None] + torch.arange(q.shape[1], device=q.device)
    hidden = torch.arange(k_cache.shape[1], device=q.device) > newest[:, None, :, None]
    weights = scores.masked_fill(hidden, -math.inf).softmax(-1)
    # Entries past a row's end may hold anything, NaN included; 0 * NaN must not reach the sum.
    past_end = hidden[:, 0, -1:].any(1)  # of no query, none
    v_cache = read(v_cache, v_scales, dtype).masked_fill(past_end[:, :, None, None], 0.0)
    return torch.einsum("bhts,bshd->bthd", weights, v_cache).to(q.dtype).contiguous()


def _cached_native(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    scale: float,
    k_scales: Tensor | None = None,
    v_scales: Tensor | None = None,
) -> Tensor:
    if q.stride(-1) != 1:
        q = q.contiguous()
    return torch.ops.gpt2fast_native.attention_with_cache(q, k_cache, v_cache, lengths, scale)


def _cached_native_refuses(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    scale: float,
    k_scales: Tensor | None = None,
    v_scales: Tensor | None = None,
) -> str | None:
    reason = refuses_tensors(q) or refuses_int8(k_cache) or refuses_tensors(k_cache, v_cache)
    if reason is None and (k_cache.stride(-1) != 1 or v_cache.stride(-1) != 1):
        return "the native kernels read caches whose last dimension is contiguous"
    return reason


def _triton_refuses(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    mask: Tensor | None,
    dropout_p: float,
    seed: Tensor | None,
) -> str | None:
    return unsuitable(q, k, v, one_dtype=True) or unsuitable(q, mask, seed) or _too_wide(q)


def _triton_refuses_backward(
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
    reason = unsuitable(grad, q, k, v, out, one_dtype=True)
    return reason or unsuitable(q, lse, mask, seed) or _too_wide(q)


def _triton_refuses_cached(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    scale: float,
    k_scales: Tensor | None = None,
    v_scales: Tensor | None = None,
) -> str | None:
    reason = unsuitable(q, k_cache, v_cache, lengths, k_scales, v_scales)
    return reason or refuses_strided_caches(k_cache, v_cache) or _too_wide(q)


def _too_wide(q: Tensor) -> str | None:
    if q.shape[-1] <= 128:
        return None
    return f"the Triton kernels take heads of size up to 128, not {q.shape[-1]}"


_backward = Op(
    "causal_attention_backward",
    "(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, float scale, "
    "Tensor? mask, float dropout_p, Tensor? seed) -> (Tensor, Tensor, Tensor)",
    check=_check_backward,
    native=by_device(
        cpu=native(
            _backward_native,
            lambda grad, q, k, v, out, lse, scale, mask, dropout_p, seed: _native_refuses(
                grad, q, k, v, out
            ),
        ),
        cuda=cuda(on_cuda.backward, on_cuda.backward_refuses),
    ),
    triton=triton("attention", "backward", _triton_refuses_backward),
    torch=Implementation(
        _flash_backward,
        lambda grad, q, k, v, out, lse, scale, mask, dropout_p, seed: _flash_refuses(
            scale, mask, dropout_p, q, k, v, grad, out
        ),
    ),
    reference=_backward_reference,
)
_forward = Op(
    "causal_attention",
    "(Tensor q, Tensor k, Tensor v, float scale, Tensor? mask, float dropout_p, Tensor? seed) "
    "-> (Tensor out, Tensor lse)",
    check=_check,
    native=by_device(
        cpu=native(_native, lambda q, k, v, scale, mask, dropout_p, seed: _native_refuses(q, k, v)),
        cuda=cuda(on_cuda.forward, on_cuda.refuses),
    ),
    triton=triton("attention", "forward", _triton_refuses),
    torch=Implementation(
        _flash,
        lambda q, k, v, scale, mask, dropout_p, seed: _flash_refuses(
            scale, mask, dropout_p, q, k, v
        ),
    ),
    reference=_reference,
)
_cached = Op(
    "attention_with_cache",
    "(Tensor q, Tensor k_cache, Tensor v_cache, Tensor lengths, float scale, "
    "Tensor? k_scales=None, Tensor? v_scales=None) -> Tensor",
    check=_check_cached,
    values=_check_cached_values,
    native=by_device(
        cpu=native(_cached_native, _cached_native_refuses),
        cuda=cuda(cached_on_cuda.run, cached_on_cuda.refuses),
    ),
    triton=triton("attention", "with_cache", _triton_refuses_cached),
    torch=_cached_reference,
    reference=_cached_reference,
)


def _setup_context(ctx: Any, inputs: Any, output: Any) -> None:
    q, k, v, ctx.scale, mask, ctx.dropout_p, seed = inputs
    out, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.save_for_backward(q, k, v, out, lse, mask, seed)


def _differentiate(ctx: Any, grad: Tensor, grad_lse: Any) -> tuple[Any, ...]:
    q, k, v, out, lse, mask, seed = ctx.saved_tensors
    if wants_graph():  # what was saved of the results is a constant
        out, lse = _forward.plain(q, k, v, ctx.scale, mask, ctx.dropout_p, seed)
    gradients = _backward.gradient(grad, q, k, v, out, lse, ctx.scale, mask, ctx.dropout_p, seed)
    return (*gradients, None, None, None, None)


_forward.register_autograd(_differentiate, _setup_context)
_cached.refuse_gradient("the cache serves generation; train with causal_attention")


@_forward.register_fake
def _(q, k, v, scale, mask, dropout_p, seed):  # type: ignore[no-untyped-def]
    batch, time, heads, _ = q.shape
    return (
        q.new_empty(q.shape),
        q.new_empty((batch, heads, time), dtype=statistics_dtype(q.dtype)),
    )


@_backward.register_fake
def _(grad, q, k, v, out, lse, scale, mask, dropout_p, seed):  # type: ignore[no-untyped-def]
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


@_cached.register_fake
def _(q, k_cache, v_cache, lengths, scale, k_scales=None, v_scales=None):  # type: ignore[no-untyped-def]
    return q.new_empty(q.shape)
