"""A step of decoding as a CUDA graph: captured once, replayed for each token.

A step of GPT-2 is some eighty small kernels, and starting them from Python takes far longer than
they run. `CapturedStep` captures one step, with the choice of the next token in it, as a CUDA
graph. Its tokens, positions, lengths and cache are the graph's own and stay on the device, so that
one graph serves every position of every text.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..errors import GenerationError
from ..model import GPT2
from ..nn.kv_cache import KVCache
from .graph_capture import capture
from .structure import decode_weights, run_step, step_constants


class CapturedStep:
    """A captured step of `model` for a batch; each row takes the token that it chose last.

    Its buffers never move: `start` copies texts into them. Unused rows are padding, which
    overwrites the first entry of its cache in every step and sees no other. The weights are read
    at their addresses of the time of the capture; references to them are held between `start` and
    `stop` only.

    Args:
        model: the GPT2; the step runs on its device.
        rows: B.
        length: entries of a row of its cache.
        dtype: of the cache; None means the model's.
        samples: draw tokens at random; otherwise take the likeliest.
        reads_history: the processors read earlier tokens.
        vocab_size: allow only token ids below this; None allows all.
        choice: the processors, as `ops.sample` takes them.

    On other devices nothing is captured and each step is run: for tests.
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
        reads_history: bool = False,
        vocab_size: int | None = None,
        **choice: Any,
    ):
        self._constants = step_constants(model)
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
        # Added to lengths and positions in each step: 1, or 0 in padding.
        self._growth = torch.zeros_like(self.tokens)
        self._uniform = torch.zeros(rows, dtype=torch.float32, device=device) if samples else None
        # As `ops.sample` takes it, up to the newest token, which has no entry in the cache yet.
        columns = self.cache.max_length + 1 if reads_history else 0
        self.history = self.tokens.new_full((rows, columns), -1)
        """(B, S) the newest tokens of each row after -1 as padding; S = 0 if nobody reads them."""
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
        history: Tensor | None = None,
    ) -> None:
        """Go on with other texts.

        Args:
            model: the one that was captured; its weights have not moved.
            cache: keys and values of the texts so far, which are copied.
            longest: entries in its longest row.
            tokens: (N,) the newest token of each text, not in the cache yet; N <= B.
            rows: (N,) the texts' rows of `cache` and `history`; None means all.
            history: (rows of the cache, S) the texts so far, the newest tokens included, after -1
                as padding; where the processors read it.
        """
        if rows is None:
            rows = torch.arange(len(tokens), device=tokens.device)
        self._weights, self.longest = _weights(model), longest
        count = len(tokens)
        for mine, other in zip(_entries(self.cache), _entries(cache), strict=True):
            for to, new in zip(mine, other, strict=True):  # a layer's copy at a time
                to[:count, :longest] = new[:, :longest].index_select(0, rows)
        if (columns := self.history.shape[1]) and history is not None:
            self.history.fill_(-1)
            newest = history[:, -columns:].index_select(0, rows)
            self.history[:count, columns - newest.shape[1] :] = newest
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
            (B, count) the tokens chosen, on the device, which may still be computing them.
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
        """Wait for the running steps, and drop the references to the weights."""
        if self._stream is not None:
            self._stream.synchronize()
        self._stream, self._weights = None, []

    @torch.inference_mode()
    def replay_at(self, length: int) -> None:
        """Run one step with this many entries in the cache: for timing."""
        self._advance()
        self.cache.lengths.fill_(length)
        self.cache.positions.fill_(length)

    def _advance(self) -> None:
        if self._graph is None:
            self._step()
        else:
            self._graph.replay()

    def _capture(self) -> torch.cuda.CUDAGraph | None:
        # All rows are padding so far.
        return capture(self._step, self.tokens.device) if self.tokens.is_cuda else None

    def _step(self) -> None:
        cache = self.cache
        logits = run_step(self._weights, self._constants, self.tokens, cache.positions, cache)
        chosen = ops.sample(
            logits[:, : self._vocab_size], self.history, self._uniform, **self._choice
        )
        if self.history.shape[1]:
            self.history.copy_(torch.cat([self.history[:, 1:], chosen[:, None]], dim=1))
        self.tokens.copy_(chosen)
        cache.lengths += self._growth
        cache.positions += self._growth


def _entries(cache: KVCache) -> list[Tensor]:
    """The tensors of a cache with data for each token, (L, B, T_max, ...)."""
    parts = (cache.k, cache.v, cache.k_scales, cache.v_scales)
    return [part for part in parts if part is not None]


def _weights(model: GPT2) -> list[Tensor]:
    # Not the parameters themselves, whose storage may be replaced (`parameter.data = ...`).
    return [weight.detach() for weight in decode_weights(model)]
