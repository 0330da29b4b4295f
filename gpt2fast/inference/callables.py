"""Processors of scores and criteria for stopping that a user wrote, in transformers' form.

    processor(input_ids, scores) -> scores          (rows, length) int64, (rows, vocab)
    criterion(input_ids, None) -> bool              or (rows,) bool

transformers' own classes are such: `NoBadWordsLogitsProcessor`, `MaxTimeCriteria`, and so on. Rows
never see padding: where prompts differ in length, each row is processed by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from ..errors import GenerationError


class Callables:
    """What a user wants called in each step.

    Args:
        processors: change the scores of the next tokens, one after the other, before temperature,
            top-k and the like.
        criteria: end a text that they are true for.

    Raises:
        GenerationError: something that cannot be called.
    """

    def __init__(self, processors: Any = None, criteria: Any = None):
        self.processors = _called("logits_processor", processors)
        self.criteria = _called("stopping_criteria", criteria)

    def process(self, history: Tensor, scores: Tensor) -> Tensor:
        """Scores (rows, vocab) after all processors.

        Args:
            history: (rows, length) int64; each row's tokens, after -1 as padding.
            scores: float32.

        Raises:
            GenerationError: a processor returns something else than scores.
        """
        for processor in self.processors:
            if bool((history[:, :1] >= 0).all()):
                scores = _checked(processor, processor(history, scores), scores)
                continue
            rows = []
            for tokens, row in zip(history, scores, strict=True):
                real = tokens[tokens >= 0][None]
                rows.append(_checked(processor, processor(real, row[None]), row[None]))
            scores = torch.cat(rows)
        return scores

    def stop(self, tokens: list[int], device: torch.device) -> bool:
        """True if a criterion ends the text of these tokens, prompt and continuation."""
        if not self.criteria:
            return False
        read = torch.tensor([tokens], device=device)
        return any(bool(torch.as_tensor(each(read, None)).all()) for each in self.criteria)


def _called(name: str, given: Any) -> list[Callable[..., Any]]:
    if given is None:
        return []
    if not isinstance(given, Iterable):
        raise GenerationError(f"{name} is {given!r:.80}; it must be a list of functions")
    functions = list(given)
    for each in functions:
        if not callable(each):
            raise GenerationError(f"{name} has {each!r:.80}, which cannot be called")
    return functions


def _checked(processor: Callable[..., Any], found: Any, scores: Tensor) -> Tensor:
    if isinstance(found, Tensor) and found.shape == scores.shape:
        return found
    got = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
    name = getattr(processor, "__name__", type(processor).__name__)
    raise GenerationError(
        f"{name} of logits_processor returned {got}; it must return scores of the shape that it "
        f"was given, {tuple(scores.shape)}"
    )


NONE = Callables()
"""Nothing to call."""
