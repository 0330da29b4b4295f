"""Capturing work as a CUDA graph, so that a capture which fails leaves nothing behind."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import torch

from ..kernels.library import notice

_capturing = threading.Lock()
"""Held while capturing: beginning a capture waits for the device, which is an error within another
capture."""

_failed: list[torch.cuda.CUDAGraph] = []
"""Graphs whose capture failed. They are small, and torch's allocator of pinned memory may still ask
them which streams are theirs."""


def capture(step: Callable[[], None], device: torch.device) -> torch.cuda.CUDAGraph | None:
    """Run a step on a GPU, then capture it.

    Returns:
        The graph; None, and a line in the log, if there is something in the step that cannot be
        captured.

    Raises:
        torch.OutOfMemoryError: there is no room for the graph's own intermediate results.
        Exception: of the step itself, when it is run.
    """
    with _capturing, torch.cuda.device(device):
        # Run once on a stream of its own, as capturing asks for: libraries load and kernels are
        # compiled.
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            step()
        torch.cuda.current_stream(device).wait_stream(stream)
        stream.synchronize()  # so that a failure of the step is not taken for one of the capture
        failure: BaseException | None = None
        graph, pool = torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle()
        try:
            # The inner context leaves its stream behind when it fails; the outer one does not.
            # Other threads may go on with their own work meanwhile.
            with (
                _no_garbage_collection(),
                torch.cuda.stream(stream),
                torch.cuda.graph(
                    graph, pool=pool, stream=stream, capture_error_mode="thread_local"
                ),
            ):
                try:
                    step()
                except BaseException as error:
                    failure = error  # ending the capture may fail as well, with another message
                    raise
        except BaseException as error:
            _clean_up(graph, pool, stream.device_index)
            reason = failure or error
            if isinstance(reason, torch.OutOfMemoryError) or not isinstance(reason, RuntimeError):
                raise reason from None
            notice(f"decoding steps are started one by one: {str(reason).splitlines()[0]}")
            return None
        return graph


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Free graphs that nobody uses now: freed during a capture, they would make it invalid."""
    gc.collect()
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _clean_up(graph: torch.cuda.CUDAGraph, pool: tuple[int, int], device: int) -> None:
    """Give back the memory of a capture that failed: torch does so only for one that succeeded."""
    with suppress(RuntimeError):  # the capture did not get as far, or ended it itself
        torch._C._cuda_endAllocateToPool(device, pool)
    try:
        graph.pool()
    except RuntimeError:
        _failed.append(graph)
        with suppress(RuntimeError):
            torch._C._cuda_releasePool(device, pool)
    else:  # the step failed, and what was captured of it did not
        graph.reset()
