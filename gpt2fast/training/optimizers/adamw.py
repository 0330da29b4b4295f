"""AdamW over `ops.fused_adamw`."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from ... import ops


class AdamW(torch.optim.Optimizer):
    """AdamW (Loshchilov and Hutter, 2019, algorithm 2), one fused op a group.

    Args:
        params: parameters or groups, as for every optimizer of torch.
        lr: learning rate.
        betas: decays of the averages of gradients and squared gradients.
        eps: added to the root of the latter.
        weight_decay: decoupled.

    A sharded parameter (DTensor) is updated by the process that holds the shard.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
    ) -> None:
        defaults = {
            "lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "step": 0,
        }  # fmt: skip
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            group["step"] += 1
            params = [param for param in group["params"] if param.grad is not None]
            for param in params:
                if not self.state[param]:
                    self.state[param]["exp_avg"] = torch.zeros_like(param)
                    self.state[param]["exp_avg_sq"] = torch.zeros_like(param)
            ops.fused_adamw(
                _local(params),
                _local(param.grad for param in params),
                _local(self.state[param]["exp_avg"] for param in params),
                _local(self.state[param]["exp_avg_sq"] for param in params),
                step=group["step"],
                lr=group["lr"],
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                eps=group["eps"],
                weight_decay=group["weight_decay"],
            )
        return loss


def _local(tensors: Iterable[Any]) -> list[Tensor]:
    """The part of each tensor that this process holds."""
    return [t.to_local() if hasattr(t, "to_local") else t for t in tensors]
