"""Whether a GPT-2 is what its configuration says, and whether its weights alone tell what it does.

Decoding, packing and saving read weights and configuration, and call no module. Where modules do
something else, decoding calls them instead, and the others refuse.
"""

from __future__ import annotations

from operator import attrgetter
from typing import TYPE_CHECKING

from torch import nn

from ..errors import ArgumentError
from ..lora.adapters import LoRAProjection
from ..ops.decode import LAYER_WEIGHTS
from . import GELUMLP, Block, CausalSelfAttention, LayerNorm, LinearCrossEntropy, Projection
from .embedding import Embedding
from .mlp import Activation
from .output_projection import OutputProjection, TiedOutputProjection
from .plain import is_plain, is_unwatched, why_not_plain

if TYPE_CHECKING:
    from ..model import GPT2

_PARTS = (
    Activation,
    Block,
    CausalSelfAttention,
    Embedding,
    GELUMLP,
    LayerNorm,
    LinearCrossEntropy,
    LoRAProjection,
    OutputProjection,
    Projection,
    TiedOutputProjection,
    nn.Dropout,
)
"""What a model is made of, and adapters."""

layer_weights = attrgetter(*LAYER_WEIGHTS)
"""Of a block: its weights in the order of `ops.decode_step`."""


def why_not_configured(model: GPT2) -> str | None:
    """What in the model's modules its configuration does not describe, or None."""
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


def why_not_read(model: GPT2, base: type[nn.Module]) -> str | None:
    """Why decoding has to call the modules, where it would read their weights; or None.

    Args:
        base: the class `GPT2`, whose `forward` is known.
    """
    if not is_unwatched(model, base):
        return "a hook or another forward is on the model"
    for name, module in model.named_modules():
        if module is model or type(module) is nn.ModuleList:
            continue
        if not is_plain(module, *_PARTS):
            return f"{name} {why_not_plain(module, *_PARTS)}"
    return why_not_configured(model)


def check_held(model: GPT2) -> None:
    """Raise ArgumentError for a model whose weights `pack(release=True)` has freed."""
    weight = model.wte._parameters.get("weight")
    if weight is not None and not weight.numel():
        raise ArgumentError(
            "this model's weights were released by pack(release=True) or quantize(release=True); "
            "use what that returned, or load the model again"
        )
