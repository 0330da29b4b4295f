"""Attention over whole sequences and against a cache (Vaswani et al., 2017, eq. 1).

    scores[b, h, t, s] = scale * sum_d q[b, t, h, d] * k[b, s, n, d]         for visible s
    out[b, t, h, :]    = sum_s softmax_s(scores[b, h, t, :])[s] * v[b, s, n, :]

Keys and values may have fewer heads than queries (Ainslie et al., 2023): query head h reads head
n = h // (H // H_kv). Position s is visible from t when s <= t, if attention is causal, and where a
mask is given, when mask[b, s] is true. A query that sees nothing gives zeros. Scores and softmax
are computed in at least float32.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..errors import ArgumentError
from .backend import Arguments, Implementation, Op, autocast, requested_backend, statistics_dtype
from .cuda import attention as on_cuda
from .cuda import by_device, takes
from .cuda import cached_attention as cached_on_cuda
from .derivatives import is_transformed, wants_graph
from .dropout import dropout_factors
from .int8_cache import check_caches, check_scales, dequantize
from .native import native
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
from .support import GPU_CACHE_DTYPES, MAX_HEAD_SIZE, Tensors
from .triton import triton


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
        q: (B, T, H, D), floating point; strided views of one packed (B, T, 3, H, D) tensor are
            read in place.
        k, v: (B, T, H_kv, D), where H_kv divides H.
        scale: finite factor on the scores; None means 1 / sqrt(D).
        mask: (B, T) bool or 0/1, false where a position must not be seen by any other.
        dropout_p: probability of dropping an attention weight, in [0, 1).
        seed: (1,) int64, required with dropout; one seed always drops the same weights.

    Returns:
        (B, T, H, D) in q's dtype.
    """
    return attention(q, k, v, scale, mask, dropout_p, seed, causal=True)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None = None,
    mask: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    causal: bool = False,
) -> Tensor:
    """Attention of each position to all positions of its sequence.

    Args:
        q: (B, T, H, D), floating point; strided views are read in place.
        k, v: (B, T, H_kv, D), where H_kv divides H: H // H_kv query heads read one head.
        scale: finite factor on the scores; None means 1 / sqrt(D).
        mask: (B, T) bool or 0/1, false where a position must not be seen by any, as padding.
        dropout_p: probability of dropping an attention weight, in [0, 1).
        seed: (1,) int64, required with dropout; one seed always drops the same weights.
        causal: a position sees only itself and those before it.

    Returns:
        (B, T, H, D) in q's dtype; zeros for a position that sees nothing.
    """
    if mask is not None:
        mask = visible_keys(mask)
    check_constants(scale=scale, dropout_p=dropout_p)
    q, k, v = autocast(q, k, v)
    scale = _usual_scale(q) if scale is None else scale
    return _forward.call(q, k, v, scale, mask, dropout_p, seed, causal)[0]


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
            sees entries 0 .. lengths[b] + t. The result is unspecified for queries past the end
            of the cache, as padding may be.
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


def visible_keys(mask: Tensor) -> Tensor:
    """A mask as bool; refuses the kind that is added to scores, which has 0 where a key is seen."""
    is_readable = (
        type(mask) is Tensor
        and mask.device.type == "cpu"
        and not is_transformed()
        and not torch.compiler.is_compiling()
    )
    if mask.is_floating_point() and is_readable and bool((mask < 0).any()):
        raise ArgumentError(
            "mask holds negative numbers, as masks that are added to scores do; give true, or 1, "
            "where a position may be seen"
        )
    return mask.bool()


def _usual_scale(q: Tensor) -> float:
    return 1.0 / math.sqrt(max(1, q.shape[-1])) if q.dim() else 1.0


def _check(call: Arguments) -> None:
    q, k, v, mask, seed = call.q, call.k, call.v, call.mask, call.seed
    check_floating(q=q, k=k, v=v)
    if (
        q.dim() != 4
        or k.shape != v.shape
        or q.shape[:2] != k.shape[:2]
        or q.shape[3:] != k.shape[3:]
    ):
        raise ArgumentError(
            "q, k and v must share one shape (B, T, H, D), but for the heads of k and v, not "
            f"{tuple(q.shape)}, {tuple(k.shape)} and {tuple(v.shape)}"
        )
    heads, key_heads = q.shape[2], k.shape[2]
    if heads != key_heads and not (0 < key_heads < heads and heads % key_heads == 0):
        raise ArgumentError(
            f"the {key_heads} heads of k and v must divide the {heads} heads of q, each serving as "
            "many query heads as the others"
        )
    check_finite(scale=call.scale)
    if mask is not None:
        check_shape("mask", mask, *q.shape[:2], says="(B, T)")
        if mask.dtype != torch.bool:
            raise ArgumentError(f"mask must be bool, not {mask.dtype}")
    check_below_one(dropout_p=call.dropout_p)
    if seed is not None:
        check_integers(seed=seed)
        check_shape("seed", seed, 1, says="one number")
    elif call.dropout_p:
        raise ArgumentError(f"dropout_p={call.dropout_p} needs seed, a (1,) int64 tensor")


def _check_backward(call: Arguments) -> None:
    _check(call)
    q, lse = call.q, call.lse
    check_floating(grad=call.grad, out=call.out)
    check_shape("grad", call.grad, *q.shape, says="q's shape")
    check_shape("out", call.out, *q.shape, says="q's shape")
    batch, time, heads, _ = q.shape
    check_shape("lse", lse, batch, heads, time, says="(B, H, T)")
    if lse.dtype != statistics_dtype(q.dtype):
        raise ArgumentError(f"lse of {q.dtype} queries must not be {lse.dtype}")


def _check_cached(call: Arguments) -> None:
    q, k_cache = call.q, call.k_cache
    check_floating(q=q)
    check_dim("q", q, 4, says="(B, T, H, D)")
    check_caches(call, 4, "(B, T_max, H, D)")
    batch, _, heads, width = q.shape
    check_shape(
        "k_cache", k_cache, batch, k_cache.shape[1], heads, width, says="(B, T_max, H, D) beside q"
    )
    check_scales(call)
    check_integers(lengths=call.lengths)
    check_shape("lengths", call.lengths, batch, says="(B,)")
    check_finite(scale=call.scale)


def _check_cached_values(call: Arguments) -> None:
    entries = call.k_cache.shape[1]
    check_indices("lengths", call.lengths, 0, entries, of="what a row of the cache holds")


def _visible(length: int, mask: Tensor | None, causal: bool, device: torch.device) -> Tensor:
    visible = torch.ones(length, length, dtype=torch.bool, device=device)
    if causal:
        visible = visible.tril()
    return visible if mask is None else visible & mask[:, None, None, :]


def repeated_heads(x: Tensor, heads: int) -> Tensor:
    """Heads of keys or values, once for each query head that reads them."""
    if x.shape[2] == heads:
        return x
    return x[:, :, :, None].expand(-1, -1, -1, heads // x.shape[2], -1).flatten(2, 3)


def _summed(grad: Tensor, key_heads: int) -> Tensor:
    """Gradient of heads that `repeated_heads` repeated."""
    return grad if grad.shape[2] == key_heads else grad.unflatten(2, (key_heads, -1)).sum(3)


def _factors(weights: Tensor, dropout_p: float, seed: Tensor) -> Tensor:
    """Dropout factors of the weights, the same that the kernels draw."""
    batch, heads, queries, keys = weights.shape
    return dropout_factors(
        (batch, heads, queries, keys),
        dropout_p,
        seed,
        weights.dtype,
        on_gpu=takes(weights) or requested_backend() == "triton",
    )


def _weights(
    q: Tensor, k: Tensor, scale: float, mask: Tensor | None, causal: bool, lse: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Attention weights (B, H, T, T) before dropout, and their log-normalizer (B, H, T)."""
    visible = _visible(q.shape[1], mask, causal, q.device)
    scores = torch.einsum("bthd,bshd->bhts", q, k) * scale
    # The scores of a query that sees nothing stay finite, so that the sum has derivatives;
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
    causal: bool,
) -> tuple[Tensor, Tensor]:
    dtype = statistics_dtype(q.dtype)
    k, v = (repeated_heads(x.to(dtype), q.shape[2]) for x in (k, v))
    weights, lse = _weights(q.to(dtype), k, scale, mask, causal, None)
    if seed is not None and dropout_p:
        weights = weights * _factors(weights, dropout_p, seed)
    out = torch.einsum("bhts,bshd->bthd", weights, v)
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
    causal: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = statistics_dtype(q.dtype)
    given, key_heads = q.dtype, k.shape[2]
    grad, q, k, v, out = (tensor.to(dtype) for tensor in (grad, q, k, v, out))
    k, v = (repeated_heads(x, q.shape[2]) for x in (k, v))
    weights, _ = _weights(q, k, scale, mask, causal, lse)
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
    grad_k, grad_v = (_summed(each, key_heads) for each in (grad_k, grad_v))
    return tuple(g.to(given).contiguous() for g in (grad_q, grad_k, grad_v))  # type: ignore


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
        # Only the part in use. On a GPU, reading the longest row's length would be a wait.
        longest = int(lengths.max()) if len(lengths) else 0
        used = min(longest + q.shape[1], k_cache.shape[1])
        k_cache, v_cache = k_cache[:, :used], v_cache[:, :used]
        if k_scales is not None and v_scales is not None:
            k_scales, v_scales = k_scales[:, :used], v_scales[:, :used]
    dtype = statistics_dtype(q.dtype)
    scores = torch.einsum("bthd,bshd->bhts", q.to(dtype), dequantize(k_cache, k_scales, dtype))
    scores = scores * scale
    newest = lengths[:, None] + torch.arange(q.shape[1], device=q.device)
    hidden = torch.arange(k_cache.shape[1], device=q.device) > newest[:, None, :, None]
    weights = scores.masked_fill(hidden, -math.inf).softmax(-1)
    # Entries past a row's end may hold anything, NaN included; 0 * NaN must not reach the sum.
    past_end = hidden[:, 0, -1:].any(1)  # without queries, none
    v_cache = dequantize(v_cache, v_scales, dtype).masked_fill(past_end[:, :, None, None], 0.0)
    return torch.einsum("bhts,bshd->bthd", weights, v_cache).to(q.dtype).contiguous()


def _flash_refuses(call: Arguments) -> str | None:
    if call.scale <= 0:  # it scales after masking: minus infinity times 0 is NaN
        return f"torch's flash attention takes scales above 0, not {call.scale}"
    if len({x.dtype for x in call if isinstance(x, Tensor) and x.dim() == 4}) != 1:
        return "torch's flash attention takes tensors of one dtype"
    if call.q.device.type != "cpu":
        return "torch's flash attention is used on the CPU only"
    if call.mask is not None:
        return "torch's flash attention takes no padding mask here"
    if call.dropout_p:
        return "torch's flash attention on the CPU has no dropout"
    if not call.q.numel():
        return "torch's flash attention needs at least one element"
    return None


def _contiguous_heads(*tensors: Tensor) -> list[Tensor]:
    return [tensor if tensor.stride(-1) == 1 else tensor.contiguous() for tensor in tensors]


def _heads_first(*tensors: Tensor) -> list[Tensor]:
    # torch's kernel assumes that the last dimension's stride is 1.
    return [tensor.transpose(1, 2) for tensor in _contiguous_heads(*tensors)]


def _flash(call: Arguments) -> tuple[Tensor, Tensor]:
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        *_heads_first(call.q, call.k, call.v), 0.0, call.causal, scale=call.scale
    )
    return out.transpose(1, 2).contiguous(), lse.contiguous()


def _flash_backward(call: Arguments) -> tuple[Tensor, Tensor, Tensor]:
    gradients = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        *_heads_first(call.grad, call.q, call.k, call.v, call.out),
        call.lse,
        0.0,
        call.causal,
        scale=call.scale,
    )
    return tuple(gradient.transpose(1, 2).contiguous() for gradient in gradients)  # type: ignore


def _options(call: Arguments) -> tuple[float, Tensor | None, float, int, bool]:
    """Scale, visible keys, dropout, seed and causality, as the CPU kernels take them."""
    mask = None if call.mask is None else call.mask.contiguous()
    seed = int(call.seed.item()) if call.seed is not None and call.dropout_p else 0
    return call.scale, mask, call.dropout_p, seed, call.causal


@native(Tensors("q", "k", "v", one_dtype=True))
def _native(call: Arguments) -> tuple[Tensor, Tensor]:
    return torch.ops.gpt2fast_native.attention.default(
        *_contiguous_heads(call.q, call.k, call.v), *_options(call)
    )


@native(Tensors("grad", "q", "k", "v", "out", one_dtype=True))
def _backward_native(call: Arguments) -> tuple[Tensor, Tensor, Tensor]:
    return torch.ops.gpt2fast_native.attention_backward.default(
        *_contiguous_heads(call.grad, call.q, call.k, call.v, call.out),
        call.lse.contiguous(),
        *_options(call),
    )


@native(
    Tensors("q", may_be_empty=True),
    Tensors("k_cache", "v_cache", one_dtype=True, may_be_empty=True, contiguous_rows=True),
)
def _cached_native(call: Arguments) -> Tensor:
    (q,) = _contiguous_heads(call.q)
    return torch.ops.gpt2fast_native.attention_with_cache.default(
        q, call.k_cache, call.v_cache, call.lengths, call.scale
    )


_backward = Op(
    "causal_attention_backward",
    "(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, float scale, "
    "Tensor? mask, float dropout_p, Tensor? seed, bool causal) -> (Tensor, Tensor, Tensor)",
    check=_check_backward,
    native=by_device(cpu=_backward_native, cuda=on_cuda.backward),
    triton=triton(
        "attention_backward",
        "backward",
        Tensors("grad", "q", "k", "v", "out", one_dtype=True, max_head_size=MAX_HEAD_SIZE),
        Tensors("lse", "mask", "seed"),
    ),
    torch=Implementation(_flash_backward, _flash_refuses),
    reference=_backward_reference,
)
_forward = Op(
    "causal_attention",
    "(Tensor q, Tensor k, Tensor v, float scale, Tensor? mask, float dropout_p, Tensor? seed, "
    "bool causal) -> (Tensor out, Tensor lse)",
    check=_check,
    native=by_device(cpu=_native, cuda=on_cuda.forward),
    triton=triton(
        "attention",
        "forward",
        Tensors("q", "k", "v", one_dtype=True, max_head_size=MAX_HEAD_SIZE),
        Tensors("mask", "seed"),
    ),
    torch=Implementation(_flash, _flash_refuses),
    reference=_reference,
)
_cached = Op(
    "attention_with_cache",
    "(Tensor q, Tensor k_cache, Tensor v_cache, Tensor lengths, float scale, "
    "Tensor? k_scales=None, Tensor? v_scales=None) -> Tensor",
    check=_check_cached,
    values=_check_cached_values,
    native=by_device(cpu=_cached_native, cuda=cached_on_cuda.run),
    triton=triton(
        "cached_attention",
        "with_cache",
        Tensors("q", max_head_size=MAX_HEAD_SIZE),
        Tensors("k_cache", "v_cache", dtypes=GPU_CACHE_DTYPES, contiguous_rows=True),
        Tensors("lengths", "k_scales", "v_scales"),
    ),
    reference=_cached_reference,
)


def _setup_context(ctx: Any, call: Arguments, results: tuple[Tensor, Tensor]) -> None:
    out, lse = results
    ctx.mark_non_differentiable(lse)
    ctx.scale, ctx.dropout_p, ctx.causal = call.scale, call.dropout_p, call.causal
    ctx.save_for_backward(call.q, call.k, call.v, out, lse, call.mask, call.seed)


def _differentiate(ctx: Any, grad: Tensor, grad_lse: Any) -> tuple[Tensor | None, ...]:
    q, k, v, out, lse, mask, seed = ctx.saved_tensors
    options = ctx.scale, mask, ctx.dropout_p, seed, ctx.causal
    if wants_graph():  # the saved results are constants
        out, lse = _forward.plain(q, k, v, *options)
    return _backward.gradient(grad, q, k, v, out, lse, *options)


_forward.register_autograd(_differentiate, _setup_context)
_cached.refuse_gradient("the cache serves generation; train with causal_attention")


@_forward.register_fake
def _(call: Arguments) -> tuple[Tensor, Tensor]:
    batch, time, heads, _ = call.q.shape
    return (
        call.q.new_empty(call.q.shape),
        call.q.new_empty((batch, heads, time), dtype=statistics_dtype(call.q.dtype)),
    )


@_backward.register_fake
def _(call: Arguments) -> tuple[Tensor, ...]:
    return tuple(x.new_empty(x.shape) for x in (call.q, call.k, call.v))


@_cached.register_fake
def _(call: Arguments) -> Tensor:
    return call.q.new_empty(call.q.shape)
