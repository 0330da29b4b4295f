"""Log-probabilities of given tokens, and of the likeliest ones in their places.

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
    """Log-probabilities of consecutive tokens."""

    logprobs: list[float] = field(default_factory=list)
    """Log-probability of each token, in nats."""
    top: list[dict[int, float]] = field(default_factory=list)
    """For each token the likeliest ids in its place with their log-probabilities, likeliest
    first."""

    def of(self, place: int) -> Scores:
        """The scores of one token."""
        return Scores(self.logprobs[place : place + 1], self.top[place : place + 1])

    def add(self, other: Scores) -> None:
        """Append the scores of the tokens that follow."""
        self.logprobs += other.logprobs
        self.top += other.top


def score(logits: Tensor, tokens: Sequence[int], alternatives: int) -> Scores:
    """Score the tokens that were chosen from logits.

    Args:
        logits: (N, vocab), as the model gave them.
        tokens: N ids, one for each row.
        alternatives: number of the likeliest tokens to return in each place.
    """
    wide = torch.promote_types(logits.dtype, torch.float32)
    logprobs = logits.to(wide).log_softmax(-1)
    chosen = torch.tensor(tokens, device=logits.device)[:, None]
    values, ids = (found.tolist() for found in logprobs.topk(alternatives))
    top = [dict(zip(*pair, strict=True)) for pair in zip(ids, values, strict=True)]
    return Scores(logprobs.gather(1, chosen)[:, 0].tolist(), top)
