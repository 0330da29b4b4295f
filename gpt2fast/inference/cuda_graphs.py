"""Many steps of decoding without the host in between: captured once, replayed for each.

A step of GPT-2 is some eighty small kernels, and starting them from Python takes far longer than
they run. `Steps` captures one step, with the choice of the next token in it, as a CUDA graph. Its
tokens, positions, lengths and cache are the graph's own and stay on the device, so that one graph
serves every position of every text. `Ahead` runs blocks of such steps. It takes a graph from those
that `graph_pool.py` keeps with the model, for its rows and entries rounded up, and a smaller one
when enough rows have left; so the same call runs the same shapes, whatever ran before.
"""

from __future__ import annotations

import threading
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from torch import Tensor

from .. import ops
from ..errors import GenerationError
from ..kernels.library import notice
from ..ops.backend import requested_backend
from .graph_pool import addresses, length_bucket, pool_of, rows_bucket
from .sampling import Numbers

if TYPE_CHECKING:
    from ..model import GPT2
    from ..nn.kv_cache import KVCache

BLOCK = 16
"""Steps that run before the host looks at their tokens."""

_capturing = threading.Lock()
"""One capture at a time: beginning one waits for the device, which another one forbids."""


def is_worthwhile(model: object, steps: int) -> TypeGuard[GPT2]:
    """Whether so many steps of `model` are to be captured: on a GPU, and more than a few."""
    from ..model import GPT2

    return (
        isinstance(model, GPT2)
        and model.device.type == "cuda"
        and steps > BLOCK
        and model.why_not_read() is None
    )


@dataclass
class _Block:
    """Tokens that some steps have chosen or are about to."""

    rows: list[int]
    """Of the rows that ran, those that are looked at."""
    chosen: Tensor
    """(rows that ran, steps), on the host: there once `done` has happened."""
    done: torch.cuda.Event | None


class Ahead:
    """Tokens of every row, chosen in blocks before anybody looks at them.

    A block is under way while the one before it is looked at. Rows that have ended run on, unseen,
    until those that are left fit a graph for half as many. `close` gives the graph back.

    Args:
        model: whose steps they are.
        cache: what its rows have read, which is copied; `max_length` is at least what will have
            been read in the end.
        longest: entries in its longest row.
        tokens: (B,) the newest token of each row, not in the cache yet.
        numbers: where random numbers come from, if tokens are drawn.
        choice: `vocab_size` and the processors, as for `Steps`.
    """

    def __init__(
        self,
        model: GPT2,
        cache: KVCache,
        longest: int,
        tokens: Tensor,
        numbers: Numbers | None,
        **choice: Any,
    ):
        self._model, self._numbers, self._choice = model, numbers, choice
        self._pool, self._dtype = pool_of(model), cache.k.dtype
        self._length = length_bucket(cache.max_length, model.config.n_positions)
        # Of the rows that run, those that are looked at.
        self._rows = list(range(len(tokens)))
        self._under_way: list[_Block] = []
        self._seen: _Block | None = None
        self._columns: list[list[int]] = []
        self._steps: Steps | None = self._take(len(tokens))
        try:
            self._steps.start(model, cache, longest, tokens)
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
        """Go on with these rows alone."""
        for block in (self._seen, *self._under_way):
            if block is not None:
                block.rows = [block.rows[row] for row in rows]
        self._rows = [self._rows[row] for row in rows]

    def close(self) -> None:
        """Give the graph back, whatever has happened; nothing more can be asked for."""
        steps, self._steps = self._steps, None
        if steps is not None:
            self._pool.give_back(steps)

    def _begin(self, remaining: int) -> None:
        assert self._steps is not None, "closed"
        if 2 * len(self._rows) <= self._steps.rows:
            self._steps = self._smaller(self._steps)
        steps, count = self._steps, min(BLOCK, remaining)
        uniforms = None
        if self._numbers is not None:
            # Rows that nobody looks at have to choose something, too.
            uniforms = torch.zeros(
                steps.rows, count, dtype=torch.float32, device=steps.tokens.device
            )
            rows = torch.tensor(self._rows, device=steps.tokens.device)
            uniforms[rows] = self._numbers.take(count)
        chosen, done = steps.run(count, uniforms), None
        if chosen.is_cuda:
            # On the CPU whatever the default device is, which pinned memory would fail on.
            host = torch.empty(chosen.shape, dtype=chosen.dtype, device="cpu", pin_memory=True)
            stream = torch.cuda.current_stream(chosen.device)
            chosen = host.copy_(chosen, non_blocking=True)
            done = torch.cuda.Event()
            done.record(stream)
        self._under_way.append(_Block(list(self._rows), chosen, done))

    def _smaller(self, before: Steps) -> Steps:
        """A graph for the rows that are looked at."""
        rows = torch.tensor(self._rows, device=before.tokens.device)
        after = self._take(len(rows))
        try:
            after.start(self._model, before.cache, before.longest, before.tokens[rows], rows)
        except BaseException:
            self._pool.give_back(after)
            raise
        self._rows = list(range(len(rows)))
        self._pool.give_back(before)
        return after

    def _take(self, count: int) -> Steps:
        model, rows, samples = self._model, rows_bucket(count), self._numbers is not None
        shape = (rows, self._length, self._dtype)
        return self._pool.take(
            addresses(model),
            (*shape, samples, *sorted(self._choice.items()), *_settings(model)),
            lambda: Steps(model, *shape, samples=samples, **self._choice),
        )


class Steps:
    """A step of `model` for so many rows, each taking the token that it chose the last time.

    What it runs on is its own, and stays where it is: `start` copies texts into it. Rows that are
    left over are padding, which writes the first entry of its cache again and again and sees no
    other. The weights are read where they were when the step was captured; they are held on to
    between `start` and `stop` only.

    Args:
        model: on whose device it runs.
        rows: B.
        length: entries of a row of its cache.
        dtype: of the cache; None means the model's.
        samples: whether tokens are drawn; else the likeliest are taken.
        vocab_size: choose among the tokens below; None allows all.
        choice: the processors, as `ops.sample` takes them; none may read the history.

    Off a GPU nothing is captured and each step is run: for tests.
    """

    @torch.inference_mode()
    def __init__(
        self,
        model: GPT2,
        rows: int,
        length: int,
        dtype: torch.dtype | None = None,
        *,
        samples: bool,
        vocab_size: int | None = None,
        **choice: Any,
    ):
        config = model.config
        self._config: dict[str, Any] = {
            "n_head": config.n_head,
            "scales": [block.attn.scale for block in model.blocks],
            "activation": config.activation,
            "eps": config.layer_norm_epsilon,
        }
        self._vocab_size, self._choice = vocab_size, choice
        self.rows = rows
        """B, padding included."""
        self.longest = 0
        """Entries in the longest row."""
        self.cache = model.new_cache(rows, length, dtype)
        """Keys, values, lengths and positions of B rows."""
        device = self.cache.k.device
        self.tokens = torch.zeros(rows, dtype=torch.int64, device=device)
        """(B,) the newest token of each row, not in the cache yet."""
        # What a step adds to lengths and positions: 1, of padding 0.
        self._growth = torch.zeros_like(self.tokens)
        self._uniform = torch.zeros(rows, dtype=torch.float32, device=device) if samples else None
        self._history = self.tokens.new_empty((rows, 0))
        self._stream: torch.cuda.Stream | None = None
        self._weights: list[Tensor] = _weights(model)
        self._graph = self._capture()
        self.stop()

    @property
    def nbytes(self) -> int:
        """Bytes of the cache."""
        return sum(entries.nbytes for entries in _entries(self.cache))

    @torch.inference_mode()
    def start(
        self,
        model: GPT2,
        cache: KVCache,
        longest: int,
        tokens: Tensor,
        rows: Tensor | None = None,
    ) -> None:
        """Go on with other texts.

        Args:
            model: as before; its weights lie where they did.
            cache: what the texts' tokens left there, copied from it.
            longest: entries in its longest row.
            tokens: (N,) the newest token of each text, not in the cache yet; N <= B.
            rows: (N,) the texts' rows of `cache`; None means all.
        """
        if rows is None:
            rows = torch.arange(len(tokens), device=tokens.device)
        self._weights, self.longest = _weights(model), longest
        count = len(tokens)
        for mine, other in zip(_entries(self.cache), _entries(cache), strict=True):
            for to, new in zip(mine, other, strict=True):  # a layer's copy at a time
                to[:count, :longest] = new[:, :longest].index_select(0, rows)
        for to, new in (
            (self.tokens, tokens),
            (self._growth, torch.ones_like(tokens)),
            (self.cache.lengths, cache.lengths[rows]),
            (self.cache.positions, cache.positions[rows]),
        ):
            to[:count] = new
            to[count:] = 0

    @torch.inference_mode()
    def run(self, count: int, uniforms: Tensor | None) -> Tensor:
        """Run so many steps.

        Args:
            uniforms: (B, count) random numbers, where tokens are drawn.

        Returns:
            (B, count) the tokens chosen, on the device: nothing has waited for them.
        """
        if self.longest + count > self.cache.max_length:
            raise GenerationError(
                f"a row of {self.longest} tokens has no room for {count} more: the cache holds "
                f"{self.cache.max_length}"
            )
        if self.tokens.is_cuda:
            self._stream = torch.cuda.current_stream(self.tokens.device)
        chosen = self.tokens.new_empty((self.rows, count))
        for step in range(count):
            if self._uniform is not None and uniforms is not None:
                self._uniform.copy_(uniforms[:, step])
            self._advance()
            chosen[:, step] = self.tokens
        self.longest += count
        return chosen

    def stop(self) -> None:
        """Wait for the steps that are under way, and let go of the weights."""
        if self._stream is not None:
            self._stream.synchronize()
        self._stream, self._weights = None, []

    @torch.inference_mode()
    def replay_at(self, length: int) -> None:
        """One step with so many entries in the cache: for timing."""
        self._advance()
        self.cache.lengths.fill_(length)
        self.cache.positions.fill_(length)

    def _advance(self) -> None:
        if self._graph is None:
            self._step()
        else:
            self._graph.replay()

    def _capture(self) -> torch.cuda.CUDAGraph | None:
        if not self.tokens.is_cuda:
            return None
        with _capturing, torch.cuda.device(self.tokens.device):
            # Run once on a stream of its own, as capturing asks for: libraries load and kernels
            # are compiled. All rows are padding so far.
            stream = torch.cuda.Stream(self.tokens.device)
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                self._step()
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            try:
                # Other threads may go on with their own work meanwhile.
                with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
                    self._step()
            except RuntimeError as error:  # an implementation of an op that waits for the host
                notice(f"decoding steps are started one by one: {str(error).splitlines()[0]}")
                return None
            return graph

    def _step(self) -> None:
        cache = self.cache
        logits = ops.decode_step(
            self._weights,
            cache.k,
            cache.v,
            self.tokens,
            cache.positions,
            cache.lengths,
            k_scales=cache.k_scales,
            v_scales=cache.v_scales,
            **self._config,
        )
        chosen = ops.sample(
            logits[:, : self._vocab_size], self._history, self._uniform, **self._choice
        )
        self.tokens.copy_(chosen)
        cache.lengths += self._growth
        cache.positions += self._growth


def _entries(cache: KVCache) -> list[Tensor]:
    """What a cache holds of each token, (L, B, T_max, ...)."""
    parts = (cache.k, cache.v, cache.k_scales, cache.v_scales)
    return [part for part in parts if part is not None]


def _weights(model: GPT2) -> list[Tensor]:
    # Not the parameters themselves, which another storage may be put under.
    return [weight.detach() for weight in model.decode_weights()]


def _settings(model: GPT2) -> tuple[Hashable, ...]:
    """What else decides which kernels a step of `model` captures, and their constants."""
    return (
        *(block.attn.scale for block in model.blocks),
        requested_backend(),
        torch.are_deterministic_algorithms_enabled(),
        torch.get_float32_matmul_precision(),
    )
