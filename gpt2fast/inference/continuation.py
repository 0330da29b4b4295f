"""Continuations of texts: tokens and characters while they are generated, and the result."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from ..sampling import SamplingOptions
from ..tokenizer import Tokenizer
from .callables import Callables
from .decoding import Step
from .grammar import Grammar
from .scores import Scores
from .stopping import StopCriteria


@dataclass(frozen=True)
class Generation:
    """A continuation of a prompt. `str()` gives prompt and continuation."""

    prompt: str
    text: str
    """The continuation, without the end token or stop string that ended it."""
    tokens: list[int]
    """The continuation's token ids, with those of the end token or stop string."""
    prompt_tokens: int
    """Number of tokens of the prompt; an empty prompt counts the beginning-of-text token."""
    finish_reason: str
    """Reason for the end: "eos" (end token), "stop" (stop string, a criterion of the user's, or a
    grammar that is complete), "length" (max_new_tokens, max_length) or "time" (max_time)."""
    seed: int | None
    """Seed of the draws; None where there were none."""
    logprobs: list[float] | None = None
    """Log-probability (nats) of each token under the model, before temperature and the like."""
    top_logprobs: list[dict[int, float]] | None = None
    """For each token the likeliest ids in its place with their log-probabilities, likeliest first;
    if the option `top_logprobs` asks for them."""
    prompt_token_ids: list[int] = field(default_factory=list)
    """The prompt's token ids."""
    prompt_logprobs: list[float | None] | None = None
    """Log-probability of each prompt token given those before it, None for the first; only with
    `max_new_tokens=0, logprobs=True`."""
    prompt_top_logprobs: list[dict[int, float] | None] | None = None
    """The same as `top_logprobs`, for the prompt's tokens."""

    @property
    def new_tokens(self) -> int:
        """Number of tokens of the continuation."""
        return len(self.tokens)

    def __str__(self) -> str:
        return self.prompt + self.text


@dataclass(frozen=True)
class Request:
    """Settings of the continuations that are asked for."""

    options: SamplingOptions
    criteria: StopCriteria
    alternatives: int | None
    """Number of likely alternatives to return with each token; None: nothing is scored."""
    callables: Callables
    """Functions of the user's."""
    grammar: Grammar | None = None
    """What continuations must be."""

    @property
    def scores_prompt(self) -> bool:
        """True where the prompt's own tokens are scored, since there are no new ones."""
        return self.alternatives is not None and self.options.max_new_tokens == 0


class Continuation:
    """Tokens and text of one continuation, as its tokens come."""

    def __init__(self, tokenizer: Tokenizer, request: Request):
        self.tokens: list[int] = []
        self.text = ""
        self.reason = "length" if request.options.max_new_tokens == 0 else None
        self.scores = Scores()
        self._alternatives = request.alternatives
        self._stops = request.criteria.strings
        self._tokenizer, self._decoder = tokenizer, tokenizer.decoder()
        self._held = ""
        """Text held back because it may be the beginning of a stop string."""

    def push(self, token: int, reason: str | None) -> str:
        """Add a token; returns the text that can no longer become part of a stop string."""
        self.tokens.append(token)
        self.reason = reason
        if reason != "eos" and token in self._tokenizer:  # ids may have gaps
            self._held += self._decoder.push(token)
        if reason is not None:
            self._held += self._decoder.flush()
        places = [self._held.find(stop) for stop in self._stops if stop in self._held]
        if reason == "stop" and places:
            certain = min(places)
        elif reason is not None:
            certain = len(self._held)
        else:
            certain = len(self._held) - self._overlap()
        piece, self._held = self._held[:certain], self._held[certain:]
        self.text += piece
        return piece

    def end(self, reason: str) -> str:
        """End it without another token; returns the text that was held back."""
        self.reason = reason
        piece, self._held = self._held + self._decoder.flush(), ""
        self.text += piece
        return piece

    def scored(self, prompt: Scores | None) -> dict[str, Any]:
        """The fields of `Generation` about scores.

        Args:
            prompt: scores of the prompt's tokens after the first one.
        """
        if self._alternatives is None:
            return {}
        fields: dict[str, Any] = {"logprobs": self.scores.logprobs}
        if prompt is not None:
            fields["prompt_logprobs"] = [None, *prompt.logprobs]
        if self._alternatives:
            fields["top_logprobs"] = self.scores.top
            if prompt is not None:
                fields["prompt_top_logprobs"] = [None, *prompt.top]
        return fields

    def _overlap(self) -> int:
        """Length of the longest suffix of the held text that is a prefix of a stop string."""
        longest = min(len(self._held), max((len(stop) for stop in self._stops), default=1) - 1)
        for length in range(longest, 0, -1):
            if any(stop.startswith(self._held[-length:]) for stop in self._stops):
                return length
        return 0


class TextStream(Iterator[str]):
    """The pieces of a continuation as they come, and all of it so far."""

    def __init__(
        self,
        prompt: str,
        prompt_tokens: int,
        steps: Iterator[Step],
        tokenizer: Tokenizer,
        request: Request,
        seed: int | None,
    ):
        self.prompt = prompt
        self.prompt_tokens = prompt_tokens
        self.seed = seed
        self._steps = steps
        self._continuation = Continuation(tokenizer, request)

    @property
    def text(self) -> str:
        """The continuation so far."""
        return self._continuation.text

    @property
    def tokens(self) -> list[int]:
        """Its token ids so far."""
        return self._continuation.tokens

    @property
    def logprobs(self) -> list[float] | None:
        """Same as in `Generation`, so far."""
        return self._continuation.scored(None).get("logprobs")

    @property
    def top_logprobs(self) -> list[dict[int, float]] | None:
        """Same as in `Generation`, so far."""
        return self._continuation.scored(None).get("top_logprobs")

    @property
    def finish_reason(self) -> str | None:
        """Same as in `Generation`; None until the stream has ended."""
        return self._continuation.reason

    def __next__(self) -> str:
        for step in self._steps:
            if not step.tokens:  # its time was over
                piece = self._continuation.end(step.reasons[0] or "time")
                if piece:
                    return piece
                continue
            piece = self._continuation.push(step.tokens[0], step.reasons[0])
            if step.scores is not None:
                self._continuation.scores.add(step.scores)
            if piece:
                return piece
        raise StopIteration
