"""Multi-head self-attention."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops
from ..errors import ArgumentError
from ..ops.attention import repeated_heads, visible_keys
from ..ops.backend import statistics_dtype
from ..ops.derivatives import is_transformed, refused
from ..ops.int8_cache import dequantize
from .dropout import check_probability, drop
from .initialization import Device, Dtype, reset
from .inputs import check_stream, in_order
from .kv_cache import LayerCache
from .past import PastLayer
from .plain import is_plain, readable
from .projection import Projection


@readable
class SelfAttention(nn.Module):
    """Multi-head attention of each position to those of its sequence.

    Args:
        width: width of the residual stream.
        heads: number of heads; divides `width`.
        dropout: probability of dropping an attention weight while training.
        scale: factor on the scores; None means 1 / sqrt(width / heads).
        causal: a position sees only itself and those before it.
        key_heads: heads of keys and values, which divides `heads`: each serves heads / key_heads
            neighboring heads of queries (Ainslie et al., 2023). None means `heads`.
        residual_dropout: probability of dropping an element of the result while training.

    Raises:
        ArgumentError: `heads` does not divide `width`, or `key_heads` not `heads`; a dropout
            outside of [0, 1).
    """

    def __init__(
        self,
        width: int,
        heads: int,
        dropout: float = 0.0,
        scale: float | None = None,
        *,
        causal: bool = True,
        key_heads: int | None = None,
        residual_dropout: float = 0.0,
        device: Device = None,
        dtype: Dtype = None,
    ):
        super().__init__()
        if heads < 1 or width % heads:
            raise ArgumentError(f"width={width} is not a multiple of heads={heads}")
        key_heads = heads if key_heads is None else key_heads
        if key_heads < 1 or heads % key_heads:
            raise ArgumentError(f"key_heads={key_heads} does not divide heads={heads}")
        check_probability("dropout", dropout)
        check_probability("residual_dropout", residual_dropout)
        self.width = width
        self.heads = heads
        self.key_heads = key_heads
        self.causal = causal
        self.scale = (width // heads) ** -0.5 if scale is None else scale
        projected = width + 2 * key_heads * (width // heads)
        self.c_attn = Projection(width, projected, device=device, dtype=dtype)
        self.c_proj = Projection(width, width, device=device, dtype=dtype)
        self.attn_dropout = nn.Dropout(dropout)
        self.resid_dropout = nn.Dropout(residual_dropout)

    @property
    def dropout(self) -> float:
        """Probability of dropping an attention weight while training."""
        return self.attn_dropout.p

    @dropout.setter
    def dropout(self, dropout: float) -> None:
        self.attn_dropout.p = dropout

    def reset_parameters(self) -> None:
        """Draw new weights."""
        reset(*self.children())

    def forward(
        self,
        x: Tensor,
        attention_mask: Tensor | None = None,
        cache: LayerCache | PastLayer | None = None,
        weights: list[Tensor] | None = None,
    ) -> Tensor:
        """Attend.

        Args:
            x: (B, T, width).
            attention_mask: (B, T) bool or 0/1, false at positions that must not be seen; beside a
                `PastLayer` of P columns (B, P + T). Or (B or 1, heads or 1, T, S) of all that each
                position sees, whatever `causal` says: bool, or numbers that are added to the
                scores. torch's SDPA attends then.
            cache: keys and values of the positions before x; x's own are appended to it.
            weights: the attention weights (B, heads, T, S), dropout applied, are appended to it.
                Fused kernels never have them: with this, attention is computed unfused.

        Returns:
            (B, T, width).

        Raises:
            ArgumentError: a cache beside `causal=False` or fewer key heads than heads, or a mask of
                four dimensions beside keys in a `LayerCache`.
        """
        check_stream(x, self.width)
        if cache is not None:
            self._check_cached()
        batch, time, width = x.shape
        qkv = self.c_attn(x).view(batch, time, -1, width // self.heads)
        front = cache.front if isinstance(cache, LayerCache) else None
        if front is not None:
            qkv = in_order(qkv, front)
        q, k, v = qkv.split([self.heads, self.key_heads, self.key_heads], 2)
        out = self._attend(q, k, v, attention_mask, cache, weights).reshape(batch, time, width)
        if front is not None:
            out = in_order(out, front.argsort(1))
        return drop(self.resid_dropout, self.c_proj(out))

    def _check_cached(self) -> None:
        if not self.causal:
            raise ArgumentError(
                "causal=False: a position's result depends on those after it, so a cache of those "
                "before does not serve; give all positions to one call without a cache"
            )
        if self.key_heads != self.heads:
            raise ArgumentError(
                f"key_heads={self.key_heads}: a cache holds as many heads of keys as there are "
                f"of queries, {self.heads}; give all positions to one call without a cache"
            )

    def _attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        cache: LayerCache | PastLayer | None,
        weights: list[Tensor] | None,
    ) -> Tensor:
        """(B, T, heads, head size), from queries of that shape, keys and values with key heads."""
        fused = weights is None and is_plain(self.attn_dropout, nn.Dropout)
        dropout = self.attn_dropout.p if fused and self.training else 0.0
        of_scores = mask is not None and mask.dim() == 4
        if isinstance(cache, PastLayer):
            keys, values = cache.extend(k, v)
            if fused and mask is not None and of_scores:
                return self._attend_by_scores(q, keys, values, mask, dropout)
            if cache.length:
                lengths = torch.full((len(q),), cache.length, device=q.device)
                if fused and not dropout and mask is None and not _has_gradient(q, keys, values):
                    return ops.attention_with_cache(q, keys, values, lengths, self.scale)
                return self._attend_openly(q, keys, values, mask, lengths, weights)
        elif cache is not None:
            if of_scores and not cache.empty:
                raise ArgumentError(
                    "a mask of four dimensions goes with no KVCache that holds tokens, whose "
                    "entries have no columns: give a cache of transformers"
                )
            scales = cache.k_scales, cache.v_scales
            stored = _as_constants(k, v, cache)
            ops.append_to_cache(*stored, cache.k, cache.v, cache.lengths, cache.counts, *scales)
            if not cache.empty and fused and not dropout:
                out = ops.attention_with_cache(
                    q, cache.k, cache.v, cache.lengths, self.scale, *scales
                )
                return _of_constants(out, cache)
            if not cache.empty:
                k = dequantize(cache.k, cache.k_scales, q.dtype)
                v = dequantize(cache.v, cache.v_scales, q.dtype)
                out = self._attend_openly(q, k, v, None, cache.lengths, weights)
                return _of_constants(out, cache)
        if not fused:
            return self._attend_openly(q, k, v, mask, None, weights)
        if mask is not None and of_scores:
            return self._attend_by_scores(q, k, v, mask, dropout)
        seed = torch.randint(1 << 62, (1,), device=q.device) if dropout else None
        return ops.attention(q, k, v, self.scale, mask, dropout, seed, self.causal)

    def _attend_by_scores(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, dropout: float
    ) -> Tensor:
        """Attention as `mask`, (B or 1, heads or 1, T, S), says, by torch's SDPA."""
        k, v = (repeated_heads(x, self.heads) for x in (k, v))
        if mask.dtype != torch.bool:
            mask = mask.to(q.dtype)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, mask, dropout, scale=self.scale)
        return out.transpose(1, 2)

    def _attend_openly(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        lengths: Tensor | None,
        weights: list[Tensor] | None,
    ) -> Tensor:
        """Unfused attention, whose weights (B, heads, T, S) pass through `attn_dropout`.

        Args:
            q: (B, T, heads, head size).
            k, v: (B, S, key heads, head size).
            mask: (B, S), false at keys that must not be seen; or of four dimensions, as `forward`
                takes it.
            lengths: (B,) keys before the first query; None: none.
            weights: the attention weights are appended to it.
        """
        dtype = statistics_dtype(q.dtype)
        k, v = (repeated_heads(x, self.heads) for x in (k, v))
        scores = torch.einsum("bthd,bshd->bhts", q.to(dtype), k.to(dtype)) * self.scale
        last = torch.arange(q.shape[1], device=q.device)
        if lengths is not None:
            last = last + lengths[:, None, None]
        seen = torch.arange(k.shape[1], device=q.device) <= last[..., None]
        if not self.causal:
            seen = torch.ones_like(seen)
        if mask is not None and mask.dim() == 4:
            seen = mask if mask.dtype == torch.bool else torch.ones_like(seen)
            scores = scores if mask.dtype == torch.bool else scores + mask
        elif mask is not None:
            seen = seen & visible_keys(mask)[:, None, None]
        # Not -inf: the softmax of a row that sees nothing would be NaN, and spread.
        scores = scores.masked_fill(~seen, torch.finfo(scores.dtype).min)
        shares = self.attn_dropout(scores.softmax(-1).to(v.dtype))
        if weights is not None:
            weights.append(shares)
        return torch.einsum("bhts,bshd->bthd", shares, v)

    def extra_repr(self) -> str:
        """Shown by print."""
        shown = f"width={self.width}, heads={self.heads}, scale={self.scale:g}"
        if self.key_heads != self.heads:
            shown += f", key_heads={self.key_heads}"
        return shown if self.causal else f"{shown}, causal=False"


@readable
class CausalSelfAttention(SelfAttention):
    """Multi-head attention of each position to itself and those before it.

    Args:
        width: width of the residual stream.
        heads: number of heads; divides `width`.
        dropout: probability of dropping an attention weight while training.
        scale: factor on the scores; None means 1 / sqrt(width / heads).
        residual_dropout: probability of dropping an element of the result while training.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        dropout: float = 0.0,
        scale: float | None = None,
        *,
        residual_dropout: float = 0.0,
        device: Device = None,
        dtype: Dtype = None,
    ):
        super().__init__(
            width, heads, dropout, scale,
            residual_dropout=residual_dropout, device=device, dtype=dtype,
        )  # fmt: skip


def _as_constants(k: Tensor, v: Tensor, cache: LayerCache) -> tuple[Tensor, Tensor]:
    """Keys and values without gradients, as a cache stores them; it notes if there were any."""
    if is_transformed() or not torch.is_grad_enabled() or not (k.requires_grad or v.requires_grad):
        return k, v
    if cache.constants is not None:
        cache.constants.lost = True
    return k.detach(), v.detach()


def _of_constants(out: Tensor, cache: LayerCache) -> Tensor:
    """A result computed from a cache, whose backward pass raises where gradients were lost."""
    lost = cache.constants is not None and cache.constants.lost
    if not torch.is_grad_enabled() or not (lost or out.requires_grad):
        return out
    anchor = out if out.requires_grad else out.new_zeros(()).requires_grad_()
    return refused(
        out,
        anchor,
        "a cache keeps keys and values without their gradients: to train, give all tokens to one "
        "call without a cache; to compute without gradients, use torch.no_grad()",
    )


def _has_gradient(*tensors: Tensor) -> bool:
    """True if a derivative may be taken of what is computed from these."""
    graded = torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
    return graded or is_transformed()
