"""A model's arguments, and checks of them with errors that say what to do."""

from __future__ import annotations

from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import is_fake

from ..config import GPT2Config
from ..errors import ArgumentError, GenerationError
from .kv_cache import KVCache
from .past import Past


class Tokens(NamedTuple):
    """What a forward pass reads: (B, T) tokens by their ids, or as embeddings."""

    ids: Tensor | None
    """(B, T) int64; None: there are embeddings."""
    embeds: Tensor | None = None
    """(B, T, width); None: there are ids."""
    types: Tensor | None = None
    """(B, T) int64 rows of the token embedding that are added."""

    @property
    def _given(self) -> Tensor:
        return cast("Tensor", self.ids if self.embeds is None else self.embeds)

    @property
    def shape(self) -> torch.Size:
        """(B, T)."""
        return self._given.shape[:2]

    @property
    def device(self) -> torch.device:
        """The device of the ids, or of the embeddings."""
        return self._given.device

    @property
    def name(self) -> str:
        """The argument that the tokens came as."""
        return "input_ids" if self.embeds is None else "inputs_embeds"

    def in_order(self, order: Tensor) -> Tokens:
        """The tokens of each row in `order` (B, T)."""
        return Tokens(*(None if x is None else in_order(x, order) for x in self))


def given_tokens(
    config: GPT2Config,
    input_ids: Tensor | None,
    inputs_embeds: Tensor | None = None,
    token_type_ids: Tensor | None = None,
) -> Tokens:
    """The arguments of these names as `Tokens`.

    Raises:
        ArgumentError, GenerationError: not exactly one of `input_ids` and `inputs_embeds` is given,
            or one has another shape.
    """
    if (input_ids is None) == (inputs_embeds is None):
        number = "neither" if input_ids is None else "both"
        raise ArgumentError(f"give one of input_ids and inputs_embeds, not {number}")
    tokens = Tokens(input_ids, inputs_embeds, token_type_ids)
    ids, embeds, types = tokens
    if ids is not None and (ids.dim() != 2 or not ids.numel()):
        raise GenerationError(
            f"input_ids must be (batch, time) with at least one token, not {tuple(ids.shape)}"
        )
    if embeds is not None and (
        embeds.dim() != 3 or embeds.shape[2] != config.n_embd or not embeds.numel()
    ):
        raise ArgumentError(
            f"inputs_embeds must be (batch, time, width={config.n_embd}) with at least one token, "
            f"not {tuple(embeds.shape)}"
        )
    if types is not None and types.shape != tokens.shape:
        raise ArgumentError(
            f"token_type_ids {tuple(types.shape)} must have the shape of {tokens.name} "
            f"{tuple(tokens.shape)}"
        )
    return tokens


def in_order(x: Tensor, order: Tensor) -> Tensor:
    """x (B, T, ...) with the positions of each row in `order` (B, T)."""
    return x.gather(1, order.view(*order.shape, *[1] * (x.dim() - 2)).expand(x.shape))


class Placed(NamedTuple):
    """Positions and padding of new tokens (B, T)."""

    mask: Tensor | None
    """(B, T) bool, or (B, P + T) beside P columns of a `Past`; false at padding; None where there
    is none. Or of four dimensions, as `SelfAttention` takes it, and no token is padding."""
    positions: Tensor
    """(B, T), or (T,) where every row has the same and there is no `KVCache`."""
    counts: Tensor | None
    """(B,) real tokens of each row; None: all."""
    seen: Tensor | None = None
    """(B, P) bool, false at padding among the P columns before, where a mask says so."""


def place(
    config: GPT2Config,
    tokens: Tokens,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    cache: KVCache | Past | None,
) -> Placed:
    """Check what a forward pass is given, and that a cache has room for it."""
    check_inputs(config, tokens, attention_mask, cache)
    batch, time = tokens.shape
    ours = cache if isinstance(cache, KVCache) else None
    if ours is not None:
        check_cache(config, ours, batch)
    mask, of_scores = attention_mask, attention_mask is not None and attention_mask.dim() == 4
    if mask is not None and not of_scores:
        mask = mask.bool()
    seen = None
    if ours is not None and mask is not None and not of_scores and mask.shape[1] > time:
        seen, mask = mask[:, :-time], mask[:, -time:]
        _check_seen(seen, ours)
    if mask is not None and not of_scores and is_readable(mask) and bool(_values(mask).all()):
        mask = None
    counts = None if mask is None or of_scores else mask.sum(1)
    positions = torch.arange(time, device=tokens.device)
    if position_ids is not None:
        positions = position_ids
    elif ours is not None:
        positions = ours.positions[:, None] + positions
    elif isinstance(cache, Past):
        positions = positions + cache.length
    check_positions(config, positions)
    if ours is not None:
        positions = positions.expand(batch, time)
        ours.reserve(time, counts)
    return Placed(mask, positions, counts, seen)


def predicted(
    config: GPT2Config, tokens: Tokens, labels: Tensor | None, targets: Tensor | None
) -> tuple[Tensor | None, slice]:
    """The tokens to predict (B, T'), if any are given, and the T' columns that predict them.

    Args:
        labels: (B, T); position t predicts labels[:, t + 1].
        targets: (B, T); position t predicts targets[:, t]; not both.
    """
    if labels is not None and targets is not None:
        raise ArgumentError("give labels (shifted inside) or targets (already shifted), not both")
    if labels is not None:
        check_wanted(config, "labels", labels, tokens)
        return labels[:, 1:], slice(None, -1)
    if targets is not None:
        check_wanted(config, "targets", targets, tokens)
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


def check_inputs(
    config: GPT2Config,
    tokens: Tokens,
    attention_mask: Tensor | None,
    cache: KVCache | Past | None = None,
) -> None:
    """Refuse a mask of a wrong shape, and tokens (B, T) of a wrong dtype or value."""
    if attention_mask is not None:
        _check_mask(config, attention_mask, tokens, cache)
    for each in (tokens.ids, tokens.types):
        if each is not None:
            check_tokens(config, each)


def _check_mask(
    config: GPT2Config, mask: Tensor, tokens: Tokens, cache: KVCache | Past | None
) -> None:
    """Refuse a mask that is not for new tokens, or for them after the columns of a cache."""
    batch, time = tokens.shape
    if mask.dim() == 4:
        _check_mask_of_scores(config, mask, tokens, cache)
        return
    if mask.is_floating_point() and is_readable(mask) and bool((_values(mask) < 0).any()):
        raise GenerationError(
            "attention_mask holds negative numbers, as masks that are added to scores do; give 1 "
            "where a token is real and 0 where it is padding"
        )
    seen = cache.length if isinstance(cache, Past) else 0
    if mask.shape == (batch, seen + time):
        return
    ours = isinstance(cache, KVCache) and mask.dim() == 2
    if ours and len(mask) == batch and mask.shape[1] > time:
        return
    beside = f", after {seen} tokens of past_key_values," if seen else ""
    raise GenerationError(
        f"attention_mask {tuple(mask.shape)} must have the shape of {tokens.name}{beside} "
        f"{(batch, seen + time)}"
    )


def _check_mask_of_scores(
    config: GPT2Config, mask: Tensor, tokens: Tokens, cache: KVCache | Past | None
) -> None:
    """Refuse a mask of four dimensions that is not one of these tokens' scores."""
    batch, time = tokens.shape
    keys = time + (cache.length if isinstance(cache, Past) else 0)
    if isinstance(cache, KVCache) and not cache.is_empty:
        raise GenerationError(
            "attention_mask has four dimensions, and the cache is a KVCache with tokens in it, "
            "whose entries have no columns: give a cache of transformers, such as DynamicCache"
        )
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise GenerationError(
            f"attention_mask has four dimensions and the dtype {mask.dtype}: give bool, true where "
            "a key is seen, or floating-point numbers that are added to the scores"
        )
    rows, heads, *scores = mask.shape
    if rows not in (1, batch) or heads not in (1, config.n_head) or scores != [time, keys]:
        raise GenerationError(
            f"attention_mask {tuple(mask.shape)} must be {(batch, 1, time, keys)}, or have a mask "
            f"for each of the {config.n_head} heads (rows, heads, new tokens, all tokens)"
        )


def _check_seen(mask: Tensor, cache: KVCache) -> None:
    """Refuse a mask (B, P) of the tokens before that has other numbers than a cache's rows."""
    if not is_readable(mask):
        return
    counts = mask.sum(1)
    if not torch.equal(counts, cache.lengths):
        raise GenerationError(
            f"attention_mask has {counts.tolist()} tokens before the new ones and the cache has "
            f"{cache.lengths.tolist()}: give a mask of all tokens, the cached ones as they were "
            "masked when they were read, or of the new tokens alone"
        )


def check_tokens(config: GPT2Config, tokens: Tensor) -> None:
    """Refuse token ids, of any shape, that are not in the vocabulary."""
    if tokens.dtype.is_floating_point or tokens.dtype == torch.bool:
        raise GenerationError(f"token ids have dtype {tokens.dtype}; they are integers")
    if is_readable(tokens) and tokens.numel():
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
    if not is_readable(positions) or not positions.numel():
        return
    low, high = (int(bound) for bound in _values(positions).aminmax())
    if low < 0 or high >= limit:
        raise GenerationError(
            f"position {low if low < 0 else high} is outside this model's 0 .. {limit - 1} "
            f"(n_positions={limit}); shorten the input or generate fewer tokens"
        )


def mask_of_texts(positions: Tensor) -> Tensor | None:
    """The mask of rows of several texts, one after the other, each of which sees itself alone.

    As in transformers, a text begins where positions do not go up by one.

    Args:
        positions: (B, T) or (T,).

    Returns:
        (B or 1, 1, T, T) bool; None if every row is one text. A program that is traced has the mask
        in any case.
    """
    begins = positions.diff(dim=-1) != 1
    is_traced = torch.compiler.is_compiling() or is_fake(positions) or positions.is_meta
    if not is_traced and not bool(_values(begins).any()):
        return None
    numbers = F.pad(begins.cumsum(-1), (1, 0))
    numbers = numbers.view(-1, numbers.shape[-1])
    same = numbers[:, :, None] == numbers[:, None]
    return same.tril()[:, None]


def check_wanted(config: GPT2Config, name: str, wanted: Tensor, tokens: Tokens) -> None:
    """Refuse labels or targets, called `name`, of a wrong shape or value."""
    if wanted.shape != tokens.shape:
        raise ArgumentError(
            f"{name} {tuple(wanted.shape)} must have the shape of {tokens.name} "
            f"{tuple(tokens.shape)}"
        )
    if is_readable(wanted) and wanted.numel():
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


def is_readable(tensor: Tensor) -> bool:
    """True where looking at values is free: on the CPU, outside a traced program, not fake."""
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling() and not is_fake(tensor)
