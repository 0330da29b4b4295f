"""One optimizer step, which all processes of a run make together."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..model import GPT2
from ..nn.output import LOGITS_ALONE
from .config import TrainConfig
from .distributed import Group
from .machine.precision import LossScale, autocast
from .optimizers import ModelOptimizer

Batch = tuple[Tensor, Tensor]


class TrainStep:
    """Forward, backward, clip, update.

    Args:
        config: of the run.
        model: on the device of the group; with fsdp its parameters become shards.
        group: the processes of the run.
    """

    def __init__(self, config: TrainConfig, model: GPT2, group: Group) -> None:
        self.config, self.model, self.group = config, model, group
        self._wrapped: Any = group.wrapped(model, config.parallel)
        self._forward: Any = self._wrapped
        if config.compile:
            mode = None if config.compile_mode == "default" else config.compile_mode
            self._forward = torch.compile(self._wrapped, mode=mode)
        self.optimizer = ModelOptimizer(
            model.named_parameters(),
            config,
            sharded=config.parallel == "zero" and group.size > 1,
        )
        self.scale = LossScale(config.dtype == "float16")
        self.batch: Batch
        """The last batch of this process."""

    def close(self) -> None:
        """Drop the model's wrapper, which holds the group of processes and must not outlive it."""
        del self._forward, self._wrapped

    def share(self, step: int) -> tuple[list[int], slice]:
        """This process's micro-batches of a step, by number, and its rows of each."""
        return self.group.share_of(self.config.micro_batches(step), self.config.batch_size)

    def loss(self, batch: Batch) -> Tensor:
        """Mean loss of a batch, in nats per token."""
        inputs, targets = (x.to(self.group.device, non_blocking=True) for x in batch)
        with autocast(self.group.device, self.config.dtype):
            return self._forward(inputs, targets=targets, **LOGITS_ALONE).loss

    def gradients(self, batches: Any, step: int, first: int) -> tuple[float, float]:
        """Compute and clip the gradients of step `step`.

        Args:
            batches: of the training data, by number.
            step: counted from 0.
            first: number of its first micro-batch.

        Returns:
            The loss, and the norm of the gradients before clipping.
        """
        mine, rows = self.share(step)
        self.optimizer.zero_grad()
        total = torch.zeros((), device=self.group.device)
        for number in mine:
            inputs, targets = batches[first + number]
            self.batch = inputs[rows], targets[rows]
            last = number == mine[-1]
            with self.group.explain_lost_peer(), self.group.accumulating(self._wrapped, last):
                loss = self.loss(self.batch)
                # Every batch has as many targets, so the mean of the means is the exact mean.
                self.scale.scaled(loss / len(mine)).backward()
            total += loss.detach() / len(mine)
        summed, norm = torch.stack([total, self._clip().float()]).tolist()
        return self.group.sum(summed)[0] / self.group.size, norm

    def _clip(self) -> Tensor:
        params = self.optimizer.params
        limit = math.inf if self.config.grad_clip is None else self.config.grad_clip
        self.scale.unscale([p.grad for p in params if p.grad is not None])
        with self.group.explain_lost_peer():
            norm = torch.nn.utils.clip_grad_norm_(params, limit)
            return norm.full_tensor() if hasattr(norm, "full_tensor") else norm

    def update(self, loss: float, norm: float, rate: float) -> bool:
        """Update the weights, or leave the step out where float16 gradients have overflowed.

        Returns:
            False where loss or gradients are not finite and no smaller loss scale can mend it.
        """
        if math.isfinite(loss) and math.isfinite(norm):
            with self.group.explain_lost_peer():
                self.optimizer.step(rate)
            self.scale.succeeded()
            return True
        return math.isfinite(loss) and self.scale.overflowed()
