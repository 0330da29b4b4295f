"""The optimizers of a run: AdamW over `ops.fused_adamw`, Muon for the matrices of the blocks."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .. import ops

_HIDDEN_MATRIX = re.compile(r"(.*\.)?h\.\d+\..*\.weight")


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


class Optimizers:
    """All that updates a model: parameters by kind, the learning rate, the state by name.

    Biases and layer norms do not decay. With `muon`, the matrices inside the blocks go to
    `torch.optim.Muon` (Jordan et al., 2024), its steps scaled to the size of AdamW's (Liu et al.,
    2025, section 2.2), so that one learning rate serves both.

    Args:
        named: parameters by name; those without gradients are left out.
        beta1, beta2, weight_decay, momentum: as in TrainConfig.
        muon: see above.
        sharded: each process of the group keeps the state of its share of the parameters only, and
            sends them to the others after a step (ZeRO stage 1; Rajbhandari et al., 2020).
    """

    def __init__(
        self,
        named: Iterable[tuple[str, nn.Parameter]],
        *,
        beta1: float,
        beta2: float,
        weight_decay: float,
        momentum: float = 0.95,
        muon: bool = False,
        sharded: bool = False,
    ) -> None:
        trained = {name: param for name, param in named if param.requires_grad}
        self.params = list(trained.values())
        self._names = {param: name for name, param in trained.items()}
        hidden = {
            name
            for name, param in trained.items()
            if muon and param.dim() == 2 and _HIDDEN_MATRIX.fullmatch(name)
        }
        rest = [param for name, param in trained.items() if name not in hidden]
        groups = [
            {"params": [p for p in rest if p.dim() >= 2], "weight_decay": weight_decay},
            {"params": [p for p in rest if p.dim() < 2], "weight_decay": 0.0},
        ]
        groups = [group for group in groups if group["params"]]
        self._optimizers: list[torch.optim.Optimizer] = []
        self.updates = 0
        """Steps taken."""
        if groups:
            settings: dict[str, Any] = {"lr": 0.0, "betas": (beta1, beta2)}
            self._add(AdamW, groups, settings, sharded)
        if hidden:
            settings = {"lr": 0.0, "momentum": momentum, "weight_decay": weight_decay}
            settings["adjust_lr_fn"] = "match_rms_adamw"
            self._add(
                torch.optim.Muon, [trained[name] for name in sorted(hidden)], settings, sharded
            )

    def _add(self, kind: Any, params: list[Any], settings: dict[str, Any], sharded: bool) -> None:
        if sharded:
            from torch.distributed.optim import ZeroRedundancyOptimizer

            self._optimizers.append(ZeroRedundancyOptimizer(params, kind, **settings))
        else:
            self._optimizers.append(kind(params, **settings))

    def _holders(self) -> Iterator[torch.optim.Optimizer]:
        """The optimizers that hold this process's state."""
        for optimizer in self._optimizers:
            yield getattr(optimizer, "optim", optimizer)

    def zero_grad(self) -> None:
        for param in self.params:
            param.grad = None

    def step(self, lr: float) -> None:
        """One update of every parameter from its `.grad`."""
        self.updates += 1
        for optimizer in self._optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.step()

    def tensors(self) -> dict[str, Tensor]:
        """This process's state, `exp_avg.<parameter>` and so on; zeros before the first step.

        The tensors are the optimizers' own: what is written into them counts.
        """
        found = {}
        for optimizer in self._holders():
            kinds = (
                ("exp_avg", "exp_avg_sq") if isinstance(optimizer, AdamW) else ("momentum_buffer",)
            )
            for group in optimizer.param_groups:
                for param in group["params"]:
                    for kind in kinds:
                        if kind not in optimizer.state[param]:
                            optimizer.state[param][kind] = torch.zeros_like(param)
                        found[f"{kind}.{self._names[param]}"] = optimizer.state[param][kind]
        return found

    def resume_after(self, updates: int) -> None:
        """Count on from so many updates, after the tensors have been restored."""
        self.updates = updates
        for optimizer in (*self._optimizers, *self._holders()):
            for group in optimizer.param_groups:
                if "step" in group:
                    group["step"] = updates


def _local(tensors: Iterable[Any]) -> list[Tensor]:
    """What of each tensor is in this process."""
    return [t.to_local() if hasattr(t, "to_local") else t for t in tensors]
