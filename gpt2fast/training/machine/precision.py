"""Mixed precision: autocast over float32 weights, and the loss scale that float16 needs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


def autocast_dtype(dtype: str) -> torch.dtype:
    """The type in which matrix products run."""
    return _DTYPES.get(dtype, torch.float32)


def autocast(device: torch.device, dtype: str) -> torch.autocast:
    """The context in which forward passes run; for float32 it does nothing."""
    return torch.autocast(device.type, dtype=_DTYPES.get(dtype), enabled=dtype in _DTYPES)


class LossScale:
    """Factor on the loss that keeps small float16 gradients above zero (Micikevicius et al., 2018,
    section 3.2): halved when a gradient overflows, whose step is left out, and doubled after
    `growth_interval` steps in a row without.

    It decides by the gradients' norm, which all processes of a run share.
    """

    growth_interval = 2000
    smallest = 2.0**-14
    """Below, the gradients themselves are not finite."""

    def __init__(self, enabled: bool) -> None:
        self.enabled = enabled
        self.value = 2.0**16 if enabled else 1.0
        self.good_steps = 0
        """Steps since the last change."""
        self.skipped = 0
        """Steps left out, in the whole run."""

    def scaled(self, loss: Tensor) -> Tensor:
        """The loss to call `backward` on."""
        return loss * self.value if self.enabled else loss

    @torch.no_grad()
    def unscale(self, grads: Sequence[Tensor]) -> None:
        """Divide gradients by the scale, in place."""
        if self.enabled:
            torch._foreach_mul_(list(grads), 1.0 / self.value)

    def overflowed(self) -> bool:
        """Take note of a step whose gradients are not finite; False if scaling cannot mend it."""
        if not self.enabled or self.value <= self.smallest:
            return False
        self.value /= 2
        self.good_steps = 0
        self.skipped += 1
        return True

    def succeeded(self) -> None:
        """Take note of a step that was made."""
        if not self.enabled:
            return
        self.good_steps += 1
        if self.good_steps >= self.growth_interval:
            self.value = min(self.value * 2, 2.0**24)
            self.good_steps = 0

    def state_dict(self) -> dict[str, Any]:
        return {"value": self.value, "good_steps": self.good_steps, "skipped": self.skipped}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a saved scale; one from a run in another precision says nothing."""
        if self.enabled and state["value"] != 1.0:
            self.value, self.good_steps = state["value"], state["good_steps"]
        self.skipped = state["skipped"]
