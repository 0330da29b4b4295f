"""Captures that fail leave nothing behind: with a stand-in for CUDA that fails as torch does."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pytest
import torch

from gpt2fast.inference import graph_capture
from gpt2fast.inference.graph_capture import capture

DEVICE = torch.device("cuda:1")


@dataclass(frozen=True)
class Stream:
    """Stand-in for a stream."""

    name: str
    device_index: int
    cuda: Cuda

    def wait_stream(self, other: Stream) -> None:
        self.cuda.waits.append((self.name, other.name))

    def synchronize(self) -> None:
        if self.cuda.trapped:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")


class Cuda:
    """Stand-in for the state of a device, and of torch's allocator."""

    def __init__(self) -> None:
        self.default = Stream("default", 1, self)
        self.current = self.default
        self.waits: list[tuple[str, str]] = []
        self.pools: dict[tuple[int, int], int] = {}
        """Users of each pool."""
        self.allocating: set[tuple[int, int]] = set()
        self.invalid = self.trapped = False
        self.ends_before_it_fails = False
        """As torch before 2.11."""

    def stream(self, stream: Stream) -> OnStream:
        return OnStream(self, stream)

    def refuse(self, message: str = "operation not permitted when stream is capturing") -> None:
        """What a step does that cannot be captured."""
        self.invalid = True
        raise RuntimeError(f"CUDA error: {message}")

    def end(self, device: int, pool: tuple[int, int]) -> None:
        assert device == DEVICE.index
        if pool not in self.allocating:
            raise RuntimeError("endAllocatePool: not currently recording to mempool_id")
        self.allocating.remove(pool)

    def release(self, device: int, pool: tuple[int, int]) -> None:
        assert device == DEVICE.index and self.pools[pool] > 0
        self.pools[pool] -= 1


@dataclass
class OnStream:
    """Stand-in for `torch.cuda.stream(...)`, which torch.cuda.graph may enter and not leave."""

    cuda: Cuda
    stream: Stream

    def __enter__(self) -> None:
        self.before, self.cuda.current = self.cuda.current, self.stream

    def __exit__(self, *error: object) -> None:
        self.cuda.current = self.before


class Graph:
    """Stand-in for a CUDA graph: begins and ends as aten/src/ATen/cuda/CUDAGraph.cpp."""

    def __init__(self, cuda: Cuda):
        self.cuda, self.ended = cuda, False

    def capture_begin(self, pool: tuple[int, int], capture_error_mode: str, **rest: bool) -> None:
        assert self.cuda.current.name == "side" and capture_error_mode == "thread_local"
        self._pool = pool
        self.cuda.pools[pool] = self.cuda.pools.get(pool, 0) + 1
        self.cuda.allocating.add(pool)

    def capture_end(self) -> None:
        if self.cuda.ends_before_it_fails:
            self.cuda.end(DEVICE.index, self._pool)
        if self.cuda.invalid:
            raise RuntimeError("CUDA error: operation failed due to a previous error")
        if not self.cuda.ends_before_it_fails:
            self.cuda.end(DEVICE.index, self._pool)
        self.ended = True

    def pool(self) -> tuple[int, int]:
        if not self.ended:
            raise RuntimeError("Called CUDAGraph::pool() without a preceding successful capture.")
        return self._pool

    def reset(self) -> None:
        if self.ended:
            self.cuda.release(DEVICE.index, self._pool)
        self.ended = False


@pytest.fixture
def cuda(monkeypatch) -> Cuda:
    cuda = Cuda()

    @contextmanager
    def device(index: torch.device) -> Iterator[None]:
        assert index == DEVICE
        yield

    for name, value in {
        "Stream": lambda device: Stream("side", device.index, cuda),
        "stream": cuda.stream,
        "device": device,
        "current_stream": lambda device=None: cuda.current,
        "CUDAGraph": lambda: Graph(cuda),
        "graph_pool_handle": lambda: (0, 7),
        "synchronize": lambda: None,
        "empty_cache": lambda: None,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    for name, call in {
        "_cuda_endAllocateToPool": cuda.end,
        "_cuda_releasePool": cuda.release,
        "_host_emptyCache": lambda: None,
    }.items():
        monkeypatch.setattr(torch._C, name, call, raising=False)
    monkeypatch.setattr(graph_capture, "_failed", [])
    return cuda


def clean(cuda: Cuda) -> bool:
    return cuda.current is cuda.default and not cuda.allocating and not any(cuda.pools.values())


def steps(then: Callable[[], None]) -> Callable[[], None]:
    """A step that does `then` when it is captured: the second time."""
    runs = iter([lambda: None, then])
    return lambda: next(runs)()


def test_a_graph_keeps_its_pool_until_it_goes(cuda):
    ran = []
    graph = capture(lambda: ran.append(gc.isenabled()), DEVICE)
    assert ran == [True, False], "once run, once captured, without collections"
    assert gc.isenabled() and cuda.current is cuda.default and not cuda.allocating
    assert cuda.pools == {(0, 7): 1}
    assert cuda.waits == [("side", "default"), ("default", "side")]
    graph.reset()
    assert clean(cuda)


@pytest.mark.parametrize("before", [False, True], ids=["2.11", "2.10"])
def test_a_step_that_cannot_be_captured_is_said_and_forgotten(before, cuda, caplog):
    cuda.ends_before_it_fails = before
    with caplog.at_level(logging.WARNING):
        try:
            raise KeyError("another, handled meanwhile")
        except KeyError:
            assert capture(steps(cuda.refuse), DEVICE) is None
    assert clean(cuda) and gc.isenabled()
    assert "one by one: CUDA error: operation not permitted when stream is capturing" in caplog.text
    cuda.invalid = False
    assert capture(lambda: None, DEVICE) is not None


@pytest.mark.parametrize("invalid", [True, False], ids=["breaks", "ends"])
def test_too_little_memory_is_another_thing_than_no_capture(invalid, cuda, caplog):
    def allocate():
        cuda.invalid = invalid  # the allocator may have tried to free memory
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.OutOfMemoryError, match="CUDA out of memory"):
        capture(steps(allocate), DEVICE)
    assert clean(cuda) and gc.isenabled() and not caplog.text


@pytest.mark.parametrize("invalid", [True, False], ids=["breaks", "ends"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, ZeroDivisionError])
def test_other_errors_go_on_after_cleaning_up(error, invalid, cuda):
    def fail():
        cuda.invalid = invalid
        raise error

    with pytest.raises(error):
        capture(steps(fail), DEVICE)
    assert clean(cuda) and gc.isenabled()


def test_a_step_that_fails_by_itself_is_no_failure_of_the_capture(cuda):
    cuda.trapped = True
    with pytest.raises(RuntimeError, match="illegal memory access"):
        capture(lambda: None, DEVICE)
    assert clean(cuda)
