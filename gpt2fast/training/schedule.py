"""Learning rate over a run: linear warm-up, then one of four shapes."""

from __future__ import annotations

import math


def learning_rate(
    step: int,
    *,
    lr: float,
    min_lr: float,
    warmup_steps: int,
    steps: int,
    schedule: str = "cosine",
    decay_share: float = 0.2,
) -> float:
    """Rate for step number `step` (the first is 0) of a run of `steps` steps.

    schedule: shape after the warm-up.
        cosine: half a cosine from lr down to min_lr (Loshchilov and Hutter, 2017; as in nanoGPT).
        linear: a straight line from lr down to min_lr.
        wsd: lr, and over the last `decay_share` of the run a straight line down to min_lr
            (warm-up, stable, decay; Hu et al., 2024, section 4).
        constant: lr.
    """
    if step < warmup_steps:
        return lr * (step + 1) / (warmup_steps + 1)
    if schedule == "constant":
        return lr
    if step >= steps:
        return min_lr
    start = warmup_steps
    if schedule == "wsd":
        start = max(start, steps - round(decay_share * steps))
        if step < start:
            return lr
    share = (step - start) / (steps - start)
    left = 1 - share if schedule in ("linear", "wsd") else 0.5 * (1 + math.cos(math.pi * share))
    return min_lr + left * (lr - min_lr)
