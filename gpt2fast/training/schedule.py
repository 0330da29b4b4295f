"""Learning rate over a run: linear warm-up, then a cosine down to a floor (as in nanoGPT)."""

from __future__ import annotations

import math


def learning_rate(step: int, *, lr: float, min_lr: float, warmup_steps: int, steps: int) -> float:
    """Rate for step number `step` (the first is 0) of a run of `steps` steps."""
    if step < warmup_steps:
        return lr * (step + 1) / (warmup_steps + 1)
    if step >= steps:
        return min_lr
    share = (step - warmup_steps) / (steps - warmup_steps)
    return min_lr + 0.5 * (1 + math.cos(math.pi * share)) * (lr - min_lr)
