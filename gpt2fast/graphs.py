"""Many steps of decoding without the host in between: captured once, replayed for each.

A step of GPT-2 is some eighty small kernels, and starting them from Python takes far longer than
they run. `Steps` captures one step, with the choice of the next token in it, as a CUDA graph. Its
tokens, positions and lengths stay on the device, so that one graph serves every position, and no
token has to visit the host before the next step begins.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from torch import Tensor

from . import ops
from .library import notice
from .sampling import Numbers

if TYPE_CHECKING:
    from .cache import KVCache
    from .model import GPT2

BLOCK = 16
"""Steps that run before the host looks at their tokens."""


def is_worthwhile(model: object, steps: int) -> TypeGuard[GPT2]:
    """Whether so many steps of `model` are to be captured: on a GPU, and more than a few."""
    from .model import GPT2

    return isinstance(model, GPT2) and model.device.type == "cuda" and steps > BLOCK


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
    until half of all have.

    Args:
        model, cache, tokens, choice: as for `Steps`.
        numbers: where random numbers come from, if tokens are drawn.
    """

    def __init__(
        self,
        model: GPT2,
        cache: KVCache,
        tokens: Tensor,
        numbers: Numbers | None,
        **choice: Any,
    ):
        self._model, self._cache, self._numbers, self._choice = model, cache, numbers, choice
        self._steps = self._start(tokens)
        # Of the rows that run, those that are looked at.
        self._rows = list(range(len(tokens)))
        self._under_way: list[_Block] = []
        self._seen: _Block | None = None
        self._columns: list[list[int]] = []

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

    def _begin(self, remaining: int) -> None:
        count = min(BLOCK, remaining)
        rows = torch.tensor(self._rows, device=self._steps.tokens.device)
        if 2 * len(rows) <= len(self._steps.tokens):
            tokens = self._steps.tokens[rows]
            self._cache.reorder(rows)
            self._steps.wait()
            self._steps = self._start(tokens)
            self._rows = list(range(len(rows)))
            rows = torch.arange(len(rows), device=rows.device)
        uniforms = None
        if self._numbers is not None:
            # Rows that nobody looks at have to choose something, too.
            uniforms = torch.zeros(len(self._steps.tokens), count, device=rows.device)
            uniforms[rows] = self._numbers.take(count)
        chosen, done = self._steps.run(count, uniforms), None
        if chosen.is_cuda:
            host = torch.empty(chosen.shape, dtype=chosen.dtype, pin_memory=True)
            chosen = host.copy_(chosen, non_blocking=True)
            done = torch.cuda.Event()
            done.record()
        self._under_way.append(_Block(list(self._rows), chosen, done))

    def _start(self, tokens: Tensor) -> Steps:
        samples = self._numbers is not None
        return Steps(self._model, self._cache, tokens, samples=samples, **self._choice)


class Steps:
    """Steps of `model` for the rows of `cache`, each taking the tokens that the last one chose.

    Args:
        tokens: (B,) the newest token of each row, not in the cache yet.
        samples: whether tokens are drawn; else the likeliest are taken.
        vocab_size: choose among the tokens below; None allows all.
        choice: the processors, as `ops.sample` takes them; none may read the history.

    Off a GPU nothing is captured and each step is run: for tests.
    """

    def __init__(
        self,
        model: GPT2,
        cache: KVCache,
        tokens: Tensor,
        *,
        samples: bool,
        vocab_size: int | None = None,
        **choice: Any,
    ):
        self._model, self._cache = model, cache
        self._weights = model.decode_weights()
        self._vocab_size, self._choice = vocab_size, choice
        self.tokens = tokens.clone()
        """(B,) the newest token of each row."""
        self._uniform = torch.zeros(len(tokens), device=tokens.device) if samples else None
        self._history = tokens.new_empty((len(tokens), 0))
        # The cache's own tensors are replaced at every step; the graph's have to stay where they
        # are.
        self._lengths, self._positions = cache.lengths.clone(), cache.positions.clone()
        self._graph = None
        if tokens.is_cuda:
            with torch.cuda.device(tokens.device):
                self._graph = self._capture()

    def run(self, count: int, uniforms: Tensor | None) -> Tensor:
        """Run so many steps.

        Args:
            uniforms: (B, count) random numbers, where tokens are drawn.

        Returns:
            (B, count) the tokens chosen, on the device: nothing has waited for them.
        """
        self._cache.reserve(count)
        chosen = self.tokens.new_empty((len(self.tokens), count))
        for step in range(count):
            if self._uniform is not None and uniforms is not None:
                self._uniform.copy_(uniforms[:, step])
            if self._graph is None:
                self._step()
            else:
                self._graph.replay()
            chosen[:, step] = self.tokens
        self._cache.advance(count, None, self._positions.clone())
        return chosen

    def wait(self) -> None:
        """Until all steps are done: the graph must not go before."""
        if self._graph is not None:
            torch.cuda.current_stream(self.tokens.device).synchronize()

    @torch.inference_mode()
    def replay_at(self, length: int) -> None:
        """One step with so many entries in the cache: for timing."""
        if self._graph is None:
            self._step()
        else:
            self._graph.replay()
        self._lengths.fill_(length)
        self._positions.fill_(length)

    def _capture(self) -> torch.cuda.CUDAGraph | None:
        # Run once on a stream of its own, as capturing asks for: libraries load and kernels are
        # compiled. What that changes is put back; what it wrote behind the rows' ends is written
        # again by the first step.
        self._cache.reserve(1)
        kept = [x.clone() for x in (self.tokens, self._lengths, self._positions)]
        stream = torch.cuda.Stream(self.tokens.device)
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self._step()
        torch.cuda.current_stream().wait_stream(stream)
        for x, before in zip((self.tokens, self._lengths, self._positions), kept, strict=True):
            x.copy_(before)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, stream=stream):
                self._step()
        except RuntimeError as error:  # an implementation of an op that waits for the host
            notice(f"decoding steps are started one by one: {str(error).splitlines()[0]}")
            return None
        return graph

    def _step(self) -> None:
        config = self._model.config
        logits = ops.decode_step(
            self._weights,
            self._cache.k,
            self._cache.v,
            self.tokens,
            self._positions,
            self._lengths,
            n_head=config.n_head,
            scales=[block.attn.scale for block in self._model.blocks],
            activation=config.activation_function,
            eps=config.layer_norm_epsilon,
        )
        chosen = ops.sample(
            logits[:, : self._vocab_size], self._history, self._uniform, **self._choice
        )
        self.tokens.copy_(chosen)
        self._lengths += 1
        self._positions += 1
