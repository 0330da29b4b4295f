"""The pass from tokens through the blocks."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from itertools import repeat
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .. import ops
from ..errors import ArgumentError
from .block import Block
from .dropout import drop
from .embedding import Embedding
from .inputs import Placed, Tokens, check_held, in_order, place
from .kv_cache import KVCache, LayerCache
from .layer_norm import add_and_normalize
from .past import Past, PastLayer
from .plain import is_plain, why_not_plain_within

Caches = Iterable[LayerCache | PastLayer | None]
"""A cache for each block, or None for each."""


def may_cache(model: Any) -> bool:
    """True unless the model recomputes activations, which leaves no room for a cache; it warns."""
    recomputes = model.gradient_checkpointing and model.training
    if recomputes:
        warnings.warn(
            "use_cache=True is left out: gradient checkpointing computes blocks twice, and a cache "
            "would take their keys twice",
            stacklevel=5,  # the caller of the model
        )
    return not recomputes


def read(
    model: Any,
    tokens: Tokens,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    cache: KVCache | Past | None,
) -> Tensor:
    """(B, T, width) output of a model's last layer normalization.

    Args:
        model: a `GPT2`; other arguments as of its `forward`.
        tokens: (B, T).
    """
    check_held(model.wte)
    placed = place(model.config, tokens, attention_mask, position_ids, cache)
    if isinstance(cache, KVCache):
        return _read_with_cache(model, tokens, placed, cache)
    x = _embed(model, tokens, placed.positions)
    return run_blocks(model, x, placed.mask, repeat(None) if cache is None else cache.layers)


def _embed(model: Any, tokens: Tokens, positions: Tensor) -> Tensor:
    """(B, T, width) sum of the embeddings of tokens, positions (B, T) or (T,) and types."""
    wte, wpe = model.wte, model.wpe
    if tokens.embeds is None and is_plain(wte, Embedding) and is_plain(wpe, Embedding):
        x = ops.embedding(cast("Tensor", tokens.ids), positions, wte.weight, wpe.weight)
    else:
        x = wte(tokens.ids) if tokens.embeds is None else tokens.embeds
        places = wpe(positions if positions.dim() == 2 else positions[None])
        if tokens.embeds is not None and x.dtype != places.dtype:
            _check_autocast(x, places)
        x = x + places
    if tokens.types is not None:
        x = x + wte(tokens.types)
    return drop(model.drop, x)


def _check_autocast(embeds: Tensor, places: Tensor) -> None:
    """Refuse embeddings of another dtype than the model's, unless autocast converts them."""
    if not (embeds.is_floating_point() and torch.is_autocast_enabled(embeds.device.type)):
        raise ArgumentError(
            f"inputs_embeds are {embeds.dtype} and this model's embeddings {places.dtype}: give "
            "inputs_embeds.to(model.dtype)"
        )


def run_blocks(model: Any, x: Tensor, mask: Tensor | None, caches: Caches) -> Tensor:
    """(B, T, width) embeddings -> (B, T, width) output of a model's last layer normalization.

    Args:
        model: a `GPT2`.
        x: (B, T, width).
        mask: (B, T) bool, or (B, P + T) beside a `PastLayer`; false at keys that must not be seen.
        caches: of each block.
    """
    residual: Tensor | None = None
    recomputes = model.gradient_checkpointing and model.training
    for block, cache in zip(model.h, caches, strict=False):
        fused = is_plain(block, Block)
        run: Callable[..., Any] = block.forward_open_residual if fused else block
        stream = (x, residual) if fused else (x if residual is None else residual + x,)
        if recomputes and cache is None:
            added = checkpoint(run, *stream, mask, use_reentrant=False)
        else:
            added = run(*stream, mask, cache)
        x, residual = added if fused else (added, None)
    return add_and_normalize(model.ln_f, x, residual)[0]


def _read_with_cache(model: Any, tokens: Tokens, placed: Placed, cache: KVCache) -> Tensor:
    """(B, T, width) hidden states of new tokens, which see a cache and are added to it.

    Rows of a cache have no holes, so the real tokens are moved to the front, and the hidden states
    back; where the blocks have hooks, which have to see the tokens in the order given, attention
    does so.
    """
    mask, positions, counts = placed
    front = None if mask is None else mask.argsort(dim=1, descending=True, stable=True)
    is_watched = mask is not None and why_not_plain_within(model) is not None
    inside = front if is_watched else None
    caches = [cache.layer(layer, counts, inside) for layer in range(len(model.h))]
    if front is None or is_watched:
        hidden = run_blocks(model, _embed(model, tokens, positions), None, caches)
    else:
        x = _embed(model, tokens.in_order(front), positions.gather(1, front))
        hidden = in_order(run_blocks(model, x, None, caches), front.argsort(1))
    cache.advance(tokens.shape[1], counts, positions[:, -1] + 1)
    return hidden
