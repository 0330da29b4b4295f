"""A preallocated key-value cache with ragged rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake

from .. import ops
from .._system.memory import zeros
from ..config import GPT2Config
from ..errors import GenerationError


@dataclass
class Constants:
    """A note that gradients were lost: a cache stores constants, whatever they came from."""

    lost: bool = False
    """True once an entry came from tensors that require gradients."""


class LayerCache(NamedTuple):
    """One layer's part of a cache during a forward pass."""

    k: Tensor
    """(B, T_max, H, D)."""
    v: Tensor
    """(B, T_max, H, D)."""
    lengths: Tensor
    """(B,) entries stored before the new tokens."""
    counts: Tensor | None
    """(B,) number of new tokens that each row stores; None means all of them."""
    empty: bool
    """True if no row holds an entry yet, so that the new tokens see themselves only."""
    k_scales: Tensor | None = None
    """(B, T_max, H) factors of int8 keys."""
    v_scales: Tensor | None = None
    """(B, T_max, H) factors of int8 values."""
    front: Tensor | None = None
    """(B, T) order of the new tokens that puts the stored ones first; None: they are first."""
    constants: Constants | None = None
    """Shared by all layers of the cache."""


class KVCache:
    """Keys and values of the tokens that a model has seen, for `batch_size` independent rows.

    Memory is `2 * n_layer * batch_size * max_length * n_head * head_dim` elements, allocated once;
    on the CPU on huge pages where the system gives them.

    Args:
        n_layer, n_head, head_dim: shape of the model.
        batch_size: rows, B.
        max_length: entries that each row can hold, T_max.
        dtype, device: of keys and values. In int8 each head's entry has a float32 factor and
            is scaled so that its largest element is 127.

    Keys and values are stored as constants: no gradient flows back through a cache. A backward pass
    that would need one is an error.

    Raises:
        GenerationError: a dtype that holds neither floating-point numbers nor int8.
    """

    def __init__(
        self,
        n_layer: int,
        batch_size: int,
        max_length: int,
        n_head: int,
        head_dim: int,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ):
        if dtype is not None and not dtype.is_floating_point and dtype != torch.int8:
            raise GenerationError(
                f"a cache of dtype {dtype} cannot hold keys and values; take a floating-point type "
                "or torch.int8"
            )
        shape = (n_layer, batch_size, max_length, n_head, head_dim)
        self.k = zeros(shape, dtype, device)
        """(L, B, T_max, H, D) keys."""
        self.v = zeros(shape, dtype, device)
        """(L, B, T_max, H, D) values."""
        self.k_scales: Tensor | None = None
        """(L, B, T_max, H) factors of int8 keys."""
        self.v_scales: Tensor | None = None
        """(L, B, T_max, H) factors of int8 values."""
        if dtype == torch.int8:
            self.k_scales = torch.zeros(shape[:-1], dtype=torch.float32, device=device)
            self.v_scales = torch.zeros(shape[:-1], dtype=torch.float32, device=device)
        self.lengths = torch.zeros(batch_size, dtype=torch.int64, device=device)
        """(B,) entries stored in each row."""
        self.positions = torch.zeros(batch_size, dtype=torch.int64, device=device)
        """(B,) position that each row's next token has unless the caller says otherwise."""
        self.constants = Constants()
        """Shared note of lost gradients, which makes a backward pass an error."""
        # An upper bound of the longest row, kept here so that the device need not be asked.
        self._longest = 0

    @classmethod
    def of(
        cls,
        config: GPT2Config,
        batch_size: int,
        max_length: int | None,
        dtype: torch.dtype,
        device: torch.device,
    ) -> KVCache:
        """An empty cache for a model.

        Args:
            config: the model's.
            batch_size: rows.
            max_length: entries a row; None means `n_positions`.
            dtype, device: of keys and values; `torch.int8` takes half the bytes of 16 bits.
        """
        length = config.n_positions if max_length is None else max_length
        sizes = (config.n_layer, batch_size, length, config.n_head, config.head_dim)
        return cls(*sizes, dtype, device)

    @property
    def batch_size(self) -> int:
        """Rows in use."""
        return self.k.shape[1]

    @property
    def is_empty(self) -> bool:
        """True if no row was ever given an entry."""
        return self._longest == 0

    @property
    def max_length(self) -> int:
        """Entries that each row can hold."""
        return self.k.shape[2]

    @property
    def entry_bytes(self) -> int:
        """Bytes that one token's keys and values take in all layers."""
        layers, _, _, heads, head_dim = self.k.shape
        head_bytes = head_dim * self.k.element_size() + (0 if self.k_scales is None else 4)
        return 2 * layers * heads * head_bytes

    def layer(
        self, index: int, counts: Tensor | None = None, front: Tensor | None = None
    ) -> LayerCache:
        """The views that layer `index` writes to and reads from.

        Args:
            index: the layer's number.
            counts: (B,) number of new tokens that each row stores; None means all of them.
            front: (B, T) an order of the new tokens in which those that are stored come first;
                None means that they do.
        """
        k_scales, v_scales = (
            None if x is None else x[index] for x in (self.k_scales, self.v_scales)
        )
        return LayerCache(
            self.k[index],
            self.v[index],
            self.lengths,
            counts,
            self.is_empty,
            k_scales,
            v_scales,
            front,
            self.constants,
        )

    def reserve(self, new_tokens: int, counts: Tensor | None = None) -> None:
        """Check that each row has room for more entries.

        Args:
            new_tokens: most entries to come.
            counts: (B,) entries to come in each row, if they differ.

        Raises:
            GenerationError: a row would grow past `max_length`.
        """
        if self._longest + new_tokens > self.max_length:
            # The bound may be too high: rows were reordered or released, or store fewer tokens.
            longest = int((self.lengths + (new_tokens if counts is None else counts)).max())
            if longest > self.max_length:
                raise GenerationError(
                    f"the cache holds {self.max_length} tokens a row and would need {longest}; "
                    "make it longer (max_length) or generate fewer tokens"
                )

    def advance(self, new_tokens: int, counts: Tensor | None, positions: Tensor) -> None:
        """Count the entries that all layers have stored.

        Args:
            new_tokens: most entries stored.
            counts: (B,) entries stored in each row, if they differ.
            positions: (B,) default position of each row's next token.
        """
        self.lengths = self.lengths + (new_tokens if counts is None else counts)
        self.positions = positions
        self._longest = min(self._longest + new_tokens, self.max_length)

    def reorder(self, rows: Tensor) -> None:
        """Keep the rows `rows`, in that order; rows may repeat, and their number may shrink.

        Args:
            rows: (B',) int64 with B' <= B.
        """
        if len(rows) > self.batch_size:
            raise GenerationError(
                f"{len(rows)} rows do not fit a cache of {self.batch_size}; use expand() to grow it"
            )
        self._check_rows(rows)
        used = self._longest
        for k, v in zip(self.k, self.v, strict=True):
            ops.reorder_cache(k[:, :used], v[:, :used], rows)
        self.k, self.v = self.k[:, : len(rows)], self.v[:, : len(rows)]
        if self.k_scales is not None and self.v_scales is not None:
            for k, v in zip(self.k_scales, self.v_scales, strict=True):
                ops.reorder_cache(k[:, :used, :, None], v[:, :used, :, None], rows)
            self.k_scales = self.k_scales[:, : len(rows)]
            self.v_scales = self.v_scales[:, : len(rows)]
        self.lengths, self.positions = self.lengths[rows], self.positions[rows]

    def release(self, rows: Tensor) -> None:
        """Empty rows so that they can begin another sequence.

        Args:
            rows: (N,) int64.
        """
        self._check_rows(rows)
        ops.release_rows(self.lengths, rows)
        ops.release_rows(self.positions, rows)

    def expand(self, times: int) -> None:
        """Repeat each row `times` times in place of itself (beams, several samples a prompt)."""
        self.k = self.k.repeat_interleave(times, dim=1)
        self.v = self.v.repeat_interleave(times, dim=1)
        if self.k_scales is not None and self.v_scales is not None:
            self.k_scales = self.k_scales.repeat_interleave(times, dim=1)
            self.v_scales = self.v_scales.repeat_interleave(times, dim=1)
        self.lengths = self.lengths.repeat_interleave(times)
        self.positions = self.positions.repeat_interleave(times)

    def repeat_newest(self, rows: Tensor) -> None:
        """Put the newest entry of the row rows[b] in the place of row b's.

        Args:
            rows: (B,) int64; each is as long as the row that takes its entry.
        """
        self._check_rows(rows)
        every, newest = torch.arange(len(rows), device=rows.device), self.lengths - 1
        for entries in (self.k, self.v, self.k_scales, self.v_scales):
            if entries is not None:
                entries[:, every, newest] = entries[:, rows, newest]

    def grow(self, max_length: int) -> None:
        """Make room for `max_length` entries a row, at least as many as there are."""
        for name in ("k", "v", "k_scales", "v_scales"):
            before: Tensor | None = getattr(self, name)
            if before is not None:
                shape = (*before.shape[:2], max_length, *before.shape[3:])
                longer = zeros(shape, before.dtype, before.device)
                longer[:, :, : self._longest] = before[:, :, : self._longest]
                setattr(self, name, longer)

    def _check_rows(self, rows: Tensor) -> None:
        if rows.device.type == "cpu" and len(rows) and not is_fake(rows):
            low, high = (int(bound) for bound in rows.aminmax())
            if low < 0 or high >= self.batch_size:
                raise GenerationError(
                    f"row {low if low < 0 else high} is not one of this cache's rows "
                    f"0 .. {self.batch_size - 1}"
                )
