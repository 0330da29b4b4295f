"""The parts of transformers' ImageGPT with forwards on fused ops; the rules are those of gpt2.py.

Its projections are GPT-2's, which fuses them. Its layer norms do not center, and stay as they are.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.models.imagegpt import modeling_imagegpt as theirs

from .. import ops
from .attention import why_not_on
from .gpt2 import FusedMLP
from .plain import is_plain


class ImageGPTMLP(FusedMLP, theirs.ImageGPTMLP):
    """Two projections with GELU between them, in one op."""


class ImageGPTAttention(theirs.ImageGPTAttention):
    """Self-attention from the first position on, which never holds its weights."""

    layer_idx: int

    def forward(  # type: ignore[override]
        self,
        hidden_states: Any,
        layer_past: Any = None,
        attention_mask: Tensor | None = None,
        *args: Any,
        output_attentions: bool | None = False,
        **options: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """(B, T, width) -> (B, T, width), and the attention weights where they are wanted."""
        if (
            args
            or output_attentions
            or options.get("encoder_hidden_states") is not None
            or attention_mask is not None
            or not self._begins(layer_past)
            or why_attention_is_plain(self, hidden_states) is not None
        ):
            options["output_attentions"] = output_attentions
            return super().forward(hidden_states, layer_past, attention_mask, *args, **options)
        qkv = self.c_attn(hidden_states).unflatten(2, (3, self.num_heads, self.head_dim))
        q, k, v = qkv.unbind(2)
        if layer_past is not None:
            layer_past.update(k.transpose(1, 2), v.transpose(1, 2), self.layer_idx)
        dropout = self.attn_dropout.p if self.training else 0.0
        seed = torch.randint(1 << 62, (1,), device=q.device) if dropout else None
        out = ops.causal_attention(q, k, v, self._scale(), None, dropout, seed)
        return self.resid_dropout(self.c_proj(out.flatten(2))), None

    def _begins(self, cache: Any) -> bool:
        """True if there are no keys before the first position."""
        return cache is None or (
            type(cache) is DynamicCache and not cache.get_seq_length(self.layer_idx)
        )

    def _scale(self) -> float:
        scale = self.head_dim**-0.5 if self.scale_attn_weights else 1.0
        return scale / (self.layer_idx + 1) if self.scale_attn_by_inverse_layer_idx else scale


def why_attention_is_plain(module: theirs.ImageGPTAttention, x: Tensor) -> str | None:
    """Why transformers attends, for a tensor of x's device and dtype; None if our kernels do."""
    if module.is_cross_attention:
        return "it is cross-attention"
    if not is_plain(module.attn_dropout, nn.Dropout):
        return "attn_dropout is watched or replaced"
    reason = why_not_on(x, module.head_dim)
    return None if reason is None else f"transformers attends, since {reason}"
