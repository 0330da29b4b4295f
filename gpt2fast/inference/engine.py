"""The engine of decoding: GPT2 and PackedGPT2 under one protocol, and the state of a batch.

A decoding loop (`decoding.py`, `beam_search.py`) holds a `DecodeState` and asks it for the next
logits or tokens; the state asks its `Decoder`. Where steps can be captured, `async_decoder.py`
takes over and chooses tokens in blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from .. import ops
from ..config import GPT2Config
from ..kernels.library import notice
from ..model import GPT2
from ..nn.inputs import check_cache, check_held, check_positions, check_tokens
from ..nn.kv_cache import KVCache
from ..nn.output import LOGITS_ALONE
from ..nn.plain import is_unwatched
from ..nn.projection import merged
from ..ops.native import CACHE_DTYPES
from .async_decoder import AsyncDecoder, is_worthwhile
from .packed import PackedGPT2
from .packing import packed_copy
from .sampling import RowRandom
from .structure import decode_weights, run_step, step_constants, why_not_read


class Decoder(Protocol):
    """A model as decoding sees it: `PackedGPT2` is one, and `ModelDecoder` makes one of a GPT2."""

    @property
    def config(self) -> GPT2Config:
        """The model's shape."""

    @property
    def weight_bytes(self) -> int:
        """Bytes of weights that a step for one token reads."""

    def new_cache(self, batch_size: int, max_length: int | None = None) -> KVCache:
        """An empty cache."""

    def prefill(
        self, tokens: Tensor, counts: Sequence[int], offsets: Sequence[int], cache: KVCache | None
    ) -> Tensor:
        """Logits (B, V) after the newest tokens of each row.

        Args:
            tokens: (B, T) int64; row b's newest counts[b] columns are read.
            counts: tokens of each row, at least 1.
            offsets: position of each row's first token.
            cache: with B rows, which keeps what was read; None keeps nothing.
        """

    def decode_step(self, tokens: Tensor, cache: KVCache) -> Tensor:
        """Append a token (B,) to each row of a cache; returns the next logits (B, V)."""

    def decode_and_sample(
        self,
        tokens: Tensor,
        cache: KVCache,
        history: Tensor,
        uniform: Tensor | None = None,
        **choice: Any,
    ) -> tuple[Tensor, Tensor]:
        """`decode_step`, and a choice of the next tokens (B,) as `ops.packed_next` makes it."""


class ModelDecoder:
    """A GPT2 that decodes without packed weights: on a GPU, or where its modules are called."""

    def __init__(self, model: GPT2):
        self.model = model
        self.config = model.config

    @property
    def weight_bytes(self) -> int:
        """See `Decoder`."""
        return self.model.weight_bytes

    def new_cache(self, batch_size: int, max_length: int | None = None) -> KVCache:
        """See `Decoder`."""
        return self.model.new_cache(batch_size, max_length)

    def prefill(
        self, tokens: Tensor, counts: Sequence[int], offsets: Sequence[int], cache: KVCache | None
    ) -> Tensor:
        """See `Decoder`."""
        longest = max(counts)
        mask = positions = None
        if any(offsets) or min(counts) < longest:
            column = torch.arange(longest, device=tokens.device) - longest
            index = column + torch.tensor(counts, device=tokens.device)[:, None]
            mask = (index >= 0).long()
            starts = torch.tensor(offsets, device=tokens.device)[:, None]
            positions = (index + starts).clamp(min=0)
        tokens = tokens[:, -longest:].clamp(min=0)
        with torch.no_grad():
            return _call(self.model, tokens, mask, positions, cache)

    def decode_step(self, tokens: Tensor, cache: KVCache) -> Tensor:
        """See `Decoder`."""
        return decode_step(self.model, tokens, cache)

    def decode_and_sample(
        self,
        tokens: Tensor,
        cache: KVCache,
        history: Tensor,
        uniform: Tensor | None = None,
        **choice: Any,
    ) -> tuple[Tensor, Tensor]:
        """See `Decoder`."""
        logits = decode_step(self.model, tokens, cache)
        return logits, choose(logits, history, uniform, **choice)


def decoder_of(model: GPT2 | PackedGPT2) -> Decoder:
    """The decoder that is fastest here for a model."""
    fastest = model.for_decoding()
    return ModelDecoder(fastest) if isinstance(fastest, GPT2) else fastest


def for_decoding(model: GPT2) -> GPT2 | PackedGPT2:
    """The form of a model that decodes fastest here.

    Where the native kernels run, that is a packed copy of the weights. It is made when it is first
    asked for and again after the weights have changed; `pack(release=True)` keeps no second copy.
    Adapters are merged.
    """
    check_held(model.wte)
    if why_not_read(model) is not None:
        return model
    return packed_copy(model, thorough=True) or merged(model)


@torch.no_grad()
def decode_step(
    model: GPT2, tokens: Tensor, cache: KVCache, position_ids: Tensor | None = None
) -> Tensor:
    """Append one token to each row of a cache and return the logits of the next.

    Where the native kernels run, the weights are packed first, and again when they have changed; a
    change in place through `parameter.data`, which torch does not count, goes unnoticed until
    `for_decoding` or `generate` is called: looking for it would take as long as a step.

    Args:
        tokens: (B,) int64.
        cache: with B rows.
        position_ids: (B,) int64; defaults to what follows the tokens seen.

    Returns:
        (B, vocab) logits. Not differentiable.
    """
    check_held(model.wte)
    if why_not_read(model) is not None:
        places = None if position_ids is None else position_ids[:, None]
        return _call(model, tokens[:, None], None, places, cache)
    packed = packed_copy(model, thorough=False) if cache.k.dtype in CACHE_DTYPES else None
    if packed is not None:
        return packed.decode_step(tokens, cache, position_ids).to(model.dtype)
    positions = cache.positions if position_ids is None else position_ids
    check_tokens(model.config, tokens)
    check_positions(model.config, positions[:, None])
    check_cache(model.config, cache, len(tokens))
    cache.reserve(1)
    logits = run_step(decode_weights(model), step_constants(model), tokens, positions, cache)
    cache.advance(1, None, positions + 1)
    return logits


def _call(
    model: GPT2,
    tokens: Tensor,
    mask: Tensor | None,
    positions: Tensor | None,
    cache: KVCache | None,
) -> Tensor:
    """Logits (B, V) after the last column, by calling the modules."""
    if is_unwatched(model, GPT2):
        hidden = model.hidden_states(tokens, mask, positions, cache)
        return model.project(hidden[:, -1:])[:, -1]  # (B, 1, C), as hooks see it in transformers
    found = model(tokens, mask, positions, cache=cache, logits_to_keep=1, **LOGITS_ALONE)
    return cast("Tensor", found.logits[:, -1])


def choose(
    logits: Tensor,
    history: Tensor,
    uniform: Tensor | None,
    vocab_size: int | None = None,
    **processors: Any,
) -> Tensor:
    """`ops.sample` among the tokens below `vocab_size`; None allows all."""
    return ops.sample(logits[:, :vocab_size], history, uniform, **processors)


class DecodeState:
    """The tokens of every row so far, and their keys and values in a cache.

    Args:
        model: a GPT2, or a PackedGPT2.
        prompts: token ids of each row, at least one; rows may differ in length.
        steps: maximum of tokens to append to a row.
        use_cache: keep keys and values; without, every step reads everything again.
        slides: a row that reaches `n_positions` goes on with the newest half of its tokens;
            without, the caller sees to it that no row gets that far.
    """

    def __init__(
        self,
        model: GPT2,
        prompts: Sequence[Sequence[int]],
        steps: int,
        *,
        use_cache: bool = True,
        slides: bool = False,
    ):
        self._decoder = decoder_of(model)
        longest = max(len(prompt) for prompt in prompts)
        self._columns = torch.tensor(
            [[-1] * (longest - len(prompt)) + list(prompt) for prompt in prompts],
            device=model.device,
        )
        self._filled = self._prompted = longest
        self._room = model.config.n_positions
        self._half = max(1, self._room // 2)
        self._visible = [len(prompt) for prompt in prompts]
        """Tokens of each row that the model sees, the newest ones of its history."""
        if slides:
            self._visible = [n if n <= self._room else self._half for n in self._visible]
        self._cache = None
        self._entry_bytes = 0
        if use_cache:
            capacity = min(max(self._visible) + steps, self._room)
            self._cache = self._decoder.new_cache(len(prompts), capacity)
            self._entry_bytes = self._cache.entry_bytes

    @property
    def history(self) -> Tensor:
        """(rows, S) int64: each row's tokens up to the last column, after -1 as padding."""
        return self._columns[:, : self._filled]

    @property
    def generated(self) -> Tensor:
        """(rows, N) int64: the tokens that were appended, the last columns of the history."""
        return self._columns[:, self._prompted : self._filled]

    def read(self) -> Tensor:
        """Read all visible tokens; returns the logits (rows, vocab) of every row's next token."""
        return self._read(self._visible, [0] * len(self._visible))

    def append(self, tokens: Tensor) -> Tensor:
        """Add a token (rows,) to each row; returns the logits (rows, vocab) of the next ones."""
        self._remember(tokens)
        full = [row for row, count in enumerate(self._visible) if count == self._room]
        before = self._visible
        self._visible = [self._half if n == self._room else n + 1 for n in before]
        if self._cache is None:
            return self.read()
        if not full:
            return self._decoder.decode_step(tokens, self._cache)
        self._cache.release(torch.tensor(full, device=tokens.device))
        news = [self._half if n == self._room else 1 for n in before]
        return self._read(news, [0 if n == self._room else n for n in before])

    def next(
        self, tokens: Tensor, uniform: Tensor | None, reads_history: bool, **choice: Any
    ) -> tuple[Tensor, Tensor]:
        """Add a token (rows,) to each row and choose the next ones.

        Args:
            uniform, choice: as in `ops.packed_next`.
            reads_history: the choice reads the history.

        Returns:
            Logits (rows, vocab) and tokens (rows,).
        """
        if self._cache is None or self._room in self._visible:
            logits = self.append(tokens)
            history = self.history if reads_history else self._columns[:, :0]
            return logits, choose(logits, history, uniform, **choice)
        self._remember(tokens)
        self._visible = [count + 1 for count in self._visible]
        history = self.history if reads_history else self._columns[:, :0]
        return self._decoder.decode_and_sample(tokens, self._cache, history, uniform, **choice)

    def run_ahead(
        self,
        tokens: Tensor,
        steps: int,
        random: RowRandom | None,
        reads_history: bool,
        **choice: Any,
    ) -> AsyncDecoder | None:
        """Hand the rows over to an `AsyncDecoder`, which chooses tokens in blocks, where that pays.

        Args:
            tokens: (rows,) the newest ones, not read yet.
            steps: most steps to come.
            random, choice: as `AsyncDecoder` takes them.
            reads_history: the choice reads the history.

        Returns:
            None if steps are to be taken one by one: not on a GPU, for a row that would have to
            slide on the way, or where memory does not suffice for a second cache. Otherwise the
            decoder has the only up-to-date cache from now on, and `count` and `forget` keep this
            state's lengths and rows in line with it.
        """
        longest = max(self._visible)
        fits = longest + steps <= self._room
        if self._cache is None or not fits or not isinstance(self._decoder, ModelDecoder):
            return None
        model = self._decoder.model
        if not is_worthwhile(model, steps):
            return None
        history = torch.cat([self.history, tokens[:, None]], dim=1) if reads_history else None
        try:
            ahead = AsyncDecoder(model, self._cache, longest, tokens, random, history, **choice)
        except torch.OutOfMemoryError as error:
            reason = str(error).splitlines()[0]
            notice(f"decoding steps are started one by one, without a captured step: {reason}")
            return None
        self._cache = None
        return ahead

    def count(self, tokens: int) -> None:
        """Note that an `AsyncDecoder` has read this many tokens of each row."""
        self._visible = [visible + tokens for visible in self._visible]

    def forget(self, rows: Sequence[int]) -> None:
        """Note that an `AsyncDecoder` has kept only these rows."""
        self._visible = [self._visible[row] for row in rows]

    def expand(self, copies: int) -> None:
        """Repeat every row, the copies side by side."""
        if copies == 1:
            return
        self._columns = self._columns.repeat_interleave(copies, dim=0)
        self._visible = [count for count in self._visible for _ in range(copies)]
        if self._cache is not None:
            self._cache.expand(copies)

    def keep(self, rows: Tensor) -> None:
        """Keep these rows (an index tensor); a row may be left out or taken twice."""
        self._columns = self._columns[rows]
        self._visible = [self._visible[row] for row in rows.tolist()]
        if self._cache is not None:
            self._cache.reorder(rows)

    def step_bytes(self) -> int:
        """Bytes of weights and of cached keys and values that one step reads."""
        return self._decoder.weight_bytes + sum(self._visible) * self._entry_bytes

    def _remember(self, tokens: Tensor) -> None:
        if self._filled == self._columns.shape[1]:
            room = self._columns.new_full((len(tokens), 256), -1)
            self._columns = torch.cat([self._columns, room], dim=1)
        self._columns[:, self._filled] = tokens
        self._filled += 1

    def _read(self, counts: list[int], offsets: list[int]) -> Tensor:
        """Read each row's newest `counts[row]` tokens, from position `offsets[row]` on."""
        return self._decoder.prefill(self.history, counts, offsets, self._cache)
