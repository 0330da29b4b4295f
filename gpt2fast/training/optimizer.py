"""AdamW (Loshchilov and Hutter, 2019) over one model, stepping through `ops.fused_adamw`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from ..errors import ConfigError


class AdamW:
    """Keeps the moments; matrices and embeddings decay, biases and layer norms do not."""

    def __init__(
        self,
        model: nn.Module,
        *,
        beta1: float,
        beta2: float,
        weight_decay: float,
        eps: float = 1e-8,
    ) -> None:
        self.beta1, self.beta2, self.eps = beta1, beta2, eps
        self.steps = 0
        named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
        self.names = [name for name, _ in named]
        self.params = [param for _, param in named]
        self.exp_avgs = [torch.zeros_like(param) for param in self.params]
        self.exp_avg_sqs = [torch.zeros_like(param) for param in self.params]
        decayed = [i for i, param in enumerate(self.params) if param.dim() >= 2]
        plain = [i for i, param in enumerate(self.params) if param.dim() < 2]
        self._groups = [(decayed, weight_decay), (plain, 0.0)]

    def zero_grad(self) -> None:
        for param in self.params:
            param.grad = None

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """One update of every parameter from its `.grad`."""
        self.steps += 1
        for indices, weight_decay in self._groups:
            grads: list[Tensor] = []
            for i in indices:
                grad = self.params[i].grad
                if grad is None:
                    raise RuntimeError(f"no gradient for {self.names[i]}")
                grads.append(grad)
            ops.fused_adamw(
                [self.params[i] for i in indices],
                grads,
                [self.exp_avgs[i] for i in indices],
                [self.exp_avg_sqs[i] for i in indices],
                step=self.steps,
                lr=lr,
                beta1=self.beta1,
                beta2=self.beta2,
                eps=self.eps,
                weight_decay=weight_decay,
            )

    def state_dict(self) -> dict[str, Any]:
        """Moments by parameter name, and the number of steps taken."""
        return {
            "steps": self.steps,
            "exp_avg": dict(zip(self.names, self.exp_avgs, strict=True)),
            "exp_avg_sq": dict(zip(self.names, self.exp_avg_sqs, strict=True)),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over moments from `state_dict`; names and shapes must be this model's."""
        for key, own in (("exp_avg", self.exp_avgs), ("exp_avg_sq", self.exp_avg_sqs)):
            for name, moment in zip(self.names, own, strict=True):
                saved = state[key].get(name)
                if saved is None or saved.shape != moment.shape:
                    found = "nothing" if saved is None else f"shape {tuple(saved.shape)}"
                    raise ConfigError(
                        f"optimizer state {key} of {name}: expected shape "
                        f"{tuple(moment.shape)}, found {found}; the checkpoint belongs to another "
                        "model"
                    )
                moment.copy_(saved)
        self.steps = int(state["steps"])
