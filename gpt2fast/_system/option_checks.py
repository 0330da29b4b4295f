"""Checks of options of generation: whole numbers, numbers, tokens.

All raise GenerationError, which names the option, its value and the limit.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterable, Mapping
from typing import Any

from ..errors import GenerationError

_MOST_BIAS = 100
"""Of logit_bias, as in OpenAI's API."""


def check_whole(
    name: str, value: object, *, low: int, high: int | None = None, off: bool = False
) -> None:
    """Refuse what is no whole number from `low` to `high`; with `off`, None is allowed, too."""
    if value is None and off:
        return
    is_whole = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    if not is_whole or value < low or (high is not None and value > high):  # type: ignore[operator]
        raise GenerationError(
            f"{name} is {value!r}; it must be a whole number of at least {low}"
            + ("" if high is None else f" and at most {high}")
            + (", or None to switch it off" if off else "")
        )


def check_number(
    name: str,
    value: object,
    *,
    low: float,
    high: float = math.inf,
    above: bool = False,
    below: bool = False,
    off: bool = True,
    way_out: str = "",
) -> None:
    """Refuse what is no finite number in a range, whose ends are in it but for `above`, `below`.

    Args:
        name: the option's.
        value: its value.
        low, high: the ends of the range.
        above, below: `low`, or `high`, is out of range.
        off: None is allowed, too.
        way_out: comes after the range in the error.
    """
    if value is None and off:
        return
    is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    number = float(value) if is_number else math.nan  # type: ignore[arg-type]
    is_edge = (above and number == low) or (below and number == high)
    if not low <= number <= high or math.isinf(number) or is_edge:
        if below:
            limit = f"of at least {low} and below {high}"
        elif high < math.inf:
            limit = f"above {low} and at most {high}" if above else f"from {low} to {high}"
        else:
            limit = f"above {low}" if above else f"of at least {low}"
        raise GenerationError(
            f"{name} is {value!r}; it must be a finite number {limit}{way_out}"
            + (", or None to switch it off" if off else "")
        )


def token_sequences(name: str, value: Any) -> list[list[int]] | None:
    """Sequences of token ids as lists; or None."""
    if value is None:
        return None
    if isinstance(value, str | bytes) or not isinstance(value, Iterable):
        raise GenerationError(
            f"{name} is {value!r:.80}; it must be a list of lists of token ids, or None"
        )
    found = []
    for sequence in value:
        is_list = isinstance(sequence, Iterable) and not isinstance(sequence, str | bytes)
        tokens = list(sequence) if is_list else []
        if not tokens or not all(_is_id(token) for token in tokens):
            raise GenerationError(
                f"{name} has the item {sequence!r:.80}; each must be a list of at least one token "
                "id, as tokenizer.encode gives it"
            )
        found.append([int(token) for token in tokens])
    return found


def token_biases(value: Any) -> dict[int, float] | None:
    """A logit_bias with ids as keys and floats as values; or None."""
    if value is None:
        return None
    if not isinstance(value, Mapping):
        raise GenerationError(
            f"logit_bias is {value!r:.80}; it must map token ids to numbers, as in {{50256: -100}}"
        )
    found = {}
    for token, bias in value.items():
        # Keys of JSON are texts, in OpenAI's API and in lines of prompts.
        if isinstance(token, str) and token.isascii() and token.isdecimal() and len(token) < 19:
            token = int(token)
        if not _is_id(token):
            raise GenerationError(
                f"logit_bias has the key {token!r:.80}; keys must be token ids, whole numbers of "
                "at least 0"
            )
        check_number(
            f"logit_bias of the token {token}", bias, low=-_MOST_BIAS, high=_MOST_BIAS, off=False,
            way_out="; bad_words_ids bans a token for certain",
        )  # fmt: skip
        found[int(token)] = float(bias)
    return found


def _is_id(token: object) -> bool:
    return isinstance(token, numbers.Integral) and not isinstance(token, bool) and token >= 0  # type: ignore[operator]
