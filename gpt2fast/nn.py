"""GPT-2's building blocks as modules for anybody's model (Radford et al., 2019, section 2.3).

Constructor arguments are plain sizes; parameters carry the names of GPT-2's checkpoints and
projections are stored (in, out) as there.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import ops
from .cache import LayerCache
from .errors import ArgumentError
from .ops.decode import ACTIVATIONS

__all__ = [
    "Block",
    "CausalSelfAttention",
    "GELUMLP",
    "LinearCrossEntropy",
    "Projection",
    "ResidualLayerNorm",
]


def is_hooked(module: nn.Module) -> bool:
    """Whether somebody watches or changes what goes through `module`.

    A fused op reads a module's weights without calling it; hooks, by which activations are
    captured and models are wrapped, only run in a call.
    """
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


def is_readable(projection: nn.Module) -> bool:
    """Whether a fused op may read the weights of `projection`: what stands in the place of a plain
    one, an adapter for example, has to be called."""
    return type(projection) is Projection and not is_hooked(projection)


class Projection(nn.Module):
    """`x @ weight + bias` with the weight stored (in, out), as in GPT-2's checkpoints.

    Args:
        in_features: size of x's last dimension.
        out_features: size of the result's last dimension.
    """

    def __init__(self, in_features: int, out_features: int, *, device=None, dtype=None):
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        self.weight = nn.Parameter(torch.empty(in_features, out_features, **factory))
        self.bias = nn.Parameter(torch.empty(out_features, **factory))
        self.reset_parameters()

    def reset_parameters(self, std: float = 0.02) -> None:
        """Draw the weight from N(0, std^2) and set the bias to zero."""
        if self.weight.is_meta:  # nothing to draw, and torch would load its compiler for it
            return
        nn.init.normal_(self.weight, std=std)
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        return ops.projection(x, self.weight, self.bias)


class ResidualLayerNorm(nn.Module):
    """Add to the residual stream and normalise the sum, in one pass.

    Args:
        width: size of the last dimension.
        eps: added to the variance.
    """

    def __init__(self, width: int, eps: float = 1e-5, *, device=None, dtype=None):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(width, device=device, dtype=dtype))

    def forward(self, x: Tensor, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Normalise `x + residual`.

        Args:
            x: (..., width).
            residual: (..., width), or None for x alone.

        Returns:
            The normalised sum, and the sum: the residual stream to go on with.
        """
        return ops.residual_layer_norm(x, residual, self.weight, self.bias, self.eps)


def _check_probability(dropout: float) -> None:
    if not 0 <= dropout < 1:
        raise ArgumentError(f"dropout={dropout} is not a probability in [0, 1)")


class CausalSelfAttention(nn.Module):
    """Multi-head attention of each position to itself and those before it.

    Args:
        width: of the residual stream.
        heads: number of heads; divides `width`.
        dropout: probability of dropping an attention weight while training.
        scale: factor on the scores; None means 1 / sqrt(width / heads).
    """

    def __init__(
        self,
        width: int,
        heads: int,
        dropout: float = 0.0,
        scale: float | None = None,
        *,
        device=None,
        dtype=None,
    ):
        super().__init__()
        if width % heads:
            raise ArgumentError(f"width={width} is not a multiple of heads={heads}")
        _check_probability(dropout)
        self.heads = heads
        self.dropout = dropout
        self.scale = (width // heads) ** -0.5 if scale is None else scale
        self.c_attn = Projection(width, 3 * width, device=device, dtype=dtype)
        self.c_proj = Projection(width, width, device=device, dtype=dtype)

    def forward(
        self, x: Tensor, attention_mask: Tensor | None = None, cache: LayerCache | None = None
    ) -> Tensor:
        """Attend.

        Args:
            x: (B, T, width).
            attention_mask: (B, T) bool or 0/1, false at positions that must not be seen.
            cache: keys and values of the positions before x; x's own are appended to it.

        Returns:
            (B, T, width).
        """
        batch, time, width = x.shape
        qkv = self.c_attn(x).view(batch, time, 3, self.heads, width // self.heads)
        q, k, v = qkv.unbind(2)
        scales = (None, None) if cache is None else (cache.k_scales, cache.v_scales)
        if cache is not None:
            ops.append_to_cache(k, v, cache.k, cache.v, cache.lengths, cache.counts, *scales)
        if cache is not None and not cache.empty:
            out = ops.attention_with_cache(q, cache.k, cache.v, cache.lengths, self.scale, *scales)
        else:
            dropout = self.dropout if self.training else 0.0
            seed = torch.randint(1 << 62, (1,), device=x.device) if dropout else None
            out = ops.causal_attention(q, k, v, self.scale, attention_mask, dropout, seed)
        return self.c_proj(out.reshape(batch, time, width))


class GELUMLP(nn.Module):
    """Two projections with an activation between them.

    Args:
        width: of the residual stream.
        inner: width of the hidden layer; None means 4 * width.
        activation: gelu_new (fused), gelu, relu, silu or tanh.
    """

    def __init__(
        self,
        width: int,
        inner: int | None = None,
        activation: str = "gelu_new",
        *,
        device=None,
        dtype=None,
    ):
        super().__init__()
        if activation not in ACTIVATIONS:
            raise ArgumentError(f"activation={activation!r} is not one of {', '.join(ACTIVATIONS)}")
        inner = 4 * width if inner is None else inner
        self.activation = activation
        self.c_fc = Projection(width, inner, device=device, dtype=dtype)
        self.c_proj = Projection(inner, width, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """(..., width) -> (..., width)."""
        if self.activation == "gelu_new" and all(map(is_readable, (self.c_fc, self.c_proj))):
            return ops.gelu_mlp(
                x, self.c_fc.weight, self.c_fc.bias, self.c_proj.weight, self.c_proj.bias
            )
        return self.c_proj(ACTIVATIONS[self.activation](self.c_fc(x)))


class Block(nn.Module):
    """A pre-norm transformer block.

        x = x + attention(norm(x))
        x = x + mlp(norm(x))

    Args:
        width: of the residual stream.
        heads: number of attention heads.
        inner: width of the MLP's hidden layer; None means 4 * width.
        activation: the MLP's activation.
        dropout: probability of dropping what attention and MLP add, while training.
        attention_dropout: probability of dropping an attention weight, while training.
        scale: factor on the attention scores; None means 1 / sqrt(width / heads).
        eps: of the layer normalisations.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        inner: int | None = None,
        activation: str = "gelu_new",
        dropout: float = 0.0,
        attention_dropout: float = 0.0,
        scale: float | None = None,
        eps: float = 1e-5,
        *,
        device=None,
        dtype=None,
    ):
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        _check_probability(dropout)
        self.dropout = dropout
        self.ln_1 = ResidualLayerNorm(width, eps, **factory)
        self.attn = CausalSelfAttention(width, heads, attention_dropout, scale, **factory)
        self.ln_2 = ResidualLayerNorm(width, eps, **factory)
        self.mlp = GELUMLP(width, inner, activation, **factory)

    def forward(
        self,
        x: Tensor,
        attention_mask: Tensor | None = None,
        cache: LayerCache | None = None,
    ) -> Tensor:
        """(B, T, width) -> (B, T, width); arguments as in `CausalSelfAttention.forward`."""
        added, residual = self.branch(x, None, attention_mask, cache)
        return residual + added

    def branch(
        self,
        x: Tensor,
        residual: Tensor | None,
        attention_mask: Tensor | None = None,
        cache: LayerCache | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The block with its additions left open, so that a stack of blocks fuses them.

        Args:
            x: (B, T, width), what the block before has added.
            residual: (B, T, width), the stream it is added to; None before the first block.
            attention_mask, cache: as for `CausalSelfAttention`.

        Returns:
            What this block's MLP adds, and the stream it is added to.
        """
        normed, residual = self.ln_1(x, residual)
        x = self._dropped(self.attn(normed, attention_mask, cache))
        normed, residual = self.ln_2(x, residual)
        return self._dropped(self.mlp(normed)), residual

    def _dropped(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout) if self.training and self.dropout else x


class LinearCrossEntropy(nn.Module):
    """Mean cross-entropy of `hidden @ weight.T` that never holds all logits.

    Args:
        ignore_index: the target that does not count.
    """

    def __init__(self, ignore_index: int = -100):
        super().__init__()
        self.ignore_index = ignore_index

    def forward(self, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        """The loss of hidden states.

        Args:
            hidden: (..., C).
            weight: (V, C), the output projection.
            targets: (...) int64.

        Returns:
            Scalar, in nats.
        """
        return ops.linear_cross_entropy(
            hidden.reshape(-1, hidden.shape[-1]), weight, targets.reshape(-1), self.ignore_index
        )
