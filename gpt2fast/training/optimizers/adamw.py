"""AdamW over `ops.fused_adamw`."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from ... import ops
from ...errors import ArgumentError

NARROW_BETA = 0.99
"""Largest decay of an average that is kept in bfloat16."""


class AdamW(torch.optim.Optimizer):
    """AdamW (Loshchilov and Hutter, 2019, algorithm 2), one fused op a group.

    Args:
        params: parameters or groups, as for every optimizer of torch.
        lr: learning rate.
        betas: decays of the averages of gradients and squared gradients.
        eps: added to the root of the latter.
        weight_decay: decoupled.
        moments: dtype of both averages; None means each parameter's. bfloat16 halves their memory.
            An average of 8 bits does not follow steps of less than its rounding: its betas are
            `NARROW_BETA` at most.

    A sharded parameter (DTensor) is updated by the process that holds the shard. The averages are
    allocated here, not in the first step, so that what stays lies together and steps find their
    freed memory in one piece; and once more in the first step where parameters have moved since.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        moments: torch.dtype | None = None,
    ) -> None:
        if moments == torch.bfloat16 and max(betas) > NARROW_BETA:
            raise ArgumentError(
                f"betas={betas}: with moments in bfloat16 they must be {NARROW_BETA} at most"
            )
        defaults = {
            "lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "step": 0,
            "moments": moments,
        }  # fmt: skip
        super().__init__(params, defaults)

    @torch.no_grad()
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Update further parameters; see `torch.optim.Optimizer`."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        for param in group["params"]:
            self._allocate(param, group)

    def _allocate(self, param: Tensor, group: dict[str, Any]) -> None:
        for name in ("exp_avg", "exp_avg_sq"):
            self.state[param][name] = torch.zeros_like(param, dtype=group.get("moments"))

    def _lacks_averages(self, param: Tensor, group: dict[str, Any]) -> bool:
        """True in the first step if the parameter moved, and if a loaded state lacked them."""
        if not self.state[param]:
            return True
        average, dtype = self.state[param]["exp_avg"], group.get("moments") or param.dtype
        return group["step"] == 1 and (average.device, average.dtype) != (param.device, dtype)

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over a state; see `torch.optim.Optimizer`."""
        super().load_state_dict(state_dict)  # which stores it in the parameters' dtype
        for group in self.param_groups:
            for state in map(self.state.__getitem__, group["params"]):
                if state and group.get("moments") is not None:
                    for name in ("exp_avg", "exp_avg_sq"):
                        state[name] = state[name].to(group["moments"])

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            group["step"] += 1
            for param in group["params"]:
                if self._lacks_averages(param, group):
                    self._allocate(param, group)
            params = [param for param in group["params"] if param.grad is not None]
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
