"""The pass from tokens through the blocks, and what it keeps on the way when it is asked to."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import repeat
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .. import ops
from ..config import GPT2Config
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


@dataclass
class Record:
    """What a pass keeps of every block; None where that is not asked for."""

    hidden_states: list[Tensor | None] | None
    """(B, T, width) input of each block; None for blocks whose input is not asked for."""
    attentions: list[Tensor] | None
    """(B, H, T, S) attention weights of each block."""
    selected: frozenset[int] | None = None
    """The hidden states that are asked for, by index; None: all."""

    @classmethod
    def of(
        cls,
        config: GPT2Config,
        output_hidden_states: bool | int | Sequence[int] | None,
        output_attentions: bool | None,
    ) -> Record | None:
        """A record of what is asked for, by the config where an argument is None; None if nothing
        is.

        Raises:
            ArgumentError: something else than True, False, None, or indices of hidden states.
        """
        if output_hidden_states is None:
            output_hidden_states = config.output_hidden_states
        if output_attentions is None:
            output_attentions = config.output_attentions
        if not isinstance(output_attentions, bool):
            raise ArgumentError(
                f"output_attentions={output_attentions!r} is not True, False or None; with True, "
                "choose layers from the tuple that is returned"
            )
        selected = _selected(output_hidden_states, config.n_layer + 1)
        asked = output_hidden_states is True or bool(selected)
        if not asked and not output_attentions:
            return None
        return cls([] if asked else None, [] if output_attentions else None, selected)

    def keeps(self, index: int) -> bool:
        """True if a hidden state is asked for."""
        return self.hidden_states is not None and (self.selected is None or index in self.selected)

    def with_last(
        self, hidden: Tensor
    ) -> tuple[tuple[Tensor | None, ...] | None, tuple[Tensor, ...] | None]:
        """Hidden states, the last one (B, T, width) at the end, and attention weights."""
        states: tuple[Tensor | None, ...] | None = None
        if self.hidden_states is not None:
            last = hidden if self.keeps(len(self.hidden_states)) else None
            states = (*self.hidden_states, last)
        return states, None if self.attentions is None else tuple(self.attentions)


def _selected(asked: bool | int | Sequence[int], states: int) -> frozenset[int] | None:
    """The indices below `states` that are asked for; None: it is a yes or no."""
    if isinstance(asked, bool):
        return None
    indices = [asked] if isinstance(asked, int) else asked
    if not isinstance(indices, (list, tuple)) or not all(type(x) is int for x in indices):
        raise ArgumentError(
            f"output_hidden_states={asked!r} is neither True, False or None nor indices of hidden "
            "states, as in [0, -1]"
        )
    if type(asked) is int and not asked:
        raise ArgumentError(
            "output_hidden_states=0 asks for nothing in transformers: give [0] for the first "
            "hidden state, or False"
        )
    for index in indices:
        if not -states <= index < states:
            raise ArgumentError(
                f"output_hidden_states has the index {index}; there are {states} of them, the "
                f"blocks' inputs and the last output: give {-states} to {states - 1}"
            )
    return frozenset(index % states for index in indices)


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
    record: Record | None = None,
) -> Tensor:
    """(B, T, width) output of a model's last layer normalization.

    Args:
        model: a `GPT2`; other arguments as of its `forward`.
        tokens: (B, T).
        record: takes what is asked for.
    """
    check_held(model.wte)
    placed = place(model.config, tokens, attention_mask, position_ids, cache)
    if isinstance(cache, KVCache):
        return _read_with_cache(model, tokens, placed, cache, record)
    x = _embed(model, tokens, placed.positions)
    return run_blocks(
        model, x, placed.mask, repeat(None) if cache is None else cache.layers, record
    )


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


def run_blocks(
    model: Any, x: Tensor, mask: Tensor | None, caches: Caches, record: Record | None = None
) -> Tensor:
    """(B, T, width) embeddings -> (B, T, width) output of a model's last layer normalization.

    Args:
        model: a `GPT2`.
        x: (B, T, width).
        mask: (B, T) bool, or (B, P + T) beside a `PastLayer`; false at keys that must not be seen.
            Or of four dimensions, as `SelfAttention` takes it.
        caches: of each block.
        record: takes what is asked for.
    """
    residual: Tensor | None = None
    recomputes = model.gradient_checkpointing and model.training
    for layer, (block, cache) in enumerate(zip(model.h, caches, strict=False)):
        fused = is_plain(block, Block)
        run: Callable[..., Any] = block.forward_open_residual if fused else block
        if record is not None:
            if record.keeps(layer):
                x, residual = x if residual is None else residual + x, None
            if record.hidden_states is not None:
                record.hidden_states.append(x if record.keeps(layer) else None)
            if record.attentions is not None:
                run = _with_weights(run, layer)
        stream = (x, residual) if fused else (x if residual is None else residual + x,)
        if recomputes and cache is None:
            added = checkpoint(run, *stream, mask, use_reentrant=False)
        else:
            added = run(*stream, mask, cache)
        if record is not None and record.attentions is not None:
            added, weights = added
            record.attentions.append(weights)
        x, residual = added if fused else (added, None)
    return add_and_normalize(model.ln_f, x, residual)[0]


def _read_with_cache(
    model: Any, tokens: Tokens, placed: Placed, cache: KVCache, record: Record | None
) -> Tensor:
    """(B, T, width) hidden states of new tokens, which see a cache and are added to it.

    Rows of a cache have no holes, so the real tokens are moved to the front, and the hidden states
    back; where the blocks have hooks, which have to see the tokens in the order given, attention
    does so.
    """
    mask, positions, counts, _ = placed
    of_scores = None
    if mask is not None and mask.dim() == 4:
        mask, of_scores = None, mask
    columns = None
    if record is not None and record.attentions is not None:
        columns = _columns(placed, cache, tokens.shape[1])
    front = None if mask is None else mask.argsort(dim=1, descending=True, stable=True)
    back = None if front is None else front.argsort(1)
    is_watched = mask is not None and why_not_plain_within(model) is not None
    inside = front if is_watched else None
    caches = [cache.layer(layer, counts, inside) for layer in range(len(model.h))]
    if front is None or back is None or is_watched:
        x = _embed(model, tokens, positions)
        hidden = run_blocks(model, x, of_scores, caches, record)
    else:
        x = _embed(model, tokens.in_order(front), positions.gather(1, front))
        hidden = in_order(run_blocks(model, x, None, caches, record), back)
        if record is not None and record.hidden_states is not None:
            record.hidden_states = [
                None if x is None else in_order(x, back) for x in record.hidden_states
            ]
    if columns is not None and record is not None and record.attentions is not None:
        record.attentions = [_spread(x, columns, back) for x in record.attentions]
    cache.advance(tokens.shape[1], counts, positions[:, -1] + 1)
    return hidden


def _columns(placed: Placed, cache: KVCache, time: int) -> Tensor:
    """(B, P + T) bool, false at padding: the columns that the entries of a cache stand for."""
    seen = placed.seen
    if seen is None:
        least, most = cache.lengths.aminmax()
        if least != most:
            raise ArgumentError(
                "output_attentions: the rows of the cache differ in length, so that their columns "
                "are unknown; give an attention_mask of all tokens, the cached ones among them"
            )
        seen = torch.ones(len(cache.lengths), int(most), dtype=torch.bool, device=cache.k.device)
    new = placed.mask
    if new is None or new.dim() == 4:
        new = torch.ones(len(seen), time, dtype=torch.bool, device=seen.device)
    return torch.cat([seen, new], 1)


def _spread(weights: Tensor, columns: Tensor, back: Tensor | None) -> Tensor:
    """Attention weights to the entries of a cache as those to columns (B, S): zero at padding.

    Args:
        weights: (B, H, T, T_max), the queries with padding last.
        columns: (B, S) bool, false at padding.
        back: (B, T), the order that puts padding where it was; None: there is none.
    """
    if back is not None:
        weights = weights.gather(2, back[:, None, :, None].expand(weights.shape))
    entries = (columns.cumsum(1) - 1).clamp(min=0)[:, None, None]
    return weights.gather(3, entries.expand(*weights.shape[:3], -1)) * columns[:, None, None]


def _with_weights(run: Callable[..., Any], layer: int) -> Callable[..., tuple[Any, Tensor]]:
    """A block that returns its attention weights beside what it returns."""

    def told(*arguments: Any) -> tuple[Any, Tensor]:
        weights: list[Tensor] = []
        added = run(*arguments, weights=weights)
        if len(weights) != 1:
            raise ArgumentError(
                f"output_attentions: the attention of h.{layer} told no weights; a module in its "
                "place appends them to the list `weights`, as CausalSelfAttention does"
            )
        return added, weights[0]

    return told
