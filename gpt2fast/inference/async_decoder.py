"""Tokens chosen in blocks of steps that run before the host looks at them.

`AsyncDecoder` runs captured steps (`cuda_graphs.py`). It takes a graph from the pool in
`graph_pool.py`, with its rows and cache length rounded up, and a smaller one when enough rows have
ended; so the same call runs the same shapes, whatever ran before.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..model import GPT2
from ..nn.kv_cache import KVCache
from ..ops.backend import requested_backend
from .cuda_graphs import CapturedStep
from .graph_pool import addresses, length_bucket, pool_of, rows_bucket
from .sampling import RowRandom
from .structure import why_not_read
from .transfers import to_device, to_host

BLOCK = 16
"""Steps that run before the host looks at their tokens."""


def is_worthwhile(model: GPT2, steps: int) -> bool:
    """True where capturing so many steps pays: on a GPU, and for more than a few."""
    return model.device.type == "cuda" and steps > BLOCK and why_not_read(model) is None


@dataclass
class _Block:
    """Tokens of some steps that have run or are running."""

    rows: list[int]
    """Rows of `chosen` whose text has not ended."""
    chosen: Tensor
    """(rows that run, steps), copied to the host by the time of `done`."""
    done: torch.cuda.Event | None


class AsyncDecoder:
    """The next tokens of every row, from blocks of steps that run ahead of the host.

    While the host handles the tokens of one block, the next block runs. Rows whose text has ended
    run on, and their tokens are ignored, until the other rows fit a graph for half as many. `close`
    gives the graph back.

    Args:
        model: the GPT2 that decodes.
        cache: keys and values of the rows so far, which are copied; its `max_length` has room for
            all tokens to come.
        longest: number of entries in its longest row.
        tokens: (B,) the newest token of each row, not in the cache yet.
        random: source of random numbers, if tokens are sampled.
        history: (B, S) the rows' tokens up to the newest, after -1 as padding, if the choice reads
            them.
        choice: `vocab_size` and the processors, as for `CapturedStep`.
    """

    def __init__(
        self,
        model: GPT2,
        cache: KVCache,
        longest: int,
        tokens: Tensor,
        random: RowRandom | None,
        history: Tensor | None = None,
        **choice: Any,
    ):
        self._model, self._random = model, random
        self._choice = {**choice, "reads_history": history is not None}
        self._pool, self._dtype = pool_of(model), cache.k.dtype
        self._length = length_bucket(cache.max_length, model.config.n_positions)
        # Rows of the running batch whose text has not ended.
        self._rows = list(range(len(tokens)))
        self._under_way: list[_Block] = []
        self._seen: _Block | None = None
        self._columns: list[list[int]] = []
        self._step: CapturedStep | None = self._take(len(tokens))
        try:
            self._step.start(model, cache, longest, tokens, history=history)
        except BaseException:
            self.close()
            raise

    def next(self, remaining: int) -> list[int]:
        """The next token of each row; `remaining` of them will be asked for at most."""
        if not self._columns:
            if not self._under_way:
                self._begin(remaining)
            ahead = sum(block.chosen.shape[1] for block in self._under_way)
            if remaining > ahead:
                self._begin(remaining - ahead)
            self._seen = self._under_way.pop(0)
            if self._seen.done is not None:
                self._seen.done.synchronize()
            self._columns = self._seen.chosen.t().tolist()
        assert self._seen is not None
        column = self._columns.pop(0)
        return [column[row] for row in self._seen.rows]

    def keep(self, rows: Sequence[int]) -> None:
        """Keep only these rows."""
        for block in (self._seen, *self._under_way):
            if block is not None:
                block.rows = [block.rows[row] for row in rows]
        self._rows = [self._rows[row] for row in rows]

    def close(self) -> None:
        """Give the graph back to the pool, also after an error; the decoder cannot be used then."""
        step, self._step = self._step, None
        if step is not None:
            self._pool.give_back(step)

    def _begin(self, remaining: int) -> None:
        assert self._step is not None, "closed"
        if 2 * len(self._rows) <= self._step.rows:
            self._step = self._smaller(self._step)
        steps, count = self._step, min(BLOCK, remaining)
        uniforms = None
        if self._random is not None:
            # Rows that have ended still need random numbers, which are ignored. They are put in
            # their places here: an index on the device would be one more copy in each block.
            numbers = torch.zeros(steps.rows, count, dtype=torch.float32, device="cpu")
            numbers[self._rows] = self._random.take(count)
            uniforms = to_device(numbers, steps.tokens.device)
        chosen, done = to_host(steps.run(count, uniforms))
        self._under_way.append(_Block(list(self._rows), chosen, done))

    def _smaller(self, before: CapturedStep) -> CapturedStep:
        """A graph for the rows that have not ended."""
        rows = to_device(torch.tensor(self._rows, device="cpu"), before.tokens.device)
        after = self._take(len(rows))
        try:
            after.start(
                self._model, before.cache, before.longest, before.tokens[rows], rows, before.history
            )
        except BaseException:
            self._pool.give_back(after)
            raise
        self._rows = list(range(len(rows)))
        self._pool.give_back(before)
        return after

    def _take(self, count: int) -> CapturedStep:
        model, rows, samples = self._model, rows_bucket(count), self._random is not None
        shape = (rows, self._length, self._dtype)
        return self._pool.take(
            addresses(model),
            (*shape, samples, *sorted(self._choice.items()), *_settings(model)),
            lambda: CapturedStep(model, *shape, samples=samples, **self._choice),
        )


def _settings(model: GPT2) -> tuple[Hashable, ...]:
    """Everything else that a captured step depends on: choice of kernels, and constants."""
    return (
        *(block.attn.scale for block in model.blocks),
        requested_backend(),
        torch.are_deterministic_algorithms_enabled(),
        torch.get_float32_matmul_precision(),
    )
