"""Log-probabilities of given tokens under a model: teacher forcing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from ..model import GPT2
from ..nn.output import LOGITS_ALONE
from .decoding import check_numbers, evaluating
from .scores import Scores, score

# Most bytes of logits to hold at once, unless a single row has more.
_MOST_BYTES = 1 << 28


def score_sequences(
    model: GPT2, sequences: Sequence[Sequence[int]], alternatives: int, first: Sequence[int]
) -> Iterator[Scores]:
    """Score each sequence's tokens from `first` on, each after all those before it.

    Args:
        sequences: token ids, at most `n_positions` + 1 each; they may differ in length.
        alternatives: as in `score`.
        first: for each sequence the index of the first token to score, at least 1.
    """
    with torch.inference_mode(), evaluating(model):
        for rows in _batches(sequences, model.config.vocab_size):
            longest = max(len(sequences[row]) for row in rows) - 1
            begin = min(first[row] for row in rows) - 1
            if longest == begin:  # there is nothing to score
                yield from (Scores() for _ in rows)
                continue
            # A token does not see those to its right: padding there needs no mask.
            ids = [[*sequences[row][:-1]] for row in rows]
            padded = [read + [0] * (longest - len(read)) for read in ids]
            read = torch.tensor(padded, device=model.device)
            logits = model(read, logits_to_keep=longest - begin, **LOGITS_ALONE).logits
            for row, found in zip(rows, logits, strict=True):
                kept = found[first[row] - 1 - begin : len(sequences[row]) - 1 - begin]
                check_numbers(kept)
                yield score(kept, sequences[row][first[row] :], alternatives)


def _batches(sequences: Sequence[Sequence[int]], vocab_size: int) -> Iterator[list[int]]:
    """Indices of the sequences of each batch."""
    rows: list[int] = []
    longest = 0
    for number, sequence in enumerate(sequences):
        longest = max(longest, len(sequence))
        if rows and (len(rows) + 1) * longest * vocab_size * 4 > _MOST_BYTES:
            yield rows
            rows, longest = [], len(sequence)
        rows.append(number)
    if rows:
        yield rows
