"""Keys and values kept as transformers keeps them: its caches, or a tuple for each layer.

Entries are columns: padding has some, too, and an attention mask says which they are. New ones are
appended by making a longer tensor, and gradients flow back through them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..config import GPT2Config
from ..errors import ArgumentError
from .kv_cache import KVCache

_FORMS = (
    "a KVCache of model.new_cache(rows), a cache of transformers such as DynamicCache, or a tuple "
    "of (keys, values) for each layer"
)


class PastLayer:
    """One layer's part of a `Past`.

    Args:
        length: columns before the new tokens.
        index: the layer's number.
        cache: a cache of transformers; None: `pair` is all there is.
        pair: keys and values (B, H, S, D), where there is no cache.
    """

    def __init__(
        self, length: int, index: int, cache: Any = None, pair: tuple[Tensor, Tensor] | None = None
    ):
        self.length = length
        self.index = index
        self.pair = pair
        """With the new tokens, after `extend`."""
        self._cache = cache

    def extend(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Append keys and values (B, T, H, D); returns all of them, (B, S, H, D).

        Raises:
            ArgumentError: those before are of another dtype, or were dropped.
        """
        before = self.pair[0] if self.pair is not None else _stored(self._cache, self.index)
        if before is not None and before.is_floating_point() and before.dtype != k.dtype:
            raise ArgumentError(
                f"past_key_values hold {before.dtype} and this call computes in {k.dtype}: "
                "convert them, or read the tokens again"
            )
        new = k.transpose(1, 2), v.transpose(1, 2)
        if self._cache is not None:
            found = self._cache.update(*new, self.index)
        elif self.pair is not None:
            found = tuple(torch.cat(both, 2) for both in zip(self.pair, new, strict=True))
            self.pair = found
        wanted = self.length + k.shape[1]
        if found[0].shape[2] < wanted:
            raise ArgumentError(
                f"past_key_values gave {found[0].shape[2]} keys of {wanted}: a cache with a "
                "sliding window is for other models; take transformers.DynamicCache()"
            )
        keys, values = (x[:, :, :wanted].transpose(1, 2) for x in found)
        return keys, values


class Past:
    """The keys and values before a call, in a form that transformers takes.

    Args:
        config: the model's.
        given: a cache of transformers, or a tuple of (keys, values), (B, H, P, D) both, a layer.
        rows: rows of the new tokens, B.

    Raises:
        ArgumentError: it is neither, or of another model's shape.
    """

    def __init__(self, config: GPT2Config, given: Any, rows: int):
        self._given = given
        if isinstance(given, (tuple, list)):
            pairs = [_pair(layer) for layer in given]
            stored: list[Any] = [keys for keys, _ in pairs]
            self.length = int(stored[0].shape[2]) if stored and stored[0].dim() == 4 else 0
            """Columns before the new tokens."""
            self.layers = [
                PastLayer(self.length, index, None, pair) for index, pair in enumerate(pairs)
            ]
            """A part for each block."""
            both = [x for pair in pairs for x in pair]
            for x in both:
                _check(config, x, rows, self.length)
        elif all(hasattr(given, name) for name in ("layers", "update", "get_seq_length")):
            self.length = int(given.get_seq_length())
            self.layers = [PastLayer(self.length, index, given) for index in range(config.n_layer)]
            stored = given.layers
            for index in range(len(stored)):
                keys = _stored(given, index)
                if keys is not None:
                    _check(config, keys, rows, None)
        else:
            raise ArgumentError(f"past_key_values is a {type(given).__name__}; give {_FORMS}")
        if len(stored) != config.n_layer and (len(stored) or isinstance(given, (tuple, list))):
            raise ArgumentError(
                f"past_key_values have {len(stored)} layers and this model has {config.n_layer}; "
                "were they made by another model?"
            )

    @property
    def result(self) -> Any:
        """The cache that was given, or a tuple with the new entries."""
        if isinstance(self._given, (tuple, list)):
            return tuple(layer.pair for layer in self.layers)
        return self._given


def opened(config: GPT2Config, cache: Any, rows: int) -> KVCache | Past | None:
    """A cache as a model works with it; arguments as of `Past`, or a `KVCache`, or None."""
    return cache if cache is None or isinstance(cache, KVCache) else Past(config, cache, rows)


def one_cache(cache: Any, past_key_values: Any) -> Any:
    """The one that is given of two names for the same argument.

    Raises:
        ArgumentError: both are.
    """
    if past_key_values is None or cache is past_key_values:
        return cache
    if cache is not None:
        raise ArgumentError("cache and past_key_values are one argument: give it once")
    return past_key_values


def _pair(layer: Any) -> tuple[Tensor, Tensor]:
    """Keys and values of an entry, which transformers' caches list beside a third that is None."""
    entry = tuple(layer) if isinstance(layer, (tuple, list)) else ()
    if (
        not all(isinstance(x, Tensor) for x in entry[:2])
        or len(entry) < 2
        or any(x is not None for x in entry[2:])
    ):
        raise ArgumentError(f"an entry of past_key_values is not (keys, values); give {_FORMS}")
    return entry[0], entry[1]


def _stored(cache: Any, index: int) -> Tensor | None:
    """The keys (B, H, S, D) that a layer of a cache holds, if any."""
    if index >= len(cache.layers):
        return None
    keys = getattr(cache.layers[index], "keys", None)
    return keys if isinstance(keys, Tensor) and keys.dim() == 4 else None


def _check(config: GPT2Config, x: Tensor, rows: int, length: int | None) -> None:
    """Refuse keys or values that are not (rows, heads, length, head size)."""
    shape = (rows, config.n_head, x.shape[2] if length is None and x.dim() == 4 else length)
    if tuple(x.shape) != (*shape, config.head_dim):
        raise ArgumentError(
            f"past_key_values hold {tuple(x.shape)} and this call needs "
            f"{(*shape, config.head_dim)} (rows, heads, tokens, head size)"
        )
