"""Requests carried out: texts in batches, continued token by token or by beam search."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from ..model import GPT2
from ..tokenizer import Tokenizer
from .beam_search import beam_search
from .continuation import Continuation, Generation, Request
from .decoding import Step, Timing, decode
from .sampling import Draw
from .scores import Scores
from .teacher_forcing import score_sequences
from .window import Window

_BATCH_ROWS = 32
"""Continuations in a batch; more would take memory and save little time."""


class Completer:
    """Continues texts whose tokens are checked.

    Args:
        model, tokenizer: a pair.
        window: treatment of long texts.
    """

    def __init__(self, model: GPT2, tokenizer: Tokenizer, window: Window):
        self._model, self._tokenizer, self._window = model, tokenizer, window

    @property
    def _allowed(self) -> int:
        """Ids below this may be chosen: not tokens that were added to the tokenizer alone."""
        return min(self._tokenizer.vocab_size, self._model.config.vocab_size)

    def continue_all(
        self,
        texts: Sequence[str],
        encoded: Sequence[list[int]],
        request: Request,
        timing: Timing | None,
        draws: Sequence[Draw] | None = None,
    ) -> Iterator[Generation]:
        """All continuations of every text, in the order of the texts.

        Args:
            texts: the prompts.
            encoded: their tokens.
            request: what is asked for.
            timing: filled in as it goes on.
            draws: of each text's first continuation; None where nothing is drawn.
        """
        copies, beams = request.options.num_return_sequences, request.options.num_beams
        samples_at_once = copies if beams > 1 else min(copies, _BATCH_ROWS)
        texts_at_once = max(1, _BATCH_ROWS // max(samples_at_once, beams))
        for first in range(0, len(texts), texts_at_once):
            chunk = slice(first, first + texts_at_once)
            for sample in range(0, copies, samples_at_once):
                count = min(samples_at_once, copies - sample)
                part = replace(
                    request, options=replace(request.options, num_return_sequences=count)
                )
                yield from self._complete(
                    texts[chunk],
                    encoded[chunk],
                    part,
                    timing,
                    None if draws is None else [draw.after(sample) for draw in draws[chunk]],
                )

    def steps(
        self,
        prompts: Sequence[list[int]],
        request: Request,
        *,
        timing: Timing | None,
        draws: Sequence[Draw] | None,
    ) -> Iterator[Step]:
        """The steps of decoding prompts together, token by token."""
        room = self._model.config.n_positions
        if request.options.max_new_tokens == 0:
            return
        limits = [
            self._window.limit(new, len(prompt), room)
            for prompt, new in zip(prompts, _limits(prompts, request), strict=True)
        ]
        copies = request.options.num_return_sequences
        for count, step in enumerate(
            decode(
                self._model,
                prompts,
                limits,
                request.options,
                request.criteria,
                slides=self._window.kind == "slide",
                alternatives=request.alternatives,
                vocab_size=self._allowed,
                draws=draws,
                timing=timing,
                callables=request.callables,
                grammar=request.grammar,
            ),
            start=1,
        ):
            for row, reason in zip(step.rows, step.reasons, strict=True):
                if reason is None and len(prompts[row // copies]) + count > room:
                    self._window.tell_slide(room)
            yield step

    def _complete(
        self,
        texts: Sequence[str],
        prompts: Sequence[list[int]],
        request: Request,
        timing: Timing | None,
        draws: Sequence[Draw] | None,
    ) -> list[Generation]:
        options = request.options
        copies = options.num_return_sequences
        found = [Continuation(self._tokenizer, request) for _ in range(len(prompts) * copies)]
        alternatives = request.alternatives
        scored: list[Scores | None] = [None] * len(prompts)
        if alternatives is not None and request.scores_prompt:
            scored = list(score_sequences(self._model, prompts, alternatives, [1] * len(prompts)))
        if options.num_beams > 1 and options.max_new_tokens != 0:
            beams = beam_search(
                self._model,
                prompts,
                _limits(prompts, request),
                options,
                request.criteria,
                vocab_size=self._allowed,
                timing=timing,
                callables=request.callables,
            )
            for row, (tokens, reason) in enumerate(beams):
                for place, token in enumerate(tokens, start=1):
                    found[row].push(token, reason if place == len(tokens) else None)
            if alternatives is not None:
                reads = [prompts[row // copies] for row in range(len(beams))]
                whole = [read + beam.tokens for read, beam in zip(reads, beams, strict=True)]
                each = score_sequences(self._model, whole, alternatives, list(map(len, reads)))
                for continuation, scores in zip(found, each, strict=True):
                    continuation.scores = scores
        else:
            for step in self.steps(prompts, request, timing=timing, draws=draws):
                for place, row in enumerate(step.rows):
                    found[row].push(step.tokens[place], step.reasons[place])
                    if step.scores is not None:
                        found[row].scores.add(step.scores.of(place))
        return [
            Generation(
                prompt=texts[row // copies],
                text=continuation.text,
                tokens=continuation.tokens,
                prompt_tokens=len(prompts[row // copies]),
                finish_reason=continuation.reason or "length",
                seed=None if draws is None else draws[row // copies].seed,
                prompt_token_ids=prompts[row // copies],
                **continuation.scored(scored[row // copies]),
            )
            for row, continuation in enumerate(found)
        ]


def _limits(prompts: Sequence[Sequence[int]], request: Request) -> list[int]:
    return [request.options.new_tokens(len(prompt), "the prompt") for prompt in prompts]
