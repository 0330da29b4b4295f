"""The choices of an answer: their texts and scored tokens, as the engine tells them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from ..errors import GenerationError, TokenizerError
from ..inference.batching import Failed, Finished, PromptRead, Token
from ..inference.continuation import Generation
from ..inference.scores import Scores
from ..tokenizer import Tokenizer
from .failures import failure_of, refusal_of, unavailable
from .planning import Plan, Prompt
from .submission import Told

_LEAST = -9999.0
"""In place of minus infinity, which JSON lacks."""


class TokenNames:
    """The texts of tokens in log-probabilities.

    A token that is a part of a character only is named by its bytes, as OpenAI's API does it:
    `bytes:\\xe2\\x80`. So no two tokens of GPT-2 have the same name.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._names: dict[int, str] = {}
        self._bytes: Mapping[int, bytes] | None = None
        with suppress(TokenizerError):  # a token's text may depend on its neighbors
            self._bytes = tokenizer.token_bytes()

    def __getitem__(self, id: int) -> str:
        name = self._names.get(id)
        if name is None:
            name = self._names[id] = self._name(id)
        return name

    def bytes_of(self, id: int) -> bytes:
        """The token's own bytes; none where the model has a row and the tokenizer no token."""
        if id not in self._tokenizer:
            return b""
        return self._tokenizer.decode([id]).encode() if self._bytes is None else self._bytes[id]

    def _name(self, id: int) -> str:
        if id not in self._tokenizer:
            return f"token_id:{id}"
        content = self.bytes_of(id)
        try:
            return content.decode("utf-8")
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in content)


@dataclass(frozen=True)
class ScoredToken:
    """A token of an answer, and its place in the text."""

    id: int
    begin: int
    """Characters of the text before it."""
    end: int
    logprob: float | None
    """None for the first token of a prompt."""
    top: dict[int, float] | None
    """The likeliest tokens in its place."""


@dataclass
class Delta:
    """What has become certain of a choice."""

    text: str = ""
    tokens: list[ScoredToken] = field(default_factory=list)
    """Those that are scored and whose text is certain, an end token included: clients that score a
    prompt leave out the last token, whatever it is. Tokens of a stop text have no place."""
    ids: list[int] = field(default_factory=list)
    """All new tokens, those that end a text included."""


class Choice:
    """One choice, as it grows.

    Args:
        index: its number in the answer.
        prompt: what it continues.
        plan: of the request.
        tokenizer: the model's.
    """

    def __init__(self, index: int, prompt: Prompt, plan: Plan, tokenizer: Tokenizer) -> None:
        self.index, self.prompt = index, prompt
        self.text = ""
        self.generation: Generation | None = None
        """The result, when there is one."""
        self.cached_tokens = 0
        """Tokens of the prompt that were not read anew."""
        self._plan, self._tokenizer = plan, tokenizer
        self._decoder = tokenizer.decoder()
        self._decoded = 0
        """Characters of all tokens so far, those of a stop text included."""
        self._held: list[ScoredToken] = []
        self._delta = Delta()
        if plan.echo:
            self._delta.text = self.text = prompt.text
        self._before = len(self.text)

    def take(self, event: PromptRead | Token | Finished | Failed) -> None:
        """Add what the engine tells.

        Raises:
            Refusal: the job has failed, or was cancelled.
        """
        if isinstance(event, Token):
            self._take_token(event)
        elif isinstance(event, PromptRead):
            self.cached_tokens = event.cached_tokens
            if self._plan.echo and self._plan.alternatives is not None:
                self._take_prompt(event.scores)
        elif isinstance(event, Finished):
            self._finish(event.generation)
        elif self._plan.constrained and isinstance(event.error, GenerationError):
            # A grammar may turn out to be too large, or without an end, as it is followed.
            raise refusal_of(event.error, "response_format")
        else:
            raise failure_of(event.error)

    def delta(self) -> Delta:
        """What has become certain since the last call."""
        delta, self._delta = self._delta, Delta()
        return delta

    @property
    def reason(self) -> str | None:
        """The reason for the end in OpenAI's words: "stop" or "length"."""
        if self.generation is None:
            return None
        return "stop" if self.generation.finish_reason in ("eos", "stop") else "length"

    @property
    def stop_reason(self) -> str | int | None:
        """The stop text or the token of stop_token_ids that ended it; "time" where a limit of time
        did; otherwise None."""
        done = self.generation
        if done is None or done.finish_reason == "length":
            return None
        if done.finish_reason == "time":
            return "time"
        if done.finish_reason == "eos":
            last = done.tokens[-1]
            return last if last in self._plan.stop_tokens else None
        rest = self._tokenizer.decode([token for token in done.tokens if token in self._tokenizer])[
            len(done.text) :
        ]
        return next((stop for stop in self._plan.stops if rest.startswith(stop)), None)

    @property
    def mean_logprob(self) -> float:
        """What best_of compares."""
        assert self.generation is not None
        scores = self.generation.logprobs or [0.0]
        return sum(scores) / len(scores)

    def _take_prompt(self, scores: Scores | None) -> None:
        decoder, place = self._tokenizer.decoder(), 0
        logprobs: Sequence[float | None] = [None, *(scores.logprobs if scores else ())]
        tops: Sequence[dict[int, float] | None] = [None, *(scores.top if scores else ())]
        places = enumerate(self.prompt.tokens)
        for number, id in list(places)[self.prompt.unwritten :]:
            end = place + len(decoder.push(id))
            top = tops[number] if number < len(tops) else {}
            self._delta.tokens.append(ScoredToken(id, place, end, logprobs[number], top))
            place = end

    def _take_token(self, event: Token) -> None:
        self._delta.ids.append(event.token)
        self._delta.text += event.piece
        self.text += event.piece
        if event.scores is None or self._plan.alternatives is None:
            return
        begin = self._decoded
        if event.token in self._tokenizer:
            self._decoded += len(self._decoder.push(event.token))
        top = event.scores.top[0] if event.scores.top else {}
        before = self._before
        self._held.append(
            ScoredToken(
                event.token, before + begin, before + self._decoded, event.scores.logprobs[0], top
            )
        )
        certain = len(self.text)
        while self._held and self._held[0].begin < certain and self._held[0].end <= certain:
            self._delta.tokens.append(self._held.pop(0))

    def _finish(self, generation: Generation) -> None:
        if generation.finish_reason == "cancelled":
            raise unavailable("the request was cancelled")
        if generation.finish_reason == "time" and not generation.tokens:
            raise unavailable(
                "the request waited in the queue for as long as an answer may take: try again "
                "later, or ask another server"
            )
        self.generation = generation
        rest = generation.text[len(self.text) - self._before :]
        self._delta.text += rest
        self.text += rest
        held, self._held = self._held, []
        if generation.finish_reason == "stop":
            held = [token for token in held if token.begin < len(self.text)]
        self._delta.tokens += held


class Answer:
    """All choices of a request.

    Args:
        plan: of it.
        tokenizer: the model's.
    """

    def __init__(self, plan: Plan, tokenizer: Tokenizer) -> None:
        self._plan = plan
        self.all = [
            Choice(number, plan.prompts[number // plan.copies], plan, tokenizer)
            for number in range(len(plan.jobs))
        ]

    def take(self, told: Sequence[Told]) -> list[Choice]:
        """Add events; returns the choices that they are about."""
        changed = {}
        for number, event, _ in told:
            self.all[number].take(event)
            changed[number] = self.all[number]
        return list(changed.values())

    def best(self) -> list[Choice]:
        """The choices to answer with, numbered from 0."""
        copies, wanted = self._plan.copies, self._plan.wanted
        found: list[Choice] = []
        for first in range(0, len(self.all), copies):
            group = self.all[first : first + copies]
            if wanted < copies:
                group = sorted(group, key=lambda choice: -choice.mean_logprob)[:wanted]
            found += group
        for index, choice in enumerate(found):
            choice.index = index
        return found

    def usage(self) -> dict[str, Any]:
        """The tokens of prompts, each counted once, and of all choices, those left out too."""
        prompt = sum(len(each.tokens) for each in self._plan.prompts)
        new = sum(len(each.generation.tokens) for each in self.all if each.generation is not None)
        cached = sum(
            choice.cached_tokens for choice in self.all[:: self._plan.copies]
        )  # of the first copy: the others always find what that one has read
        return {
            "prompt_tokens": prompt,
            "completion_tokens": new,
            "total_tokens": prompt + new,
            "prompt_tokens_details": {"cached_tokens": cached},
        }


def completion_logprobs(tokens: Sequence[ScoredToken], names: TokenNames) -> dict[str, Any]:
    """Log-probabilities in the form of /v1/completions."""
    return {
        "text_offset": [token.begin for token in tokens],
        "token_logprobs": [finite(token.logprob) for token in tokens],
        "tokens": [names[token.id] for token in tokens],
        "top_logprobs": [_named(token, names) for token in tokens],
    }


def chat_logprobs(tokens: Sequence[ScoredToken], names: TokenNames) -> dict[str, Any]:
    """Log-probabilities in the form of /v1/chat/completions."""

    def one(id: int, logprob: float | None) -> dict[str, Any]:
        return {
            "token": names[id],
            "logprob": finite(logprob),
            "bytes": list(names.bytes_of(id)),
        }

    content = [
        {
            **one(token.id, token.logprob),
            "top_logprobs": [one(id, value) for id, value in (token.top or {}).items()],
        }
        for token in tokens
    ]
    return {"content": content, "refusal": None}


def finite(logprob: float | None) -> float | None:
    """A log-probability that JSON can hold."""
    return None if logprob is None else max(logprob, _LEAST)


def _named(token: ScoredToken, names: TokenNames) -> dict[str, float | None] | None:
    """The likeliest tokens in a place, and the one that stands there."""
    if token.logprob is None or token.top is None:
        return None
    found = {names[id]: finite(value) for id, value in token.top.items()}
    found.setdefault(names[token.id], finite(token.logprob))
    return found
