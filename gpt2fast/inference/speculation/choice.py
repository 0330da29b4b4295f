"""What a generator speculates with: named in a call, or when it is made."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from ...errors import Error, GenerationError
from ...model import GPT2
from ...tokenizer import Tokenizer
from ..loading import load_pair
from ..packed import PackedGPT2
from .draft_model import ModelDrafter, check_same_vocabulary, packed_draft
from .drafter import Drafter
from .lengths import DraftLengths
from .lookup import LookupDrafter, NgramPool

OFF = "off"
LOOKUP = "lookup"

Speculate = Any
"""What a call takes: "off", "lookup", or a draft model, which a name or path may stand for."""


class Speculation:
    """The drafters of a generator, one for each call, and what they have learned.

    Args:
        model, tokenizer: a pair.
        speculate: for calls that do not say otherwise.

    Raises:
        GenerationError: it is nothing to speculate with.
    """

    def __init__(self, model: GPT2 | PackedGPT2, tokenizer: Tokenizer, speculate: Any = OFF):
        self._model, self._tokenizer = model, tokenizer
        self._pool = NgramPool()
        self._learned: dict[Any, DraftLengths] = {}
        self._loaded: dict[str, PackedGPT2] = {}
        self._standard = self._resolved(speculate)

    @property
    def is_possible(self) -> bool:
        """True if the model runs on packed weights."""
        return isinstance(self._model.for_decoding(), PackedGPT2)

    def drafting(self, speculate: Any = None) -> AbstractContextManager[Drafter | None]:
        """For a `with` block: a drafter for one call, or None for no speculation.

        Args:
            speculate: see `Generator`; None takes the standard.

        Raises:
            GenerationError: it is nothing to speculate with.
        """
        return self._drafting(self._standard if speculate is None else self._resolved(speculate))

    @contextmanager
    def _drafting(self, draft: str | PackedGPT2) -> Iterator[Drafter | None]:
        if draft == OFF or not self.is_possible:
            yield None
            return
        key = draft if isinstance(draft, str) else id(draft)
        learned = self._learned.get(key)
        lengths = DraftLengths() if learned is None else learned.renewed()
        if isinstance(draft, str):
            yield LookupDrafter(self._pool, lengths)
        else:
            known = min(self._tokenizer.vocab_size, self._model.config.vocab_size)
            yield ModelDrafter(draft, known, lengths)
        self._learned[key] = lengths

    def _resolved(self, speculate: Any) -> str | PackedGPT2:
        """ "off", "lookup" or a draft model that is known to fit."""
        if speculate in (OFF, LOOKUP):
            return str(speculate)
        if isinstance(speculate, (str, os.PathLike)):
            return self._load(os.fspath(speculate))
        tokenizer = getattr(speculate, "tokenizer", None)
        model = getattr(speculate, "model", speculate)
        if not isinstance(model, (GPT2, PackedGPT2)):
            raise GenerationError(
                f'speculate is {speculate!r:.80}; it must be "off", "lookup", or a smaller model '
                "with the same vocabulary: a Generator, a GPT2, or its name or path"
            )
        return self._fitting(model, tokenizer)

    def _load(self, name: str) -> PackedGPT2:
        if name not in self._loaded:
            try:
                model, tokenizer = load_pair(
                    name,
                    tokenizer=None,
                    device="cpu",
                    dtype=None,
                    revision=None,
                    local_files_only=False,
                    preset=None,
                    adapter=None,
                    quantize=None,
                    pack=True,
                )
            except Error as error:
                raise GenerationError(
                    f'speculate is {name!r}, neither "off" nor "lookup", and no model can be '
                    f"loaded by that name: {error}"
                ) from error
            self._loaded[name] = self._fitting(model, tokenizer)
        return self._loaded[name]

    def _fitting(self, model: GPT2 | PackedGPT2, tokenizer: Any) -> PackedGPT2:
        """The packed form of a draft model, whose vocabulary is this generator's.

        Raises:
            GenerationError: it is another, or the model cannot be packed.
        """
        if tokenizer is not None:
            check_same_vocabulary(Tokenizer.of(tokenizer), self._tokenizer)
        elif model.config.vocab_size != self._model.config.vocab_size:
            raise GenerationError(
                f"the draft model has a vocabulary of {model.config.vocab_size}, and the model one "
                f"of {self._model.config.vocab_size}: speculate with a smaller model that has the "
                'same vocabulary, or with "lookup"'
            )
        return packed_draft(model)
