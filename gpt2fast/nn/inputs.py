"""Checks of a model's arguments, with errors that say what to do."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..config import GPT2Config
from ..errors import ArgumentError, GenerationError
from .kv_cache import KVCache


class Placed(NamedTuple):
    """Positions and padding of new tokens (B, T)."""

    mask: Tensor | None
    """(B, T) bool, false at padding; None where there is none."""
    positions: Tensor
    """(B, T), or (T,) where every row has the same and there is no cache."""
    counts: Tensor | None
    """(B,) real tokens of each row; None: all."""


def place(
    config: GPT2Config,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    cache: KVCache | None,
) -> Placed:
    """Check what a forward pass is given, and that a cache has room for it."""
    check_inputs(config, input_ids, attention_mask)
    mask = None if attention_mask is None else attention_mask.bool()
    if mask is not None and _is_readable(mask) and bool(_values(mask).all()):
        mask = None
    counts = None if mask is None else mask.sum(1)
    positions = torch.arange(input_ids.shape[1], device=input_ids.device)
    if cache is not None:
        check_cache(config, cache, len(input_ids))
        positions = cache.positions[:, None] + positions
    if position_ids is not None:
        positions = position_ids
    check_positions(config, positions)
    if cache is not None:
        positions = positions.expand(input_ids.shape)
        cache.reserve(input_ids.shape[1], counts)
    return Placed(mask, positions, counts)


def run_with_cache(
    blocks: Callable[..., Tensor],
    n_layer: int,
    input_ids: Tensor,
    placed: Placed,
    cache: KVCache,
    is_watched: bool,
) -> Tensor:
    """(B, T, width) hidden states of new tokens, which see a cache and are added to it.

    Rows of a cache have no holes, so the real tokens are moved to the front, and the hidden states
    back.

    Args:
        blocks: a model's, called with token ids, positions, a mask and a `LayerCache` each.
        n_layer: number of blocks.
        input_ids: (B, T) int64.
        placed: their positions and padding.
        cache: with B rows.
        is_watched: the blocks have hooks, which have to see the tokens in the order given.
    """
    mask, positions, counts = placed
    front = None if mask is None else mask.argsort(dim=1, descending=True, stable=True)
    inside = front if is_watched else None
    caches = [cache.layer(layer, counts, inside) for layer in range(n_layer)]
    if front is None or is_watched:
        hidden = blocks(input_ids, positions, None, caches)
    else:
        hidden = blocks(input_ids.gather(1, front), positions.gather(1, front), None, caches)
        hidden = hidden.gather(1, front.argsort(1)[..., None].expand(hidden.shape))
    cache.advance(input_ids.shape[1], counts, positions[:, -1] + 1)
    return hidden


def predicted(
    config: GPT2Config, input_ids: Tensor, labels: Tensor | None, targets: Tensor | None
) -> tuple[Tensor | None, slice]:
    """The tokens to predict (B, T'), if any are given, and the T' columns that predict them.

    Args:
        labels: (B, T); position t predicts labels[:, t + 1].
        targets: (B, T); position t predicts targets[:, t]; not both.
    """
    if labels is not None and targets is not None:
        raise ArgumentError("give labels (shifted inside) or targets (already shifted), not both")
    if labels is not None:
        check_wanted(config, "labels", labels, input_ids)
        return labels[:, 1:], slice(None, -1)
    if targets is not None:
        check_wanted(config, "targets", targets, input_ids)
    return targets, slice(None)


def kept_columns(logits_to_keep: int | Tensor) -> slice | Tensor:
    """The columns whose logits are wanted: the last `logits_to_keep`, 0 for all, or an index."""
    if isinstance(logits_to_keep, int):
        return slice(-logits_to_keep if logits_to_keep else None, None)
    return logits_to_keep


def check_held(embedding: nn.Module) -> None:
    """Raise ArgumentError if the weights of its model were freed by `pack(release=True)`."""
    weight = embedding._parameters.get("weight")
    if weight is not None and not weight.numel():
        raise ArgumentError(
            "this model's weights were released by pack(release=True) or quantize(release=True); "
            "use what that returned, or load the model again"
        )


def check_inputs(config: GPT2Config, input_ids: Tensor, attention_mask: Tensor | None) -> None:
    """Refuse token ids (B, T), or a mask, of a wrong shape, dtype or value."""
    if input_ids.dim() != 2 or not input_ids.numel():
        raise GenerationError(
            f"input_ids must be (batch, time) with at least one token, not {tuple(input_ids.shape)}"
        )
    if attention_mask is not None and attention_mask.shape != input_ids.shape:
        raise GenerationError(
            f"attention_mask {tuple(attention_mask.shape)} must have the shape of input_ids "
            f"{tuple(input_ids.shape)}"
        )
    check_tokens(config, input_ids)


def check_tokens(config: GPT2Config, tokens: Tensor) -> None:
    """Refuse token ids, of any shape, that are not in the vocabulary."""
    if tokens.dtype.is_floating_point or tokens.dtype == torch.bool:
        raise GenerationError(f"token ids have dtype {tokens.dtype}; they are integers")
    if _is_readable(tokens) and tokens.numel():
        low, high = (int(bound) for bound in _values(tokens).aminmax())
        if low < 0 or high >= config.vocab_size:
            raise GenerationError(
                f"token id {low if low < 0 else high} is outside the vocabulary "
                f"0 .. {config.vocab_size - 1}; was the text encoded with this model's tokenizer?"
            )


def check_positions(config: GPT2Config, positions: Tensor) -> None:
    """Refuse positions (..., T) that the model does not have, or more of them than it has."""
    limit = config.n_positions
    if positions.shape[-1] > limit:
        raise GenerationError(
            f"{positions.shape[-1]} tokens exceed this model's n_positions={limit}; "
            "shorten the input"
        )
    if not _is_readable(positions) or not positions.numel():
        return
    low, high = (int(bound) for bound in _values(positions).aminmax())
    if low < 0 or high >= limit:
        raise GenerationError(
            f"position {low if low < 0 else high} is outside this model's 0 .. {limit - 1} "
            f"(n_positions={limit}); shorten the input or generate fewer tokens"
        )


def check_wanted(config: GPT2Config, name: str, wanted: Tensor, input_ids: Tensor) -> None:
    """Refuse labels or targets, called `name`, of a wrong shape or value."""
    if wanted.shape != input_ids.shape:
        raise ArgumentError(
            f"{name} {tuple(wanted.shape)} must have the shape of input_ids "
            f"{tuple(input_ids.shape)}"
        )
    if _is_readable(wanted) and wanted.numel():
        wanted = _values(wanted)
        high = int(wanted.max())
        low = int(wanted.where(wanted != -100, 0).min())
        if low < 0 or high >= config.vocab_size:
            raise ArgumentError(
                f"{name} hold {low if low < 0 else high}, which is neither a token id "
                f"0 .. {config.vocab_size - 1} nor -100 (does not count)"
            )


def check_cache(config: GPT2Config, cache: KVCache, rows: int) -> None:
    """Refuse a cache of another model's shape, or with other than `rows` rows."""
    shape = (config.n_layer, rows, cache.max_length, config.n_head, config.head_dim)
    if cache.k.shape != shape:
        raise GenerationError(
            f"the cache has the shape {tuple(cache.k.shape)} and this call needs {shape} "
            "(layers, rows, length, heads, head size); model.new_cache(rows) makes one"
        )


def check_stream(x: Tensor, width: int) -> None:
    """Refuse a block's input that is not (batch, time, width)."""
    if x.dim() != 3 or x.shape[-1] != width:
        way_out = "; x[None] makes a batch of one sequence" if x.shape[1:] == (width,) else ""
        raise ArgumentError(
            f"x has the shape {tuple(x.shape)}; it must be (batch, time, width={width}){way_out}"
        )


def _values(tensor: Tensor) -> Tensor:
    """The values of all samples, where torch.func has batched them and shows one sample only."""
    while torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return tensor


def _is_readable(tensor: Tensor) -> bool:
    """True where looking at values is free: on the CPU, outside a traced program."""
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling()
