"""The engine that runs many jobs at once: continuous batching over a paged cache.

A step reads one token of every text that is being continued and, beside them, some tokens of the
prompts that wait, so that nobody stalls. Jobs join and leave between steps. Keys and values are in
pages (vLLM: Kwon et al., 2023), which texts that begin alike share. Where pages run out, the
youngest job gives its own back and reads its tokens again later.

What a job gets depends on its tokens, its options and its draw alone: not on the jobs beside it, on
what was cached, or on when it was set back.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Any

import torch

from ..._system.memory import available
from ...errors import EngineBusy, GenerationError, reason_of
from ...model import GPT2
from ...tokenizer import Tokenizer
from ..continuation import Generation
from ..engine import decoder_of
from ..generation import check_length, check_vocabulary
from ..processors import check_ids
from ..sampling import Draw, draw_seed
from ..speculation.drafter import Drafter
from .events import Event
from .job import Job, Ticket
from .models import step_model
from .pages import pages_of
from .row import ENDED, Row
from .scheduler import Scheduler
from .worker import Worker

_SHARE = 0.5
"""Most of the memory that is available for the cache, unless its size is given."""
_PAUSE = 0.05
"""Seconds between two looks at what else there is to do."""


@dataclass(frozen=True)
class EngineStats:
    """An engine's state and its counts since it was made."""

    running: int
    """Jobs whose texts are in the cache."""
    waiting: int
    """Jobs that are not running yet, or had to give their pages back."""
    pages_used: int
    """Pages that running jobs hold."""
    pages_cached: int
    """Pages that no job holds, kept for prompts that begin alike."""
    pages_total: int
    page_size: int
    """Tokens in a page."""
    cache_bytes: int
    """Bytes of all pages together."""
    prefix_hit_tokens: int
    """Tokens of prompts that were not read, since their keys and values were cached."""
    prompt_tokens: int
    """Tokens of all prompts that have been read, those found in the cache included."""
    generated_tokens: int
    steps: int
    """Steps of the model."""
    preemptions: int
    """How often a job had to give its pages back."""
    drafted_tokens: int
    """Proposed tokens that were verified."""
    accepted_tokens: int
    """Those of them that were right."""


class BatchEngine:
    """Runs many jobs at once; see the module.

        engine = BatchEngine(model, tokenizer)
        engine.start()
        ticket = engine.submit(Job(tokens, request))
        generation = ticket.result()

    Without `start`, `step` and `run` do the work in the caller's thread. The weights must not
    change while an engine has them.

    Args:
        model, tokenizer: a pair. A GPT2 whose weights can be packed is; any other, on a GPU or with
            hooks, runs through its modules, which is slower.
        cache_tokens: tokens whose keys and values fit the cache, which is allocated here; rounded
            up to pages. None: `n_positions` for each of `max_rows`, or as many as half of the
            memory that is available holds. `stats().cache_bytes` says what that is; on the CPU the
            system hands it over as pages are first used.
        page_size: tokens in a page, a multiple of 16.
        max_rows: most jobs that run at once.
        chunk_tokens: most tokens of prompts in one step, for all prompts together.
        queue_limit: most jobs that wait; None: any number.
        share_prefixes: keep the pages of prompts, and let prompts that begin alike share them.
        drafter: proposes tokens, which a step verifies; the engine's own from now on. It is not
            asked where steps run through modules, for which several tokens in one step may round
            otherwise than one by one. None: nothing is proposed.

    Raises:
        GenerationError: a size out of its range, or a cache that memory does not hold.
    """

    def __init__(
        self,
        model: GPT2,
        tokenizer: Any,
        *,
        cache_tokens: int | None = None,
        page_size: int = 32,
        max_rows: int = 64,
        chunk_tokens: int = 256,
        queue_limit: int | None = None,
        share_prefixes: bool = True,
        drafter: Drafter | None = None,
    ):
        if type(page_size) is not int or page_size < 16 or page_size % 16:
            raise GenerationError(f"page_size is {page_size!r}; it must be a multiple of 16")
        for name, value in (
            ("cache_tokens", cache_tokens),
            ("max_rows", max_rows),
            ("chunk_tokens", chunk_tokens),
            ("queue_limit", queue_limit),
        ):
            may_be_off = name in ("cache_tokens", "queue_limit")
            if (value is None and may_be_off) or (type(value) is int and value >= 1):
                continue
            raise GenerationError(
                f"{name} is {value!r}; it must be a whole number of at least 1"
                + (", or None" if may_be_off else "")
            )
        self.model = model
        self.tokenizer = Tokenizer.of(tokenizer)
        self._size, self._max_rows = page_size, max_rows
        chunk = max(page_size, chunk_tokens // page_size * page_size)
        self._queue_limit = queue_limit
        self._allowed = min(self.tokenizer.vocab_size, model.config.vocab_size)
        decoder = decoder_of(model)
        entry_bytes = decoder.new_cache(1, 1).entry_bytes
        if cache_tokens is None:
            tokens = _default_tokens(model, entry_bytes, max_rows)
        else:
            tokens = cache_tokens
        pages = pages_of(tokens, page_size)
        self._cache_bytes = pages * page_size * entry_bytes
        try:
            steps = step_model(decoder, pages, page_size, chunk)
        except (MemoryError, OSError, RuntimeError) as error:
            raise GenerationError(
                f"a cache of {pages * page_size} tokens takes {self._cache_bytes:,} bytes, which "
                f"cannot be allocated ({reason_of(error)}): set cache_tokens to fewer"
            ) from error
        columns = pages_of(model.config.n_positions, page_size)
        scheduler = Scheduler(steps, pages, page_size, columns, max_rows, chunk, share_prefixes)
        self._worker = Worker(steps, scheduler, drafter, self._allowed, model.device)
        self._next_id = 0
        self._stepping = threading.Lock()
        self._changed = threading.Condition()
        """Guards what follows, and is notified when it changes."""
        self._arrived: deque[Row] = deque()
        self._withdrawn: deque[Ticket] = deque()
        self._thread: threading.Thread | None = None
        self._closed = self._stopping = False

    # Jobs

    def submit(self, job: Job, listener: Callable[[Event], Any] | None = None) -> Ticket:
        """Queue a job. Any thread may call this.

        Args:
            job: what to do.
            listener: called with each event of the job, in order, from the thread that takes the
                steps; it must not block, and an exception of its own ends the job with it. None:
                the ticket keeps the events.

        Raises:
            EngineBusy: `queue_limit` jobs wait already, or the engine is closed.
            GenerationError: a job that does not fit the model or the cache.
        """
        return self._submit(job, listener, recorded=True)

    def _submit(
        self, job: Job, listener: Callable[[Event], Any] | None, *, recorded: bool
    ) -> Ticket:
        limit = self._check(job)
        options = job.request.options
        draw = None
        if options.samples:
            draw = job.draw
            if draw is None:
                draw = Draw(draw_seed() if options.seed is None else options.seed, 0)
        self._refuse_if_busy()
        with self._changed:
            ticket = Ticket(self._next_id, self, listener, recorded)
            self._next_id += 1
        row = Row(
            job, ticket, limit, draw, self.tokenizer, self._allowed, self._size, self.model.device
        )
        with self._changed:
            self._refuse_if_busy()
            self._arrived.append(row)
            self._changed.notify_all()
        return ticket

    def _refuse_if_busy(self) -> None:
        if self._closed:
            raise EngineBusy("the engine is closed and takes no more jobs")
        waiting = self._waiting
        if self._queue_limit is not None and waiting >= self._queue_limit:
            raise EngineBusy(
                f"{waiting} jobs wait already, and the queue's limit is {self._queue_limit}: "
                "try again later"
            )

    def _check(self, job: Job) -> int:
        """The most new tokens of a job; raises a GenerationError for one that cannot be run."""
        options = job.request.options
        if options.num_beams != 1 or options.num_return_sequences != 1:
            raise GenerationError(
                f"a job is one continuation chosen token by token, and num_beams is "
                f"{options.num_beams}, num_return_sequences {options.num_return_sequences}: submit "
                "a job for each sample; beam search has Generator"
            )
        if options.contrastive:
            raise GenerationError(
                f"penalty_alpha is {options.penalty_alpha}: the engine has no contrastive search, "
                "which compares hidden states; Generator has it"
            )
        if job.request.grammar is not None:
            job.request.grammar.check_tokenizer(self.tokenizer)
        count = len(job.tokens)
        if count == 0:
            raise GenerationError("the prompt has no token: give at least one")
        check_vocabulary(self.model, list(job.tokens), "the prompt", self.tokenizer)
        check_ids(options, self.model.config.vocab_size)
        limit = options.new_tokens(count, "the prompt")
        check_length(self.model, count, limit, "the prompt", options.max_length)
        most = self._worker.scheduler.pool.total * self._size
        entries = count + max(limit - 1, 0)
        if entries > most:
            raise GenerationError(
                f"the prompt has {count} tokens and {limit} new ones are asked for; the engine's "
                f"cache holds {most} tokens: raise cache_tokens, or ask for fewer"
            )
        alternatives = job.prompt_alternatives
        if alternatives is not None and not 0 <= alternatives <= self.model.config.vocab_size:
            raise GenerationError(
                f"prompt_alternatives is {alternatives!r}; it must be in 0 .. "
                f"{self.model.config.vocab_size}, the model's vocab_size"
            )
        return limit

    def withdraw(self, ticket: Ticket) -> None:
        """Cancel a job; `Ticket.cancel` calls this."""
        with self._changed:
            self._withdrawn.append(ticket)
            self._changed.notify_all()

    def run(self, jobs: Iterable[Job]) -> Iterator[Generation]:
        """Carry out jobs; yields their results in their order.

        Jobs are taken from the iterable as there is room for them, so that it may be long. Where no
        thread has been started, the steps are taken here. Jobs that are still open when the
        iterator is closed are cancelled.

        Raises:
            Exception: the error of a job that has failed, in its place.
        """
        open_tickets: deque[Ticket] = deque()
        ahead = 2 * self._max_rows
        if self._queue_limit is not None:
            ahead = min(ahead, self._queue_limit)
        source = iter(jobs)
        exhausted = False
        try:
            while True:
                while not exhausted and sum(not each.done for each in open_tickets) < ahead:
                    try:
                        job = next(source)
                    except StopIteration:
                        exhausted = True
                        break
                    open_tickets.append(self._submit(job, None, recorded=False))
                if not open_tickets:
                    return
                while not open_tickets[0].done:
                    if self.started:
                        try:
                            open_tickets[0].result(timeout=_PAUSE)
                        except TimeoutError:
                            pass
                        except Exception:  # raised in its turn below
                            break
                    else:
                        self.step()
                    if not exhausted:
                        break
                if open_tickets[0].done:
                    yield open_tickets.popleft().result()
        finally:
            for ticket in open_tickets:
                ticket.cancel()
            if not self.started:
                with self._stepping:
                    self._take_messages()

    # Threads

    @property
    def started(self) -> bool:
        """True while the engine's own thread takes the steps."""
        return self._thread is not None

    def start(self) -> None:
        """Take the steps in a thread of the engine's own, until `close`."""
        with self._changed:
            if self._closed:
                raise GenerationError("the engine is closed: make another one")
            if self._thread is not None:
                return
            self._thread = threading.Thread(target=self._serve, name="BatchEngine", daemon=True)
            self._thread.start()

    def close(self, grace: float = 0.0) -> None:
        """Take no more jobs, and end those that there are. Not to be called from a listener.

        Args:
            grace: seconds in which they may finish; what is not done then is cancelled.
        """
        end = time.monotonic() + grace
        with self._changed:
            self._closed = True
        thread = self._thread
        if thread is None:
            while time.monotonic() < end and self.step():
                pass
        else:
            with self._changed:
                self._changed.wait_for(lambda: not self._is_occupied(), timeout=grace)
                self._stopping = True
                self._changed.notify_all()
            thread.join()
            self._thread = None
        with self._stepping:
            self._take_messages()
            self._worker.end_all(lambda row: self._worker.finish(row, "cancelled"))

    def __enter__(self) -> BatchEngine:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _is_occupied(self) -> bool:
        return bool(self._arrived or self._withdrawn or self._worker.scheduler.jobs)

    @property
    def _waiting(self) -> int:
        """Jobs that wait, those that have just arrived included."""
        return len(self._arrived) + len(self._worker.scheduler.waiting)

    def _serve(self) -> None:
        while not self._stopping:
            try:
                if self.step():
                    continue
            except Exception as error:
                # Nobody else would hear of it, and the jobs would wait forever.
                with self._stepping:
                    self._take_messages()
                    self._worker.end_all(partial(self._worker.fail, error=error))
                continue
            with self._changed:
                self._changed.notify_all()  # close() waits for the last job
                self._changed.wait_for(lambda: self._arrived or self._withdrawn or self._stopping)

    def stats(self) -> EngineStats:
        """The engine's state and its counts."""
        scheduler, pool = self._worker.scheduler, self._worker.scheduler.pool
        return EngineStats(
            running=len(scheduler.running),
            waiting=self._waiting,
            pages_used=pool.used,
            pages_cached=pool.cached,
            pages_total=pool.total,
            page_size=self._size,
            cache_bytes=self._cache_bytes,
            preemptions=scheduler.preemptions,
            **vars(self._worker.counts),
        )

    # A step

    def step(self) -> bool:
        """Take one step of the model for all that runs; False if there is nothing to do.

        Not to be called from a listener.
        """
        with self._stepping, torch.inference_mode():
            self._take_messages()
            return self._worker.step()

    def _take_messages(self) -> None:
        """Queue the jobs that have arrived, and end those that were cancelled."""
        with self._changed:
            arrived, withdrawn = list(self._arrived), list(self._withdrawn)
            for row in arrived:
                self._worker.add(row)
            self._arrived.clear()
            self._withdrawn.clear()
        for ticket in withdrawn:
            self._worker.cancel(ticket)
        for row in arrived:
            if row.limit == 0 and row.prompt_scores is None and row.state != ENDED:
                self._worker.finish(row, "length")


def _default_tokens(model: GPT2, entry_bytes: int, max_rows: int) -> int:
    """Tokens of a cache whose size is not given; see `BatchEngine`."""
    room = model.config.n_positions
    free = available(model.device)
    wanted = max_rows * room
    if free is None:
        return wanted
    return max(room, min(wanted, int(free * _SHARE) // entry_bytes))
