"""Log-probabilities: of given tokens, and of the likeliest ones in their places.

They are those of the model's own distribution, over its whole vocabulary, as it is before
temperature, top-k and every other processor: log_softmax of the logits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class Scores:
    """Of tokens that follow each other."""

    logprobs: list[float] = field(default_factory=list)
    """Log-probability in nats of each."""
    top: list[dict[int, float]] = field(default_factory=list)
    """The likeliest token ids in each one's place with theirs, the likeliest first."""

    def of(self, place: int) -> Scores:
        """Those of one token."""
        return Scores(self.logprobs[place : place + 1], self.top[place : place + 1])

    def add(self, other: Scores) -> None:
        """Append those of the tokens that follow."""
        self.logprobs += other.logprobs
        self.top += other.top


def score(logits: Tensor, tokens: Sequence[int], alternatives: int) -> Scores:
    """Score the tokens that were chosen from logits.

    Args:
        logits: (N, vocab), as the model gave them.
        tokens: N ids, one for each row.
        alternatives: how many of the likeliest tokens to name in each place.
    """
    wide = torch.promote_types(logits.dtype, torch.float32)
    logprobs = logits.to(wide).log_softmax(-1)
    chosen = torch.tensor(tokens, device=logits.device)[:, None]
    values, ids = (found.tolist() for found in logprobs.topk(alternatives))
    top = [dict(zip(*pair, strict=True)) for pair in zip(ids, values, strict=True)]
    return Scores(logprobs.gather(1, chosen)[:, 0].tolist(), top)
