"""A step of the model over pages: with packed weights in one call, or through the modules.

A step reads new tokens of several texts, whose earlier keys and values are in pages of a pool, and
adds those of the new ones. The pool is a `KVCache` with a row for each page.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from ... import ops
from ...model import GPT2
from ...nn.kv_cache import KVCache
from ..decoding import evaluating
from ..engine import Decoder, ModelDecoder
from ..packed import PackedGPT2

_Piece = TypeVar("_Piece")


@dataclass(frozen=True)
class StepInput:
    """New tokens of S texts; all tensors are int64 on the CPU, unless it says otherwise."""

    tokens: Tensor
    """(N,) text after text."""
    positions: Tensor
    """(N,) each token's place in its text."""
    starts: Tensor
    """(S + 1,) where each text begins in `tokens`; the last one is N."""
    lengths: Tensor
    """(S,) entries of each text that are there already."""
    outputs: Tensor
    """(P,) indices into `tokens`: logits after these are wanted."""
    pages: Tensor
    """(S, M) the pages of each text, in order, then -1."""
    singly: Tensor
    """(S,) bool: the tokens of these texts are computed as steps of one token would."""


class StepModel(Protocol):
    """A model as the engine sees it."""

    pool: KVCache
    """Keys and values; row p is page p."""
    grid: int
    """Prompts are cut at multiples of this only, so that a token is always computed with the same
    ones, whatever else the steps do."""
    verifies: bool
    """True if several tokens read singly in one step have the logits of several steps."""

    def together(self, pieces: Sequence[tuple[_Piece, int]]) -> list[list[_Piece]]:
        """Those that one call of `step` takes together.

        Args:
            pieces: each with its number of tokens.
        """

    def step(self, given: StepInput) -> Tensor:
        """Logits (P, V)."""

    def copy_page(self, source: int, target: int) -> None:
        """Copy the entries of a page to another."""


class PackedSteps:
    """Steps of packed weights. A token's logits depend on its own text alone, to the last bit.

    Args:
        model: what computes.
        pages, page_size: of the pool.
    """

    grid = 1
    verifies = True

    def __init__(self, model: PackedGPT2, pages: int, page_size: int):
        self._weights = model.weights
        self.pool = model.new_cache(pages, page_size)
        self._numbers = torch.arange(pages + 1, device="cpu")

    def together(self, pieces: Sequence[tuple[_Piece, int]]) -> list[list[_Piece]]:
        """All; see `StepModel`."""
        return [[piece for piece, _ in pieces]]

    def step(self, given: StepInput) -> Tensor:
        """See `StepModel`."""
        pool = self.pool
        return ops.packed_step(
            self._weights,
            pool.k,
            pool.v,
            given.tokens,
            given.positions,
            given.starts,
            self._numbers[: len(given.lengths)],
            given.lengths,
            given.outputs,
            k_scales=pool.k_scales,
            v_scales=pool.v_scales,
            pages=given.pages,
            singly=given.singly,
        )

    def copy_page(self, source: int, target: int) -> None:
        """See `StepModel`."""
        _copy_page(self.pool, source, target)


class ModuleSteps:
    """Steps of a GPT2 through its modules: where somebody watches them, and on a GPU.

    A text's pages are gathered into rows of a cache, and the new entries written back. On the CPU
    each text is read by itself, so that its neighbors do not change the order of any sum. On a GPU
    texts that get one token are read together; products of other shapes may round otherwise there.

    Args:
        model: what computes.
        pages, page_size: of the pool.
        chunk: most tokens of a prompt in one step.
    """

    verifies = False

    def __init__(self, model: GPT2, pages: int, page_size: int, chunk: int):
        self._model, self._decoder = model, ModelDecoder(model)
        self.pool = model.new_cache(pages, page_size)
        self.grid = chunk
        self._size = page_size
        self._is_cpu = model.device.type == "cpu"

    def together(self, pieces: Sequence[tuple[_Piece, int]]) -> list[list[_Piece]]:
        """See `StepModel`."""
        singles = [piece for piece, count in pieces if count == 1]
        if self._is_cpu or not singles:
            return [[piece] for piece, _ in pieces]
        return [singles, *([piece] for piece, count in pieces if count > 1)]

    def step(self, given: StepInput) -> Tensor:
        """See `StepModel`; every text has as many new tokens, one unless it is alone."""
        device = self._model.device
        rows = len(given.lengths)
        count = len(given.tokens) // rows
        longest = int(given.lengths.max()) + count
        used = -(-longest // self._size)
        # Columns past a row's own pages are not read: its length ends before them.
        pages = given.pages[:, :used].clamp(min=0).to(device)
        lengths = given.lengths.to(device)
        cache = self._model.new_cache(rows, used * self._size, self.pool.k.dtype)
        for whole, pool in zip(_tensors(cache), _tensors(self.pool), strict=True):
            gathered = pool[:, pages]  # (L, B, M, P, …)
            whole.copy_(gathered.flatten(2, 3))
        if int(given.lengths.max()) > 0:
            cache.advance(longest - count, lengths, lengths)
        tokens = given.tokens.view(rows, count).to(device)
        with evaluating(self._model):
            logits = self._logits(tokens, given, cache)
        at = lengths[:, None] + torch.arange(count, device=device)
        row = torch.arange(rows, device=device)[:, None].expand_as(at)
        page = pages.gather(1, at // self._size)
        for whole, pool in zip(_tensors(cache), _tensors(self.pool), strict=True):
            pool[:, page, at % self._size] = whole[:, row, at]
        return logits

    def _logits(self, tokens: Tensor, given: StepInput, cache: KVCache) -> Tensor:
        rows, count = tokens.shape
        if count == 1:
            logits = self._decoder.decode_step(tokens[:, 0], cache)
            return logits if len(given.outputs) == rows else logits[given.outputs.to(logits.device)]
        if given.outputs.tolist() == [count - 1]:
            return self._decoder.prefill(tokens, [count], given.lengths.tolist(), cache)
        positions = given.positions[None].to(tokens.device)
        output = self._model(tokens, position_ids=positions, cache=cache)
        return output.logits[0, given.outputs.to(tokens.device)]

    def copy_page(self, source: int, target: int) -> None:
        """See `StepModel`."""
        _copy_page(self.pool, source, target)


def step_model(decoder: Decoder, pages: int, page_size: int, chunk: int) -> StepModel:
    """The way to compute steps of a model.

    Args:
        decoder: the model's.
        pages, page_size: of the pool that is made for it.
        chunk: most tokens of a prompt in one step.
    """
    if isinstance(decoder, PackedGPT2):
        return PackedSteps(decoder, pages, page_size)
    assert isinstance(decoder, ModelDecoder)
    return ModuleSteps(decoder.model, pages, page_size, chunk)


def _tensors(cache: KVCache) -> list[Tensor]:
    found = (cache.k, cache.v, cache.k_scales, cache.v_scales)
    return [tensor for tensor in found if tensor is not None]


def _copy_page(pool: KVCache, source: int, target: int) -> None:
    for tensor in _tensors(pool):
        tensor[:, target] = tensor[:, source]
