"""Jobs of a request in the engine: events out of its thread into the event loop."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial

from ..errors import EngineBusy
from ..inference.batching import BatchEngine, Event, Failed, Finished, Job, Ticket, Token
from .failures import Refusal, overloaded, unavailable
from .metrics import Metrics

Told = tuple[int, Event, float]
"""Number of a job in its request, what it tells, and when (time.perf_counter)."""


class Bridge:
    """Hands events of the engine's thread to submissions in the event loop, many at a time.

    Args:
        engine: already started.
        metrics: counts what happens.
        max_unread: events that may wait in a submission.
    """

    def __init__(self, engine: BatchEngine, metrics: Metrics, max_unread: int) -> None:
        self.engine, self.metrics, self.max_unread = engine, metrics, max_unread
        self._told: deque[tuple[Submission, Told]] = deque()
        self._is_scheduled = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self.open: set[Submission] = set()
        """Submissions that have not ended."""

    def submit(self, jobs: Sequence[Job]) -> Submission:
        """Give jobs to the engine; all of them or, raising a `Refusal`, none."""
        self._loop = asyncio.get_running_loop()
        submission = Submission(self, len(jobs))
        try:
            for number, job in enumerate(jobs):
                listener = partial(self._listen, submission, number)
                submission.tickets.append(self.engine.submit(job, listener))
        except EngineBusy as error:
            submission.cancel()
            raise overloaded(f"the server is busy: {error}", self._wait()) from None
        except BaseException:
            submission.cancel()
            raise
        self.open.add(submission)
        return submission

    def _wait(self) -> int:
        """Seconds after which trying again may succeed: the usual length of an answer."""
        return min(30, max(1, round(self.metrics.usual_seconds)))

    def _listen(self, submission: Submission, number: int, event: Event) -> None:
        """Called by the engine's thread."""
        self._told.append((submission, (number, event, time.perf_counter())))
        if not self._is_scheduled:
            self._is_scheduled = True
            assert self._loop is not None
            with suppress(RuntimeError):  # the loop has been closed
                self._loop.call_soon_threadsafe(self._hand_on)

    def _hand_on(self) -> None:
        # Before the queue is read: what is told from now on schedules another call.
        self._is_scheduled = False
        while self._told:
            submission, told = self._told.popleft()
            submission.take(told)


class Submission:
    """The jobs of one request.

    Args:
        bridge: which made it.
        count: number of jobs.
    """

    def __init__(self, bridge: Bridge, count: int) -> None:
        self.tickets: list[Ticket] = []
        self.cut: Callable[[], None] | None = None
        """Called where the client reads so slowly that too much waits for it."""
        self._bridge = bridge
        self._left = count
        self._told: list[Told] = []
        self._signal = asyncio.Event()
        self._start = time.perf_counter()
        self._newest: dict[int, float] = {}
        self._reason: Refusal | None = None

    def take(self, told: Told) -> None:
        """Keep an event for `events`."""
        number, event, when = told
        self._told.append(told)
        self._signal.set()
        metrics = self._bridge.metrics
        if isinstance(event, Token):
            before = self._newest.get(number)
            if before is None:
                metrics.first_token(when - self._start)
            else:
                metrics.next_token(when - before)
            self._newest[number] = when
        elif isinstance(event, Finished | Failed):
            self._left -= 1
            metrics.finished(event, when - self._start)
            if not self._left:
                self._bridge.open.discard(self)
        if self.cut is not None and len(self._told) > self._bridge.max_unread:
            self.stop(unavailable("the answer was read too slowly"))
            self.cut()

    async def events(self) -> list[Told]:
        """The events since the last call, at least one; [] where all jobs have ended.

        Raises:
            Refusal: the request was ended from outside, by `stop`.
        """
        while not self._told:
            if self._reason is not None:
                raise self._reason
            if not self._left:
                return []
            self._signal.clear()
            await self._signal.wait()
        if self._reason is not None:
            raise self._reason
        told, self._told = self._told, []
        return told

    def stop(self, reason: Refusal) -> None:
        """End the request with an error."""
        self._reason = reason
        self._signal.set()
        self.cancel()

    def cancel(self) -> None:
        """Cancel whatever still runs."""
        for ticket in self.tickets:
            ticket.cancel()
        self._bridge.open.discard(self)
