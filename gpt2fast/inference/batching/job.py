"""A job for the engine, and the ticket that its owner gets."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from threading import Event as Signal
from typing import Any, Protocol

from ..continuation import Generation, Request
from ..sampling import Draw
from .events import Event, Failed, Finished

_SHORT = 0.05
"""Seconds between two looks at whether the engine's thread has ended."""


@dataclass(frozen=True)
class Job:
    """One continuation of one prompt."""

    tokens: Sequence[int]
    """The prompt's ids, at least one."""
    request: Request
    """What is asked for; one continuation, token by token (no beams)."""
    prompt: str = ""
    """The prompt's text, for the result."""
    draw: Draw | None = None
    """The source of random numbers. None takes the first sample of the options' seed, or of a new
    seed."""
    prompt_alternatives: int | None = None
    """Score the prompt's tokens too, with this many of the likeliest ones in the place of each;
    None scores none, unless the request is for nothing else (`Request.scores_prompt`)."""
    deadline: float | None = None
    """A time of `time.monotonic()`: the job ends then, with the reason "time"."""
    speculate: bool = True
    """Verify the tokens that the engine's drafter proposes; the text is the same without."""


class Pump(Protocol):
    """What a ticket needs of its engine."""

    @property
    def started(self) -> bool:
        """True while a thread takes the steps."""

    def step(self) -> bool:
        """Take a step."""

    def withdraw(self, ticket: Ticket) -> None:
        """Cancel a job."""


class Ticket:
    """A job's owner's view of it. All methods can be called from any thread.

    Args:
        id: the job's number.
        engine: which carries it out.
        listener: called with each event; None keeps them for `events`.
        recorded: keep events where there is no listener.
    """

    def __init__(
        self, id: int, engine: Pump, listener: Callable[[Event], Any] | None, recorded: bool = True
    ):
        self.id = id
        self._engine, self._listener = engine, listener
        self._events: SimpleQueue[Event] | None = None
        if listener is None and recorded:
            self._events = SimpleQueue()
        self._ended = Signal()
        self._outcome: Finished | Failed | None = None

    @property
    def done(self) -> bool:
        """True once the job has finished, failed or been cancelled."""
        return self._ended.is_set()

    @property
    def watched(self) -> bool:
        """True if somebody may look at the events of single tokens."""
        return self._listener is not None or self._events is not None

    def cancel(self) -> None:
        """End the job, whatever state it is in: its result so far has the reason "cancelled".

        Memory is freed before the engine's next step. Nothing happens to a job that is done.
        """
        if not self.done:
            self._engine.withdraw(self)

    def result(self, timeout: float | None = None) -> Generation:
        """Wait for the end of the job. Without a thread of the engine's, steps are taken here.

        Args:
            timeout: most seconds to wait; None means any.

        Raises:
            TimeoutError: it has not ended in that time.
            Exception: the error that the job has failed with.
        """
        end = None if timeout is None else time.monotonic() + timeout
        while not self._ended.is_set():
            left = _SHORT if end is None else min(_SHORT, end - time.monotonic())
            if left <= 0:
                raise TimeoutError(f"job {self.id} has not ended in {timeout} s")
            if self._engine.started:
                self._ended.wait(left)
            else:
                self._engine.step()
        assert self._outcome is not None
        if isinstance(self._outcome, Failed):
            raise self._outcome.error
        return self._outcome.generation

    def events(self) -> Iterator[Event]:
        """The events of a job without a listener, as they come; the last one ends the iterator.

        Each event is given once, whoever asks.
        """
        assert self._events is not None, "the events of this job go to its listener"
        while True:
            try:
                event = self._events.get(timeout=_SHORT if self._engine.started else 0)
            except Empty:
                if self.done and self._events.empty():
                    return
                if not self._engine.started:
                    self._engine.step()
                continue
            yield event
            if isinstance(event, (Finished, Failed)):
                return

    def tell(self, event: Event) -> None:
        """Pass an event on; the engine calls this. What a listener raises is not caught."""
        if self._listener is not None:
            self._listener(event)
        elif self._events is not None:
            self._events.put(event)

    def close(self, outcome: Finished | Failed) -> None:
        """Note the end of the job, and tell it; the engine calls this."""
        if self._outcome is not None:
            return
        self._outcome = outcome
        try:
            self.tell(outcome)
        finally:
            self._ended.set()
