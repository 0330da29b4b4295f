"""Requests carried out by a `BatchEngine`: with speculation, or many with options of their own.

The tokens are those of `completion.Completer`, which carries out what the engine does not: beam
search, and texts that outgrow the model.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..errors import Error
from ..model import GPT2
from ..tokenizer import Tokenizer
from .batching import BatchEngine, Event, Finished, Job, Ticket, Token
from .continuation import Generation, Request
from .decoding import Step, Timing
from .engine import decoder_of
from .sampling import Draw
from .speculation import Drafter
from .window import Window

_ROWS = 32
"""Continuations that a call runs at once."""
_BATCH_ROWS = 64
"""Continuations that `JobRunner.each` runs at once."""
_MOST_WAITING = 4 * _BATCH_ROWS
"""Prompts that it has taken and not given out yet, at most."""
_PAGE = 32
"""Tokens in a page of the engine's cache."""


@dataclass(frozen=True)
class Ask:
    """A prompt to continue, and how."""

    text: str
    tokens: list[int]
    request: Request
    draw: Draw | None
    """Of its first continuation; None where nothing is drawn."""


class JobRunner:
    """Carries out requests with an engine of its own for each call.

    Args:
        model, tokenizer: a pair.
        window: treatment of long texts.
        drafter: proposes tokens; None: no speculation.
    """

    def __init__(
        self, model: GPT2, tokenizer: Tokenizer, window: Window, drafter: Drafter | None = None
    ):
        self._model, self._tokenizer, self._window = model, tokenizer, window
        self._drafter = drafter

    def can_run(self, request: Request, tokens: int) -> bool:
        """True if the engine carries this out: token by token, within the model's positions.

        Args:
            request: what is asked for.
            tokens: length of the prompt.
        """
        options, room = request.options, self._model.config.n_positions
        if options.num_beams > 1 or options.contrastive or options.max_new_tokens == 0:
            return False
        if options.max_length is not None and tokens >= options.max_length:
            return False  # an error, which the other path raises
        return tokens + self._limit(request, tokens) <= room

    def continue_all(self, asks: Sequence[Ask], timing: Timing | None) -> Iterator[Generation]:
        """All continuations of every prompt, in their order.

        Args:
            asks: all of which `can_run`.
            timing: filled in as it goes on.
        """
        jobs = [job for ask in asks for job in self._jobs(ask)]
        to_come = deque(jobs)
        tickets: deque[Ticket] = deque()
        with self._engine(jobs) as engine:
            clock = _Clock(engine, self._model, timing)
            while to_come or tickets:
                # One that waited in the engine's queue would lose that time of its max_time.
                for _ in range(min(len(to_come), _ROWS - _unfinished(tickets))):
                    tickets.append(engine.submit(to_come.popleft(), _ignore))
                if tickets[0].done:
                    yield tickets.popleft().result()
                else:
                    clock.step()

    def steps(self, ask: Ask, timing: Timing | None) -> Iterator[Step]:
        """The steps of one continuation, as `Completer.steps` gives them.

        Args:
            ask: which `can_run`.
            timing: filled in as it goes on.
        """
        (job,) = self._jobs(ask)
        events: deque[Event] = deque()
        with self._engine([job]) as engine:
            clock = _Clock(engine, self._model, timing)
            ticket = engine.submit(job, events.append)
            while not ticket.done or events:
                while not events:
                    clock.step()
                yield from _as_steps(events)
            ticket.result()  # raises what it has failed with

    def each(
        self,
        asks: Iterable[Ask | Error],
        otherwise: Callable[[Ask], list[Generation]],
        timing: Timing | None,
    ) -> Iterator[list[Generation] | Error]:
        """The continuations of each prompt, or its error, in their order.

        Args:
            asks: taken as there is room for them; an error stands for itself.
            otherwise: carries out what the engine does not.
            timing: filled in as it goes on.
        """
        source = iter(asks)
        exhausted = False
        waiting: deque[Ask | Error | list[Ticket]] = deque()
        with BatchEngine(
            self._model, self._tokenizer, max_rows=_BATCH_ROWS, **self._speculation
        ) as engine:
            clock = _Clock(engine, self._model, timing)
            while True:
                while (
                    not exhausted
                    and len(waiting) < _MOST_WAITING
                    and _unfinished(_tickets(waiting)) < _BATCH_ROWS
                ):
                    ask = next(source, None)
                    if ask is None:
                        exhausted = True
                    elif isinstance(ask, Error) or not self.can_run(ask.request, len(ask.tokens)):
                        waiting.append(ask)
                    else:
                        try:
                            jobs = self._jobs(ask)
                            waiting.append([engine.submit(job, _ignore) for job in jobs])
                        except Error as error:
                            waiting.append(error)
                if not waiting:
                    return
                first = waiting[0]
                if isinstance(first, list) and not all(ticket.done for ticket in first):
                    clock.step()
                    continue
                waiting.popleft()
                yield first if isinstance(first, Error) else _result(first, otherwise)

    def _limit(self, request: Request, tokens: int) -> int:
        """Most new tokens of a prompt of so many."""
        new = request.options.new_tokens(tokens, "the prompt")
        return self._window.limit(new, tokens, self._model.config.n_positions)

    def _jobs(self, ask: Ask) -> list[Job]:
        """The continuations of a prompt, each of which is a job."""
        options = ask.request.options
        limit = self._limit(ask.request, len(ask.tokens))
        single = replace(
            options,
            num_return_sequences=1,
            max_length=None,
            max_new_tokens=limit,
            min_new_tokens=options.min_new_tokens and min(options.min_new_tokens, limit),
        )
        request = replace(ask.request, options=single)
        return [
            Job(
                ask.tokens,
                request,
                ask.text,
                None if ask.draw is None else ask.draw.after(sample),
                speculate=self._drafter is not None,
            )
            for sample in range(options.num_return_sequences)
        ]

    @property
    def _speculation(self) -> dict[str, Any]:
        return {} if self._drafter is None else {"drafter": self._drafter}

    def _engine(self, jobs: Sequence[Job]) -> BatchEngine:
        """An engine with a cache for these jobs, `_ROWS` of them at once."""
        rows = min(len(jobs), _ROWS)
        longest = max(
            len(job.tokens) + job.request.options.new_tokens(len(job.tokens), "the prompt")
            for job in jobs
        )
        return BatchEngine(
            self._model,
            self._tokenizer,
            cache_tokens=rows * -(-longest // _PAGE) * _PAGE,
            page_size=_PAGE,
            max_rows=rows,
            **self._speculation,
        )


class _Clock:
    """Takes an engine's steps, and counts their time.

    A step in which a prompt is read to its end counts as prefill, like those before it that gave no
    token.
    """

    def __init__(self, engine: BatchEngine, model: GPT2, timing: Timing | None):
        self._engine, self._timing = engine, timing
        self._weights = decoder_of(model).weight_bytes if timing is not None else 0
        self._before = engine.stats()
        self._reading = 0.0
        """Seconds of the steps since a prompt was begun, none of which has ended one."""

    def step(self) -> None:
        """Take a step."""
        timing = self._timing
        if timing is None:
            self._engine.step()
            return
        begun = time.perf_counter()
        self._engine.step()
        seconds = time.perf_counter() - begun
        before, after = self._before, self._engine.stats()
        self._before = after
        read = after.prompt_tokens - before.prompt_tokens
        tokens = after.generated_tokens - before.generated_tokens
        if read:
            timing.add_prefill(self._reading + seconds, [range(read)])
            self._reading = 0.0
        elif tokens:
            cached = after.cache_bytes * after.pages_used // after.pages_total
            timing.add_step(seconds, tokens, self._weights + cached)
        else:
            self._reading += seconds


def _as_steps(events: deque[Event]) -> Iterator[Step]:
    """The steps that some events tell of; takes them all."""
    while events:
        event = events.popleft()
        reason = None
        if isinstance(event, Token):
            if events and isinstance(events[0], Finished):
                reason = events.popleft().generation.finish_reason  # type: ignore[union-attr]
            yield Step([0], [event.token], [reason], event.scores)
        elif isinstance(event, Finished):  # its time was over before another token came
            yield Step([], [], [event.generation.finish_reason], None)


def _unfinished(tickets: Iterable[Ticket]) -> int:
    """Number of continuations that an engine has still to work on."""
    return sum(not ticket.done for ticket in tickets)


def _tickets(waiting: Iterable[Any]) -> Iterator[Ticket]:
    """The tickets among what waits to be given out."""
    return (ticket for one in waiting if isinstance(one, list) for ticket in one)


def _result(
    first: Ask | list[Ticket], otherwise: Callable[[Ask], list[Generation]]
) -> list[Generation] | Error:
    """The continuations of a prompt that is done, or can only be done otherwise."""
    try:
        return otherwise(first) if isinstance(first, Ask) else [one.result() for one in first]
    except Error as error:
        return error


def _ignore(event: Event) -> None:
    """A listener, so that the ticket keeps no events."""
