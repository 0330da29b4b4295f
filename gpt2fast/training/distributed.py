"""The processes of a run: one by itself, or those that torchrun has started.

They agree on all that a step's decisions depend on (losses, the clock, signals), so that they stop,
save and fail together.
"""

from __future__ import annotations

import contextlib
import datetime
import logging
import os
import pickle
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .._system.output import warn
from ..errors import ConfigError, Error

if TYPE_CHECKING:
    from ..model import GPT2

_log = logging.getLogger(__name__)

T = TypeVar("T")

# A process that prepares a corpus keeps the others waiting.
_TIMEOUT = datetime.timedelta(hours=2)


class LostProcess(Error):
    """Another process of the run has ended, or cannot be reached."""


class FailedElsewhere(Error):
    """Another process of the run has failed and says why itself."""


def is_main_process() -> bool:
    """True for the process that speaks for the run, also before the group is open."""
    return os.environ.get("RANK", "0") == "0"


class Group:
    """The processes of a run. By itself a process is rank 0 of 1, and nothing is sent."""

    def __init__(self, device: str) -> None:
        """Join the group that torchrun's environment describes, or the one that is open already.

        Args:
            device: cpu, cuda or auto (CUDA where there is one).

        Raises:
            ConfigError: for a device that is not there.
        """
        if device == "cuda" and not torch.cuda.is_available():
            raise ConfigError(
                f"device is 'cuda', but torch {torch.__version__} finds no CUDA device; use "
                "--device cpu or auto"
            )
        kind = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
        self._opened = False
        if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized():
            backend = "cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo"
            _join(backend)
            self._opened = True
        joined = dist.is_available() and dist.is_initialized()
        self.rank = dist.get_rank() if joined else 0
        self.size = dist.get_world_size() if joined else 1
        local = int(os.environ.get("LOCAL_RANK", self.rank))
        self.device = torch.device(kind)
        if kind == "cuda" and self.size > 1:
            if local >= torch.cuda.device_count():
                raise ConfigError(
                    f"process {local} of this machine has no GPU: there are "
                    f"{torch.cuda.device_count()}; lower torchrun's --nproc-per-node"
                )
            self.device = torch.device("cuda", local)
            torch.cuda.set_device(self.device)

    @property
    def is_main(self) -> bool:
        """True for the process that writes the files and speaks to the user."""
        return self.rank == 0

    def notify(self, message: str) -> None:
        """Tell the user something, once for all processes."""
        if self.is_main:
            warn(_log, message)

    def close(self) -> None:
        if self._opened:
            # Gloo's threads need the GIL to free the last tensors, and its destructor waits for
            # them while it holds the GIL: torch 2.13 hangs.
            time.sleep(0.5)
            dist.destroy_process_group()
            self._opened = False

    # -- agreeing ------------------------------------------------------------------------------

    def sum(self, *values: float) -> list[float]:
        """The sum of each value over all processes."""
        return self._reduced(values, dist.ReduceOp.SUM)

    def max(self, *values: float) -> list[float]:
        """The largest of each value over all processes."""
        return self._reduced(values, dist.ReduceOp.MAX)

    def _reduced(self, values: tuple[float, ...], how: Any) -> list[float]:
        if self.size == 1:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.float64)
        with self.explain_lost_peer():
            dist.all_reduce(tensor, how)
        return cast("list[float]", tensor.tolist())

    def gathered(self, value: T) -> list[T]:
        """Every process's value, by rank."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        with self.explain_lost_peer():
            dist.all_gather_object(values, value)
        return values

    def on_main(self, function: Callable[[], T]) -> T:
        """Call `function` in the main process; all get its result, or an error if it failed."""
        if self.size == 1:
            return function()
        answer: list[Any] = [None, False]
        failure: BaseException | None = None
        if self.is_main:
            try:
                answer = [function(), True]
            except BaseException as error:
                failure = error
        with self.explain_lost_peer():
            dist.broadcast_object_list(answer)
        if failure is not None:
            raise failure
        if not answer[1]:
            raise FailedElsewhere("the main process has failed")
        return answer[0]

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """A block that all processes run; if it fails in one, it fails in all."""
        failure: BaseException | None = None
        try:
            yield
        except BaseException as error:
            failure = error
        failed = self.max(0.0 if failure is None else 1.0)[0]
        if failure is not None:
            raise failure
        if failed:
            raise FailedElsewhere("another process has failed")

    @contextlib.contextmanager
    def explain_lost_peer(self) -> Iterator[None]:
        """Turn torch's errors about a process that is gone into LostProcess."""
        try:
            yield
        except (RuntimeError, pickle.UnpicklingError, EOFError) as error:
            if self.size == 1 or isinstance(error, torch.OutOfMemoryError):
                raise
            if not _is_about_connections(error):
                raise
            first = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise LostProcess(f"another process of the run cannot be reached: {first}") from error

    # -- models --------------------------------------------------------------------------------

    def share_of(self, micro_batches: int, batch_size: int) -> tuple[list[int], slice]:
        """This process's part of a step: which of its forward passes, and which rows of each.

        All processes together make exactly the forward passes and rows of a run in one process.

        Raises:
            ConfigError: if neither number can be divided by the processes.
        """
        if micro_batches % self.size == 0:
            return list(range(self.rank, micro_batches, self.size)), slice(None)
        if batch_size % self.size == 0:
            return list(range(micro_batches)), slice(self.rank, None, self.size)
        raise ConfigError(
            f"{self.size} processes cannot share a step of grad_accumulation={micro_batches} "
            f"batches of batch_size={batch_size} windows evenly: make one of them a multiple of "
            f"{self.size}"
        )

    def wrapped(self, model: GPT2, parallel: str) -> nn.Module:
        """`model` as the group trains it: the module to call.

        fsdp changes `model` itself: its parameters become shards (FSDP2, one unit a block).
        """
        if self.size == 1:
            return model
        with self.explain_lost_peer():  # both compare and send weights
            return self._wrapped(model, parallel)

    def _wrapped(self, model: GPT2, parallel: str) -> nn.Module:
        if parallel != "fsdp":
            ids = [self.device.index] if self.device.type == "cuda" else None
            return nn.parallel.DistributedDataParallel(
                model, device_ids=ids, gradient_as_bucket_view=True
            )
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh(self.device.type, (self.size,))
        for block in model.blocks:
            fully_shard(block, mesh=mesh)
        return cast("nn.Module", fully_shard(model, mesh=mesh))

    @contextlib.contextmanager
    def accumulating(self, module: nn.Module, last: bool) -> Iterator[None]:
        """One backward pass of several: gradients are exchanged in the `last` alone."""
        if self.size == 1:
            yield
        elif isinstance(module, nn.parallel.DistributedDataParallel):
            with contextlib.nullcontext() if last else module.no_sync():
                yield
        else:
            cast("Any", module).set_requires_gradient_sync(last)
            yield

    def whole_state(self, model: nn.Module) -> dict[str, Tensor]:
        """All weights on the CPU; with shards complete in the main process, and empty elsewhere."""
        if self.size == 1 or not any(hasattr(p, "full_tensor") for p in model.parameters()):
            return model.state_dict()
        from torch.distributed.checkpoint.state_dict import (
            StateDictOptions,
            get_model_state_dict,
        )

        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        with self.explain_lost_peer():
            return cast("dict[str, Tensor]", get_model_state_dict(model, options=options))


def _join(backend: str) -> None:
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    if attempt == "0":
        dist.init_process_group(backend, timeout=_TIMEOUT)
        return
    # torchrun keeps its store when it restarts the processes: the addresses that the earlier ones
    # left in it must not be found.
    store = dist.TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        is_master=False,
        timeout=_TIMEOUT,
    )
    dist.init_process_group(
        backend,
        timeout=_TIMEOUT,
        store=dist.PrefixStore(f"attempt_{attempt}", store),
        rank=int(os.environ["RANK"]),
        world_size=int(os.environ["WORLD_SIZE"]),
    )


def _is_about_connections(error: BaseException) -> bool:
    text = str(error).lower()
    words = ("connection", "gloo", "nccl", "timed out", "timeout", "peer", "socket", "backend")
    return isinstance(error, dist.DistError) or any(word in text for word in words)
