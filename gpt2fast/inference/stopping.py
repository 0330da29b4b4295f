"""Ends of continuations: end tokens, stop strings, stop sequences."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import islice
from typing import Any

from ..errors import GenerationError
from ..tokenizer.foreign import Decoding


class StopCriteria:
    """End tokens and stop strings: all reasons to end a continuation but its length.

    Args:
        eos: ids that end a text.
        stop: strings, or sequences of token ids, that end a continuation.
        tokenizer: decodes tokens to look for the strings in; transformers' objects are taken as
            they are.

    Raises:
        GenerationError: an invalid stop, or strings without a tokenizer.
        TokenizerError: `tokenizer` is none.
    """

    def __init__(
        self,
        eos: Sequence[int],
        stop: str | Sequence[str | Sequence[int]] | None = None,
        tokenizer: Any = None,
    ):
        self.eos = list(eos)
        self.strings: list[str] = []
        self.sequences: list[list[int]] = []
        if stop is not None and not isinstance(stop, Iterable):
            raise GenerationError(f"stop is {stop!r}; it must be a text, or a list of texts")
        for item in [stop] if isinstance(stop, str) else stop or []:
            if isinstance(item, str) and item:
                self.strings.append(item)
            elif isinstance(item, Sequence) and item and all(isinstance(i, int) for i in item):
                self.sequences.append(list(item))  # type: ignore[arg-type]
            else:
                raise GenerationError(
                    f"stop has the item {item!r}; each must be a text of at least one character, "
                    "or a list of at least one token id"
                )
        if self.strings and tokenizer is None:
            raise GenerationError(
                f"stop has the text {self.strings[0]!r}, which takes a tokenizer to find: pass "
                "tokenizer=..., or lists of token ids"
            )
        self._tokenizer = None if tokenizer is None else Decoding(tokenizer)
        # Every token has at least one byte, so this many reach back over a whole stop string, and
        # over the character that the cut may have split in front of it.
        self._reach = max((len(text.encode()) for text in self.strings), default=0) + 4

    def reason(self, tokens: Sequence[int]) -> str | None:
        """The reason to end a continuation at the last of `tokens`: "eos", "stop" or None.

        To be asked after each token: only ends at the last one are found.
        """
        if tokens[-1] in self.eos:
            return "eos"
        for sequence in self.sequences:
            if list(tokens[-len(sequence) :]) == sequence:
                return "stop"
        if self.strings and self._tokenizer is not None:
            # A model may have more ids than the tokenizer has tokens; those have no text.
            ends = (token for token in reversed(tokens) if token in self._tokenizer)
            text = self._tokenizer.decode([*islice(ends, self._reach)][::-1])
            if any(string in text for string in self.strings):
                return "stop"
        return None
