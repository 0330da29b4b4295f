"""From the fields of a request to jobs of the engine."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from ..errors import Error
from ..inference.batching import Job
from ..inference.continuation import Request
from ..inference.generation import beginning, check_vocabulary
from ..inference.generator import Generator
from ..inference.grammar import Grammar
from ..inference.requests import make_request
from ..inference.sampling import Draws
from ..inference.stopping import StopCriteria
from ..sampling import PROCESSORS, STEPWISE
from .failures import Refusal, refusal_of
from .parameters import Parameters

_SHORT_TEXT = 4096
"""Characters that are turned into tokens at once; a longer text goes to a thread."""
_ANY_JSON = {"type": "object"}

Result = TypeVar("Result")


@dataclass(frozen=True)
class Prompt:
    """A text to continue."""

    text: str
    tokens: list[int]
    """What the model reads, at least one token."""
    unwritten: int = 0
    """Tokens at the beginning that the client has not written: an empty text follows one."""


@dataclass(frozen=True)
class Plan:
    """What a request asks the engine for."""

    prompts: list[Prompt]
    jobs: list[Job]
    """`copies` for each prompt, in the order of the prompts."""
    copies: int
    wanted: int
    """Choices to answer with for each prompt, the likeliest of its `copies`."""
    stops: list[str]
    stop_tokens: frozenset[int]
    alternatives: int | None
    """Alternatives to name in the place of each token; None: no log-probabilities."""
    echo: bool
    token_ids: bool
    """Token ids are part of the answer."""
    constrained: bool
    """Texts have to fit a grammar of the client's."""


class Planner:
    """Makes plans for one model.

    Args:
        generator: the model and its tokenizer.
        parameters: of requests.
        pool: threads for what takes long: tokens of long texts, grammars.
    """

    def __init__(self, generator: Generator, parameters: Parameters, pool: Executor) -> None:
        self._model, self._tokenizer = generator.model, generator.tokenizer
        self._parameters, self._pool = parameters, pool
        self._room: int = self._model.config.n_positions

    async def in_thread(self, call: Callable[..., Result], *arguments: Any) -> Result:
        """The result of a call that other requests need not wait for."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._pool, call, *arguments)

    async def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text."""
        if len(text) <= _SHORT_TEXT:
            return self._tokenizer.encode(text, add_special_tokens)
        return await self.in_thread(self._tokenizer.encode, text, add_special_tokens)

    async def prompts(self, given: Sequence[str | list[int]], name: str) -> list[Prompt]:
        """The prompts of a checked field, at most `max_prompt_tokens` long."""
        found = []
        for place, content in enumerate(given):
            param = name if len(given) == 1 else f"{name}[{place}]"
            prompt = await self._prompt(content, param)
            most = self._parameters.max_prompt_tokens
            if len(prompt.tokens) > most:
                raise _too_long(param, f"{len(prompt.tokens)}", most)
            found.append(prompt)
        return found

    async def _prompt(self, content: str | list[int], param: str) -> Prompt:
        try:
            if not isinstance(content, str):
                return Prompt(self._tokenizer.decode(content), content)
            tokens = await self.encode(content)
            check_vocabulary(self._model, tokens, param, self._tokenizer)
        except Error as error:
            raise refusal_of(error, param) from None
        if tokens:
            return Prompt(content, tokens)
        first = beginning(self._model)
        first = self._tokenizer.start_token_id if first is None else first
        if first is None:
            raise Refusal(
                f"{param} is empty, and this model has no token to begin with: give at least one "
                "character",
                param=param,
            )
        return Prompt(content, [first], unwritten=1)

    async def plan(
        self,
        prompts: list[Prompt],
        fields: dict[str, Any],
        *,
        max_tokens: int | None,
        usual: int,
        name: str,
        alternatives: int | None,
        deadline: float,
        stops: Sequence[str] = (),
    ) -> Plan:
        """The jobs of a request.

        Args:
            prompts: its texts.
            fields: of its body, checked.
            max_tokens: most new tokens, or None.
            usual: most new tokens where max_tokens is None; less where there is less room.
            name: the field of the prompts.
            alternatives: to name in the place of each token; None: no log-probabilities.
            deadline: of its jobs.
            stops: texts that end a choice, besides its own.
        """
        wanted = fields["n"]
        copies = fields.get("best_of") or wanted
        self._check_counts(fields, len(prompts), wanted, copies)
        stop_tokens = frozenset(fields["stop_token_ids"] or ())
        grammar = await self._grammar(fields["response_format"])
        all_stops = [*stops, *(fields["stop"] or ())]
        scored = 0 if alternatives is None and copies > wanted else alternatives
        echo = fields.get("echo", False)
        draws = Draws()
        jobs = []
        for place, prompt in enumerate(prompts):
            param = name if len(prompts) == 1 else f"{name}[{place}]"
            new_tokens = self._new_tokens(prompt, param, max_tokens, usual)
            request = self._request(fields, new_tokens, all_stops, stop_tokens, scored, grammar)
            job = Job(
                tokens=prompt.tokens,
                request=request,
                prompt=prompt.text,
                prompt_alternatives=alternatives if echo else None,
                deadline=deadline,
            )
            if request.options.samples:
                draw = draws.take(prompt.tokens, fields["seed"], copies)
                jobs += [replace(job, draw=draw.after(copy)) for copy in range(copies)]
            else:
                jobs += [job] * copies
        return Plan(
            prompts, jobs, copies, wanted, all_stops, stop_tokens, alternatives, echo,
            fields["return_token_ids"],
            grammar is not None,
        )  # fmt: skip

    def _check_counts(self, fields: dict[str, Any], prompts: int, wanted: int, copies: int) -> None:
        if copies < wanted:
            raise Refusal(
                f"best_of is {copies}, less than n ({wanted}): raise best_of, or leave it out",
                param="best_of",
            )
        if copies > wanted and fields["stream"]:
            raise Refusal(
                f"best_of is {copies} and n is {wanted}: which choices are best is known at the "
                "end only; leave out stream or best_of",
                param="best_of",
            )
        if fields["stream_options"] is not None and not fields["stream"]:
            raise Refusal(
                "stream_options is there, and stream is not true: leave out one, or add the other",
                param="stream_options",
            )
        most = self._parameters.max_choices
        if prompts * copies > most:
            raise Refusal(
                f"{prompts} prompts with {copies} choices each are {prompts * copies}; one request "
                f"may have {most} (the server's max_choices): send several",
                param="n",
            )

    def _new_tokens(self, prompt: Prompt, param: str, max_tokens: int | None, usual: int) -> int:
        left = self._room - len(prompt.tokens)
        if max_tokens is None and left > 0:
            return min(usual, left)
        if max_tokens is None or max_tokens > left:
            asked = 1 if max_tokens is None else max_tokens
            raise _too_long(
                param, f"{len(prompt.tokens)} and max_tokens is {asked}, together "
                f"{len(prompt.tokens) + asked}", self._room,
            )  # fmt: skip
        return max_tokens

    def _request(
        self,
        fields: dict[str, Any],
        new_tokens: int,
        stops: list[str],
        stop_tokens: frozenset[int],
        alternatives: int | None,
        grammar: Grammar | None,
    ) -> Request:
        least = fields["min_tokens"] or 0
        if least > new_tokens:
            raise Refusal(
                f"min_tokens is {least}, and no more than {new_tokens} new tokens may come: lower "
                "it, or raise max_tokens",
                param="min_tokens",
            )
        try:
            request = make_request(
                self._model,
                self._tokenizer,
                logprobs=alternatives is not None,
                top_logprobs=alternatives or 0,
                max_new_tokens=new_tokens,
                max_length=None,
                max_time=None,
                min_new_tokens=least or None,
                do_sample=True,
                seed=fields["seed"],
                logit_bias=fields["logit_bias"],
                **{name: fields.get(name) for name in (*PROCESSORS, *STEPWISE)},
            )
        except Error as error:
            first = str(error).partition(" ")[0]
            raise refusal_of(error, first if first in fields else None) from None
        ends = [] if fields["ignore_eos"] else request.criteria.eos
        # Like end tokens, and unlike sequences of tokens, these are left out of the text.
        ends = [*ends, *sorted(stop_tokens - {*ends})]
        criteria = StopCriteria(ends, stops, self._tokenizer)
        return replace(request, criteria=criteria, grammar=grammar)

    async def _grammar(self, form: dict[str, Any] | None) -> Grammar | None:
        if form is None or form["type"] == "text":
            return None
        kind = form["type"]
        make: Callable[..., Grammar]
        if kind == "json_object":
            make, content = Grammar.json_schema, _ANY_JSON
        elif kind == "json_schema":
            make, content = Grammar.json_schema, form[kind]["schema"]
        elif kind == "regex":
            make, content = Grammar.regex, form[kind]
        elif kind == "choice":
            make, content = Grammar.choices, form["choices"]
        else:
            make, content = Grammar.lark, form[kind]
        try:
            return await self.in_thread(make, content, self._tokenizer)
        except Error as error:
            raise refusal_of(error, "response_format") from None


def _too_long(param: str, tokens: str, most: int) -> Refusal:
    return Refusal(
        f"tokens of {param}: {tokens}; {most} are the most: shorten it, or ask for fewer tokens",
        param=param,
        code="context_length_exceeded",
    )
