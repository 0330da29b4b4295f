"""Captured steps, kept with the model that they belong to and lent to one call at a time."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable
from contextlib import suppress
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import torch

if TYPE_CHECKING:
    from ..model import GPT2
    from .cuda_graphs import Steps

KEPT = 8
"""Most graphs of a model that wait for their next use."""
SHARE = 8
"""Of a GPU's memory, at most one part in so many is held by the caches of a model's graphs that
wait; on other devices, where nothing is captured, only their number is limited."""
SHORTEST = 128
"""Entries of the shortest cache."""
MOST_ROWS = 64
"""From here on, batches are rounded up to multiples of it."""

_pools: WeakKeyDictionary[GPT2, Pool] = WeakKeyDictionary()
_lock = threading.Lock()


class Pool:
    """The graphs of one model that are not in use, the one used last at the end.

    Whoever takes a graph has it alone; while it is away, another one is made for the same key.
    A graph goes for good when the weights are no longer where it reads them, or when more than
    `KEPT` of them, or more than their share of memory, would wait: the one not used for longest.

    One graph's cache takes `2 * n_layer * rows * length * n_embd` elements: of 124M in bfloat16
    4.7 MB for one row of 128 entries, 2.4 GB for 64 rows of 1024. What a step computes on the way,
    its logits above all, is the graph's too and not counted.
    """

    def __init__(self) -> None:
        # Re-entrant: a generator that nobody holds any more gives its graph back whenever Python
        # finds it, maybe in the thread that is in here.
        self._lock = threading.RLock()
        self._idle: list[Steps] = []
        self._keys: WeakKeyDictionary[Steps, tuple[Hashable, Hashable]] = WeakKeyDictionary()
        self.weights: Hashable = None
        """`addresses` of the model when a graph was last taken."""

    def take(self, weights: Hashable, key: Hashable, make: Callable[[], Steps]) -> Steps:
        """A graph that nobody else has.

        Args:
            weights: where the model's weights are; all graphs that were captured with others go.
            key: everything else that a graph depends on.
            make: captures a graph if none waits.
        """
        with self._lock:
            if weights != self.weights:
                self._idle, self.weights = [], weights
            fitting = [steps for steps in self._idle if self._keys[steps] == (weights, key)]
            if fitting:
                self._idle.remove(fitting[-1])
                return fitting[-1]
        steps = None
        with suppress(torch.OutOfMemoryError):
            steps = make()
        if steps is None:
            with self._lock:
                self._idle = []  # what waits has less right to the memory
            steps = make()
        with self._lock:
            self._keys[steps] = (weights, key)
        return steps

    def give_back(self, steps: Steps) -> None:
        """What was taken; it is kept if its weights are still the model's and there is room.

        Raises:
            RuntimeError: the device has failed. The graph is not kept then.
        """
        steps.stop()
        with self._lock:
            if self._keys[steps][0] != self.weights:
                return
            room = kept_bytes(steps.tokens.device)
            self._idle.append(steps)
            while len(self._idle) > KEPT or sum(each.nbytes for each in self._idle) > room:
                del self._idle[0]

    def clear(self) -> None:
        """Free the graphs that wait, and those in use when they come back."""
        with self._lock:
            self._idle, self.weights = [], None

    def __len__(self) -> int:
        """How many wait."""
        return len(self._idle)


def pool_of(model: GPT2) -> Pool:
    """The model's graphs; they go with it."""
    with _lock:
        return _pools.setdefault(model, Pool())


def forget_moved(model: GPT2) -> None:
    """Free the graphs of `model` if its weights are no longer where they were captured."""
    with _lock:
        pool = _pools.get(model)
    if pool is not None and (model.why_not_read() or pool.weights != addresses(model)):
        pool.clear()


def addresses(model: GPT2) -> Hashable:
    """Where a step of `model` reads its weights."""
    return tuple(
        (weight.device, weight.data_ptr(), weight.dtype, weight.shape, weight.stride())
        for weight in model.decode_weights()
    )


def kept_bytes(device: torch.device) -> float:
    """Bytes that waiting graphs may hold there."""
    if device.type != "cuda":
        return float("inf")
    return torch.cuda.get_device_properties(device).total_memory // SHARE


def rows_bucket(rows: int) -> int:
    """The batch that so many rows run in: 1, 2, 4, ... `MOST_ROWS`, then multiples of that."""
    if rows > MOST_ROWS:
        return -(-rows // MOST_ROWS) * MOST_ROWS
    return 1 << (rows - 1).bit_length()


def length_bucket(length: int, n_positions: int) -> int:
    """The length of the cache that so many entries are kept in."""
    return min(max(SHORTEST, 1 << (length - 1).bit_length()), n_positions)
