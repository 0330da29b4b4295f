"""Captured steps, kept for as long as their model and lent to one call at a time."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable
from contextlib import suppress
from weakref import WeakKeyDictionary

import torch
from torch import nn

from ..model import GPT2
from ..nn.changes import on_moved_weights
from .cuda_graphs import CapturedStep
from .structure import decode_weights, why_not_read

KEPT = 8
"""Most idle graphs of a model."""
SHARE = 8
"""Caches of a model's idle graphs take at most 1 / SHARE of a GPU's memory; on other devices, where
nothing is captured, only the number of graphs is limited."""
SHORTEST = 128
"""Entries of the shortest cache."""
MOST_ROWS = 64
"""Batches of more rows than this are rounded up to a multiple of it."""

_pools: WeakKeyDictionary[nn.Module, Pool] = WeakKeyDictionary()
_lock = threading.Lock()


class Pool:
    """The graphs of one model that are not in use, the one used last at the end.

    A graph that was taken has one user; until it comes back, a second call with the same key gets
    another one. A graph is freed when the weights have moved from where it reads them, or when more
    than `KEPT` graphs, or more than their share of memory, would be idle: the least recently used.

    One graph's cache takes `2 * n_layer * rows * length * n_embd` elements: of 124M in bfloat16
    4.7 MB for one row of 128 entries, 2.4 GB for 64 rows of 1024. A step's intermediate results,
    its logits above all, belong to the graph, too, and are not counted.
    """

    def __init__(self) -> None:
        # Re-entrant: a generator that was not exhausted gives its graph back when collected, which
        # may happen in the thread that holds the lock.
        self._lock = threading.RLock()
        self._idle: list[CapturedStep] = []
        self._keys: WeakKeyDictionary[CapturedStep, tuple[Hashable, Hashable]]
        self._keys = WeakKeyDictionary()
        self.weights: Hashable = None
        """`addresses` of the model when a graph was last taken."""

    def take(
        self, weights: Hashable, key: Hashable, make: Callable[[], CapturedStep]
    ) -> CapturedStep:
        """A graph that nobody else has.

        Args:
            weights: `addresses` of the model; graphs that were captured with others are dropped.
            key: everything else that a graph depends on.
            make: captures a graph if none is idle.
        """
        with self._lock:
            if weights != self.weights:
                self._idle, self.weights = [], weights
            fitting = [step for step in self._idle if self._keys[step] == (weights, key)]
            if fitting:
                self._idle.remove(fitting[-1])
                return fitting[-1]
        step = None
        with suppress(torch.OutOfMemoryError):
            step = make()
        if step is None:
            with self._lock:
                self._idle = []  # free idle graphs' memory and try again
            step = make()
        with self._lock:
            self._keys[step] = (weights, key)
        return step

    def give_back(self, step: CapturedStep) -> None:
        """Keep a graph that was taken, if its weights are still the model's and there is room.

        Raises:
            RuntimeError: the device has failed. The graph is not kept then.
        """
        step.stop()
        with self._lock:
            if self._keys[step][0] != self.weights:
                return
            room = kept_bytes(step.tokens.device)
            self._idle.append(step)
            while len(self._idle) > KEPT or sum(each.nbytes for each in self._idle) > room:
                del self._idle[0]

    def clear(self) -> None:
        """Free the idle graphs, and those in use when they come back."""
        with self._lock:
            self._idle, self.weights = [], None

    def __len__(self) -> int:
        """The number of idle graphs."""
        return len(self._idle)


def pool_of(model: GPT2) -> Pool:
    """The model's graphs, which are freed with it."""
    with _lock:
        return _pools.setdefault(model, Pool())


@on_moved_weights
def _forget_graphs(model: nn.Module) -> None:
    """Free the graphs of `model` if its weights are no longer where they were captured."""
    with _lock:
        pool = _pools.get(model)
    if pool is None or not isinstance(model, GPT2):
        return
    if why_not_read(model) or pool.weights != addresses(model):
        pool.clear()


def addresses(model: GPT2) -> Hashable:
    """Addresses and layouts of the weights that a step of `model` reads."""
    return tuple(
        (weight.device, weight.data_ptr(), weight.dtype, weight.shape, weight.stride())
        for weight in decode_weights(model)
    )


def kept_bytes(device: torch.device) -> float:
    """Most bytes that idle graphs may hold on this device."""
    if device.type != "cuda":
        return float("inf")
    return torch.cuda.get_device_properties(device).total_memory // SHARE


def rows_bucket(rows: int) -> int:
    """Size of the batch for this many rows: 1, 2, 4, ... `MOST_ROWS`, then multiples of that."""
    if rows > MOST_ROWS:
        return -(-rows // MOST_ROWS) * MOST_ROWS
    return 1 << (rows - 1).bit_length()


def length_bucket(length: int, n_positions: int) -> int:
    """Length of the cache for this many entries."""
    return min(max(SHORTEST, 1 << (length - 1).bit_length()), n_positions)
