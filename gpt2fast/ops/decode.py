"""One whole GPT-2 step: a token per row in, the next token's logits out (Radford et al., 2019).

The step is stateless: it takes the weights as a list and writes into caches that the caller owns.
`LAYER_WEIGHTS` names what each layer contributes, in order; the list is

    wte, wpe, *(LAYER_WEIGHTS of layer 0), ..., ln_f.weight, ln_f.bias, output projection
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .attention import attention_with_cache
from .backend import Op
from .cache import append_to_cache
from .embedding import embedding
from .layer_norm import residual_layer_norm
from .mlp import bias_gelu

LAYER_WEIGHTS = (
    "ln_1.weight",
    "ln_1.bias",
    "attn.c_attn.weight",
    "attn.c_attn.bias",
    "attn.c_proj.weight",
    "attn.c_proj.bias",
    "ln_2.weight",
    "ln_2.bias",
    "mlp.c_fc.weight",
    "mlp.c_fc.bias",
    "mlp.c_proj.weight",
    "mlp.c_proj.bias",
)

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu_new": lambda x: F.gelu(x, approximate="tanh"),
    "gelu": F.gelu,
    "relu": F.relu,
    "silu": F.silu,
    "tanh": torch.tanh,
}
"""Elementwise activations by Hugging Face's names."""


def decode_step(
    weights: Sequence[Tensor],
    k_cache: Tensor,
    v_cache: Tensor,
    tokens: Tensor,
    positions: Tensor,
    lengths: Tensor,
    *,
    n_head: int,
    scales: Sequence[float],
    activation: str,
    eps: float,
) -> Tensor:
    """Logits of the token after `tokens`, whose keys and values are stored in the caches.

    Args:
        weights: as listed in this module's docstring; projections are (in, out).
        k_cache, v_cache: (L, B, T_max, H, D), written in place at entry lengths[b] of row b.
        tokens: (B,) int64.
        positions: (B,) int64, each token's position.
        lengths: (B,) int64, entries stored before; not changed.
        n_head: H.
        scales: factor on the attention scores of each layer.
        activation: a key of `ACTIVATIONS`.
        eps: of the layer normalisations.

    Returns:
        (B, V) logits. Not differentiable.
    """
    return _decode.call(
        list(weights), k_cache, v_cache, tokens, positions, lengths,
        n_head, list(scales), activation, eps,
    )  # fmt: skip


def _reference(
    weights: list[Tensor],
    k_cache: Tensor,
    v_cache: Tensor,
    tokens: Tensor,
    positions: Tensor,
    lengths: Tensor,
    n_head: int,
    scales: list[float],
    activation: str,
    eps: float,
) -> Tensor:
    wte, wpe, *layers, ln_f_weight, ln_f_bias, projection = weights
    x = embedding(tokens[:, None], positions[:, None], wte, wpe)
    batch, _, width = x.shape
    residual = None
    size = len(LAYER_WEIGHTS)
    for layer, scale in enumerate(scales):
        ln_1_w, ln_1_b, qkv_w, qkv_b, out_w, out_b, ln_2_w, ln_2_b, fc_w, fc_b, proj_w, proj_b = (
            layers[layer * size : (layer + 1) * size]
        )
        normed, residual = residual_layer_norm(x, residual, ln_1_w, ln_1_b, eps)
        qkv = torch.addmm(qkv_b, normed[:, 0], qkv_w)
        q, k, v = qkv.view(batch, 1, 3, n_head, width // n_head).unbind(2)
        append_to_cache(k, v, k_cache[layer], v_cache[layer], lengths)
        attended = attention_with_cache(q, k_cache[layer], v_cache[layer], lengths, scale)
        x = torch.addmm(out_b, attended.view(batch, width), out_w)[:, None]
        normed, residual = residual_layer_norm(x, residual, ln_2_w, ln_2_b, eps)
        if activation == "gelu_new":
            inner = bias_gelu(normed[:, 0] @ fc_w, fc_b)
        else:
            inner = ACTIVATIONS[activation](torch.addmm(fc_b, normed[:, 0], fc_w))
        x = torch.addmm(proj_b, inner, proj_w)[:, None]
    normed, _ = residual_layer_norm(x, residual, ln_f_weight, ln_f_bias, eps)
    return normed[:, 0] @ projection.t()


_decode = Op(
    "decode_step",
    "(Tensor[] weights, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor tokens, Tensor positions, "
    "Tensor lengths, int n_head, float[] scales, str activation, float eps) -> Tensor",
    torch=_reference,
    reference=_reference,
)


@_decode.register_fake
def _(weights, k_cache, v_cache, tokens, *rest):  # type: ignore[no-untyped-def]
    projection = weights[-1]
    return projection.new_empty((tokens.shape[0], projection.shape[0]))
