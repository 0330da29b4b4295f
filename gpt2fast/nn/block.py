"""A pre-norm transformer block (Radford et al., 2019, section 2.3)."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from .attention import CausalSelfAttention
from .initialization import Device, Dtype, reset
from .inputs import check_stream
from .kv_cache import LayerCache
from .layer_norm import LayerNorm, add_and_normalize
from .mlp import GELUMLP
from .past import PastLayer
from .plain import readable


@readable
class Block(nn.Module):
    """A pre-norm transformer block.

        x = x + attention(norm(x))
        x = x + mlp(norm(x))

    Args:
        width: width of the residual stream.
        heads: number of attention heads.
        inner: width of the MLP's hidden layer; None means 4 * width.
        activation: the MLP's activation.
        dropout: probability of dropping what attention and MLP add, while training.
        attention_dropout: probability of dropping an attention weight, while training.
        scale: factor on the attention scores; None means 1 / sqrt(width / heads).
        eps: epsilon of the layer normalizations.
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
        device: Device = None,
        dtype: Dtype = None,
    ):
        super().__init__()
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.width = width
        self.ln_1 = LayerNorm(width, eps, **factory)
        self.attn = CausalSelfAttention(
            width, heads, attention_dropout, scale, residual_dropout=dropout, **factory
        )
        self.ln_2 = LayerNorm(width, eps, **factory)
        self.mlp = GELUMLP(width, inner, activation, dropout, **factory)

    @property
    def dropout(self) -> float:
        """Probability of dropping what the MLP adds, while training."""
        return self.mlp.dropout.p

    @dropout.setter
    def dropout(self, dropout: float) -> None:
        self.attn.resid_dropout.p = self.mlp.dropout.p = dropout

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
        """(B, T, width) -> (B, T, width); arguments as in `CausalSelfAttention.forward`."""
        check_stream(x, self.width)
        added, residual = self.forward_open_residual(x, None, attention_mask, cache, weights)
        return residual + added

    def forward_open_residual(
        self,
        x: Tensor,
        residual: Tensor | None,
        attention_mask: Tensor | None = None,
        cache: LayerCache | PastLayer | None = None,
        weights: list[Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The block without its last addition, which the next block fuses with its layer norm.

        Args:
            x: (B, T, width), the output of the previous block's MLP, not added yet.
            residual: (B, T, width), the stream it is added to; None before the first block.
            attention_mask, cache, weights: as for `CausalSelfAttention`.

        Returns:
            The MLP's output, not added yet, and the stream to add it to.
        """
        normed, residual = add_and_normalize(self.ln_1, x, residual)
        if weights is None:
            x = self.attn(normed, attention_mask, cache)
        else:
            x = self.attn(normed, attention_mask, cache, weights)
        normed, residual = add_and_normalize(self.ln_2, x, residual)
        return self.mlp(normed), residual
