"""Reading a GPT-2's weights without calling its modules, and reasons not to.

Decoding, packing and saving read weights and configuration, and call no module. Where modules do
more than these say (hooks, other classes, other constants), decoding calls the modules, and packing
and saving refuse.
"""

from __future__ import annotations

from operator import attrgetter
from typing import Any

from torch import Tensor, nn

from .. import ops
from ..config import BLOCK_PARAMETERS
from ..errors import ArgumentError
from ..model import GPT2
from ..nn import GELUMLP, Block, CausalSelfAttention, LayerNorm
from ..nn.kv_cache import KVCache
from ..nn.mlp import Activation
from ..nn.output_projection import TiedOutputProjection
from ..nn.plain import is_unwatched, why_not_plain_within
from ..nn.projection import merged

_layer_weights = attrgetter(*BLOCK_PARAMETERS)
"""A block's weights in the order of `ops.decode_step`."""


def why_not_configured(model: GPT2) -> str | None:
    """Something in the model's modules that its configuration does not describe, or None."""
    config = model.config
    blocks = list(model.h)
    if len(blocks) != config.n_layer:
        return f"it has {len(blocks)} blocks, and n_layer is {config.n_layer}"
    for layer, block in enumerate(blocks):
        reason = _why_not_this_block(model, layer, block)
        if reason is not None:
            return f"h.{layer}{reason}"
    if not isinstance(model.ln_f, LayerNorm):
        return f"ln_f is a {type(model.ln_f).__name__}"
    if model.ln_f.eps != config.layer_norm_epsilon or model.ln_f.bias is None:
        return "ln_f has another epsilon than the configuration, or no bias"
    head = model.lm_head
    if config.tie_word_embeddings and not isinstance(head, TiedOutputProjection):
        return f"lm_head is a {type(head).__name__}, though tie_word_embeddings is true"
    if isinstance(head, TiedOutputProjection) and head.model is not model:
        return "lm_head is tied to another model"
    if not config.tie_word_embeddings and not (isinstance(head, nn.Linear) and head.bias is None):
        return f"lm_head is a {type(head).__name__}, or has a bias"
    return None


def _why_not_this_block(model: GPT2, layer: int, block: nn.Module) -> str | None:
    config = model.config
    if not isinstance(block, Block):
        return f" is a {type(block).__name__}"
    for name, kind in (
        ("ln_1", LayerNorm),
        ("ln_2", LayerNorm),
        ("attn", CausalSelfAttention),
        ("mlp", GELUMLP),
        ("mlp.act", Activation),
    ):
        part = block.get_submodule(name)
        if not isinstance(part, kind):
            return f".{name} is a {type(part).__name__}"
    if block.ln_1.eps != config.layer_norm_epsilon or block.ln_2.eps != block.ln_1.eps:
        return " has another epsilon than the configuration"
    if block.ln_1.bias is None or block.ln_2.bias is None:
        return " has norms without a bias"
    if block.attn.heads != config.n_head or block.attn.scale != config.attention_scale(layer):
        return ".attn has other heads, or another scale, than the configuration"
    if block.mlp.act.function != config.activation:
        return f".mlp.act is {block.mlp.act.name}, and not {config.activation_function}"
    return None


def why_not_read(model: GPT2) -> str | None:
    """A reason for decoding to call the modules instead of reading their weights, or None."""
    if not is_unwatched(model, GPT2):
        return "a hook or another forward is on the model"
    return why_not_plain_within(model) or why_not_configured(model)


def decode_weights(model: GPT2) -> list[Tensor]:
    """The weights as `ops.decode_step` takes them, adapters merged.

    Raises:
        ArgumentError: the weights do not tell all that the model computes; see `why_not_read`.
    """
    if reason := why_not_read(model):
        raise ArgumentError(f"weights cannot be read past the modules: {reason}")
    model = merged(model)
    layers = [weight for block in model.blocks for weight in _layer_weights(block)]
    last = [model.ln_f.weight, model.ln_f.bias, model.projection]
    return [model.wte.weight, model.wpe.weight, *layers, *last]


def step_constants(model: GPT2) -> dict[str, Any]:
    """The other arguments of `ops.decode_step` that depend on the model."""
    return {
        "n_head": model.config.n_head,
        "attention_scales": [block.attn.scale for block in model.blocks],
        "activation": model.config.activation,
        "eps": model.config.layer_norm_epsilon,
    }


def run_step(
    weights: list[Tensor],
    constants: dict[str, Any],
    tokens: Tensor,
    positions: Tensor,
    cache: KVCache,
) -> Tensor:
    """Logits (B, vocab) after tokens (B,) at positions (B,), whose entries go into a cache.

    Args:
        weights, constants: `decode_weights` and `step_constants` of a model.
        tokens, positions: (B,) int64.
        cache: with B rows; the caller counts the new entries.
    """
    return ops.decode_step(
        weights,
        cache.k,
        cache.v,
        tokens,
        positions,
        cache.lengths,
        k_scales=cache.k_scales,
        v_scales=cache.v_scales,
        **constants,
    )
