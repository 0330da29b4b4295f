"""Tokens chosen for many rows, each by its own options and its own random numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ... import ops
from ..decoding import check_numbers
from ..scores import Scores, score
from .row import Row

_WORD = 32


@dataclass(eq=False)
class Choice:
    """What is chosen for one row in a step: the next token, and one after each draft."""

    row: Row
    first: int
    """Index of the row's first logits; those after its drafts follow."""
    drafts: Sequence[int] = ()
    """Proposed tokens, which the model has read too."""
    tokens: list[int] = field(default_factory=list)
    """The tokens chosen, the first one certain: the next is there if the one before it is the draft
    that was read in its place."""
    scores: Scores | None = None
    """Their log-probabilities, if the row asks for them."""
    error: Exception | None = None
    """Why nothing was chosen."""
    mask: Tensor | None = None
    """(places, ceil(V / 32)) int32: the tokens that the row's grammar allows in each place."""

    @property
    def places(self) -> range:
        """Indices of the row's logits."""
        return range(self.first, self.first + len(self.drafts) + 1)


def choose(choices: Sequence[Choice], logits: Tensor, vocab_size: int) -> None:
    """Fill in the tokens of every row, or its error; an error of one row leaves the others alone.

    Args:
        choices: one for each row.
        logits: (P, V).
        vocab_size: token ids below this may be chosen.
    """
    _check(choices, logits)
    groups: dict[object, list[Choice]] = {}
    for choice in choices:
        try:
            if choice.error is None:
                choice.mask = _mask(choice, vocab_size)
        except Exception as error:
            choice.error = error
        if choice.error is None:
            key = choice.row.group if choice.row.processors is None else choice
            groups.setdefault(key, []).append(choice)
    for group in groups.values():
        try:
            if group[0].row.processors is None:
                _choose_together(group, logits, vocab_size)
            else:
                _choose_stepwise(group[0], logits, vocab_size)
        except Exception as error:
            for choice in group:
                choice.error = error
    scored: dict[int, list[Choice]] = {}
    for choice in choices:
        alternatives = choice.row.job.request.alternatives
        if choice.error is None and alternatives is not None:
            scored.setdefault(alternatives, []).append(choice)
    for alternatives, group in scored.items():
        found = score(
            _rows(logits, [i for choice in group for i in _chosen_places(choice)]),
            [token for choice in group for token in choice.tokens],
            alternatives,
        )
        begin = 0
        for choice in group:
            end = begin + len(choice.tokens)
            choice.scores = Scores(found.logprobs[begin:end], found.top[begin:end])
            begin = end


def _check(choices: Sequence[Choice], logits: Tensor) -> None:
    """Note which rows' logits are not numbers.

    All logits of a first token are looked at. Later, what is not a number has come through the last
    layer's output, and then it is in every logit.
    """
    doubtful = logits[:, 0].isnan().tolist()
    for choice in choices:
        try:
            if choice.row.generated == 0 or any(doubtful[i] for i in choice.places):
                check_numbers(logits[choice.first : choice.first + len(choice.drafts) + 1])
        except Exception as error:
            choice.error = error


def _chosen_places(choice: Choice) -> range:
    return choice.places[: len(choice.tokens)]


def _rows(logits: Tensor, places: list[int]) -> Tensor:
    """These rows of the logits; a view where they are consecutive."""
    first = places[0]
    if places[-1] - first + 1 == len(places) and all(
        place == first + i for i, place in enumerate(places)
    ):
        return logits[first : first + len(places)]
    return logits[torch.tensor(places, device=logits.device)]


def _choose_together(group: list[Choice], logits: Tensor, vocab_size: int) -> None:
    row = group[0].row
    places = [place for choice in group for place in choice.places]
    uniform = None
    if row.numbers is not None:
        values = [
            choice.row.numbers.at(choice.row.generated + i)  # type: ignore[union-attr]
            for choice in group
            for i in range(len(choice.drafts) + 1)
        ]
        uniform = torch.tensor(values, dtype=torch.float32, device=logits.device)
    if row.reads_history:
        history = _histories(group).to(logits.device)
    else:
        history = torch.empty(len(places), 0, dtype=torch.int64, device=logits.device)
    allowed = _rows(logits, places)[:, :vocab_size]
    masks = [choice.mask for choice in group if choice.mask is not None]
    masked: dict[str, Any] = {"token_mask": torch.cat(masks).to(logits.device)} if masks else {}
    chosen = ops.sample(allowed, history, uniform, **masked, **dict(row.choice)).tolist()
    begin = 0
    for choice in group:
        end = begin + len(choice.drafts) + 1
        choice.tokens = _certain(chosen[begin:end], choice.drafts)
        begin = end


def _certain(chosen: list[int], drafts: Sequence[int]) -> list[int]:
    """The tokens up to the first one that is not the draft."""
    for place, (token, draft) in enumerate(zip(chosen, drafts, strict=False)):
        if token != draft:
            return chosen[: place + 1]
    return chosen


def _histories(group: Sequence[Choice]) -> Tensor:
    """(N, S) each row's tokens up to each of its places, after -1 as padding."""
    longest = max(len(choice.row.tokens) + len(choice.drafts) for choice in group)
    count = sum(len(choice.drafts) + 1 for choice in group)
    history = np.full((count, longest), -1, np.int64)
    at = 0
    for choice in group:
        known = len(choice.row.tokens)
        for drafted in range(len(choice.drafts) + 1):
            history[at, longest - known - drafted : longest - drafted] = choice.row.ids[:known]
            if drafted:
                history[at, longest - drafted :] = choice.drafts[:drafted]
            at += 1
    return torch.from_numpy(history)


def _choose_stepwise(choice: Choice, logits: Tensor, vocab_size: int) -> None:
    """Choose one token after the other, as processors of the user's may count their calls."""
    row = choice.row
    assert row.processors is not None
    for drafted, place in enumerate(choice.places):
        known = [*row.tokens, *choice.drafts[:drafted]]
        history = torch.tensor([known], device=logits.device)
        uniform = None
        if row.numbers is not None:
            number = row.numbers.at(row.generated + drafted)
            uniform = torch.tensor([number], dtype=torch.float32, device=logits.device)
        scores = logits[place : place + 1, :vocab_size]
        mask = None
        if choice.mask is not None:
            mask = choice.mask[drafted : drafted + 1].to(logits.device)
        generated = history[:, row.prompted :]
        token = row.processors.choose(scores, history, generated, uniform, mask).item()
        choice.tokens.append(int(token))
        if drafted < len(choice.drafts) and token != choice.drafts[drafted]:
            return


def _mask(choice: Choice, vocab_size: int) -> Tensor | None:
    """See `Choice.mask`; bits after a draft that ends the text mean nothing."""
    matcher = choice.row.matcher
    if matcher is None:
        return None
    words = -(-vocab_size // _WORD)
    mask = torch.full((len(choice.places), words), -1, dtype=torch.int32, device="cpu")
    matcher.mask(mask[0])
    for out, draft in zip(mask[1:], choice.drafts, strict=True):
        matcher.advance(draft)
        if not matcher.finished:
            matcher.mask(out)
    if choice.drafts:
        matcher.rollback(len(choice.drafts))
    return mask
