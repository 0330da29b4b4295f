"""The update of a whole model: which optimizer each parameter goes to, and their state by name."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn

from .registry import OPTIMIZERS, Entry


class ModelOptimizer:
    """The chosen optimizer for the parameters that it takes, AdamW for the rest.

    Biases and layer norms do not decay.

    Args:
        named: parameters by name; those without gradients are left out.
        settings: of the run, a TrainConfig; `settings.optimizer` is a name of `OPTIMIZERS`.
        sharded: each process of the group keeps the state of its share of the parameters only, and
            sends them to the others after a step (ZeRO stage 1; Rajbhandari et al., 2020).
    """

    def __init__(
        self,
        named: Iterable[tuple[str, nn.Parameter]],
        settings: Any,
        sharded: bool = False,
    ) -> None:
        trained = {name: param for name, param in named if param.requires_grad}
        self.params = list(trained.values())
        self._settings = settings
        self.updates = 0
        """Steps taken."""
        self._names = {param: name for name, param in trained.items()}
        self._optimizers: list[tuple[Entry, torch.optim.Optimizer]] = []
        chosen, adamw = OPTIMIZERS[settings.optimizer], OPTIMIZERS["adamw"]
        taken = [param for name, param in trained.items() if chosen.takes(name, param)]
        rest = [param for name, param in trained.items() if not chosen.takes(name, param)]
        for entry, params in ((adamw, rest), (chosen, taken)):
            groups = [
                {
                    "params": [p for p in params if p.dim() >= 2],
                    "weight_decay": settings.weight_decay,
                },
                {"params": [p for p in params if p.dim() < 2], "weight_decay": 0.0},
            ]
            groups = [group for group in groups if group["params"]]
            if groups:
                arguments = {"lr": 0.0, **entry.arguments(settings)}
                self._optimizers.append((entry, _made(entry, groups, arguments, sharded)))

    def zero_grad(self) -> None:
        for param in self.params:
            param.grad = None

    def step(self, lr: float) -> None:
        """One update of every parameter from its `.grad`."""
        self.updates += 1
        for _, optimizer in self._optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.step()

    def state_bytes(self) -> int:
        """Bytes of the state of all processes together."""
        return sum(
            len(entry.state) * param.numel() * entry.state_itemsize(self._settings)
            for entry, optimizer in self._optimizers
            for group in optimizer.param_groups
            for param in group["params"]
        )

    def tensors(self) -> dict[str, Tensor]:
        """This process's state, `exp_avg.<parameter>` and so on; zeros before the first step.

        The tensors are the optimizers' own: writing into them changes the state.
        """
        found = {}
        for entry, optimizer in self._local_optimizers():
            for group in optimizer.param_groups:
                for param in group["params"]:
                    for key in entry.state:
                        if key not in optimizer.state[param]:
                            optimizer.state[param][key] = torch.zeros_like(param)
                        found[f"{key}.{self._names[param]}"] = optimizer.state[param][key]
        return found

    def resume_after(self, updates: int) -> None:
        """Count on from so many updates, after the tensors have been restored."""
        self.updates = updates
        for _, optimizer in (*self._optimizers, *self._local_optimizers()):
            for group in optimizer.param_groups:
                if "step" in group:
                    group["step"] = updates

    def _local_optimizers(self) -> Iterator[tuple[Entry, torch.optim.Optimizer]]:
        """The optimizers that hold this process's state."""
        for entry, optimizer in self._optimizers:
            yield entry, getattr(optimizer, "optim", optimizer)


def _made(
    entry: Entry, groups: list[Any], arguments: dict[str, Any], sharded: bool
) -> torch.optim.Optimizer:
    if not sharded:
        return entry.make(groups, **arguments)
    from torch.distributed.optim import ZeroRedundancyOptimizer

    return ZeroRedundancyOptimizer(
        groups, cast("type[torch.optim.Optimizer]", entry.make), **arguments
    )
