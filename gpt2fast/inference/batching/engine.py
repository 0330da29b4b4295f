"""The engine that runs many jobs at once: continuous batching over a paged cache.

A step reads one token of every text that is being continued and, beside them, some tokens of the
prompts that wait, so that nobody stalls. Jobs join and leave between steps. Keys and values are in
pages (vLLM: Kwon et al., 2023), which texts that begin alike share. Where pages run out, the
youngest job gives its own back and reads its tokens again later.

What a job gets depends on its tokens, its options and its draw alone: not on the jobs beside it, on
what was cached, or on when it was set back.
"""

from __future__ import annotations

import contextlib
import heapq
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from operator import eq
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..._system.memory import available
from ...errors import EngineBusy, GenerationError, reason_of
from ...model import GPT2
from ...tokenizer import Tokenizer
from ..continuation import Generation
from ..decoding import check_numbers
from ..engine import decoder_of
from ..generation import check_length, check_vocabulary
from ..processors import check_ids
from ..sampling import Draw, draw_seed
from ..scores import score
from ..speculation.drafter import Drafter, DraftRow
from .choosing import Choice, choose
from .events import Event, Failed, Finished, PromptRead, Token
from .job import Job, Ticket
from .models import StepInput, step_model
from .pages import pages_of
from .row import ENDED, Row
from .scheduler import Piece, Scheduler

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


@dataclass
class _Counts:
    prefix_hit_tokens: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    steps: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0


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
            self._model = step_model(decoder, pages, page_size, chunk)
        except (MemoryError, OSError, RuntimeError) as error:
            raise GenerationError(
                f"a cache of {pages * page_size} tokens takes {self._cache_bytes:,} bytes, which "
                f"cannot be allocated ({reason_of(error)}): set cache_tokens to fewer"
            ) from error
        columns = pages_of(model.config.n_positions, page_size)
        self._scheduler = Scheduler(
            self._model, pages, page_size, columns, max_rows, chunk, share_prefixes
        )
        self._drafter = drafter if self._model.verifies else None
        self._deadlines: list[tuple[float, int, Row]] = []
        self._counts = _Counts()
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
        most = self._scheduler.pool.total * self._size
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
        """Take no more jobs, and end those that there are.

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
            if thread is not threading.current_thread():
                thread.join()
                self._thread = None
        with self._stepping:
            self._end_all(lambda row: self._finish(row, "cancelled"))

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
        scheduler = self._scheduler
        return bool(self._arrived or self._withdrawn or scheduler.waiting or scheduler.running)

    @property
    def _waiting(self) -> int:
        """Jobs that wait, those that have just arrived included."""
        return len(self._arrived) + len(self._scheduler.waiting)

    def _serve(self) -> None:
        while not self._stopping:
            try:
                if self.step():
                    continue
            except Exception as error:
                # Nobody else would hear of it, and the jobs would wait forever.
                reason = error
                with self._stepping:
                    self._end_all(lambda row: self._fail(row, reason))
                continue
            with self._changed:
                self._changed.notify_all()  # close() waits for the last job
                self._changed.wait_for(lambda: self._arrived or self._withdrawn or self._stopping)

    def stats(self) -> EngineStats:
        """The engine's state and its counts."""
        scheduler, pool = self._scheduler, self._scheduler.pool
        return EngineStats(
            running=len(scheduler.running),
            waiting=self._waiting,
            pages_used=pool.used,
            pages_cached=pool.cached,
            pages_total=pool.total,
            page_size=self._size,
            cache_bytes=self._cache_bytes,
            preemptions=scheduler.preemptions,
            **vars(self._counts),
        )

    # A step

    def step(self) -> bool:
        """Take one step of the model for all that runs; False if there is nothing to do.

        Not to be called from a listener.
        """
        with self._stepping, torch.inference_mode():
            self._take_messages()
            self._end_late()
            scheduler = self._scheduler
            scheduler.admit()
            if not scheduler.running:
                return False
            pieces = scheduler.plan(None if self._drafter is None else self._propose)
            self._counts.steps += bool(pieces)
            for together in self._model.together([(piece, piece.count) for piece in pieces]):
                self._compute(together)
            return True

    def _take_messages(self) -> None:
        """Queue the jobs that have arrived, and end those that were cancelled."""
        scheduler = self._scheduler
        with self._changed:
            arrived, withdrawn = list(self._arrived), list(self._withdrawn)
            self._arrived.clear()
            self._withdrawn.clear()
            for row in arrived:
                scheduler.queue(row)
        for row in arrived:
            if row.deadline is not None:
                heapq.heappush(self._deadlines, (row.deadline, row.id, row))
        for ticket in withdrawn:
            found = scheduler.running.get(ticket.id) or scheduler.waiting.get(ticket.id)
            if found is not None:
                self._finish(found, "cancelled")
        for row in arrived:
            if row.limit == 0 and row.prompt_scores is None and row.state != ENDED:
                self._finish(row, "length")

    def _end_all(self, end: Callable[[Row], None]) -> None:
        """Take the jobs that have arrived, and end these and all others."""
        scheduler = self._scheduler
        self._take_messages()
        for row in [*scheduler.running.values(), *scheduler.waiting.values()]:
            end(row)

    def _end_late(self) -> None:
        """End the jobs whose time is over."""
        now = time.monotonic()
        while self._deadlines and self._deadlines[0][0] <= now:
            _, _, row = heapq.heappop(self._deadlines)
            if row.state != ENDED:
                self._finish(row, "time")

    def _propose(self, pieces: list[Piece]) -> None:
        """Add proposed tokens to the pieces of rows that want them.

        Only what can be verified is taken: tokens that may be chosen and fit the row's grammar, and
        no more than there are free pages for.
        """
        drafter = self._drafter
        assert drafter is not None
        asked = [piece for piece in pieces if piece.row.job.speculate]
        if not asked:
            return
        try:
            proposals = drafter.propose([_draft_row(piece.row) for piece in asked])
            for piece, proposed in zip(asked, proposals, strict=True):
                piece.drafts = self._verifiable(piece.row, proposed)
                piece.count = piece.outputs = 1 + len(piece.drafts)
        except Exception as error:
            for piece in asked:
                self._fail(piece.row, error)

    def _verifiable(self, row: Row, proposed: Sequence[int]) -> list[int]:
        """The proposed tokens, from the first one on, that a step can verify."""
        drafts: list[int] = []
        for token in proposed[: _most_drafts(row)]:
            if not 0 <= token < self._allowed:
                break
            drafts.append(token)
        if drafts and row.matcher is not None:
            drafts = drafts[: row.matcher.accepts(drafts)]
        if drafts:
            room = self._scheduler.extend(row, row.length + 1 + len(drafts))
            drafts = drafts[: room - row.length - 1]
        return drafts

    def _compute(self, pieces: Sequence[Piece]) -> None:
        """Read pieces and choose tokens after them. An error ends the jobs that it concerns."""
        try:
            logits = self._model.step(self._input(pieces))
        except Exception as error:
            for piece in pieces:
                self._fail(piece.row, error)
            return
        choices = []
        at = 0
        for piece in pieces:
            row, first = piece.row, at
            at += piece.outputs
            if row.decodes:
                choices.append(Choice(row, first, piece.drafts))
                continue
            row.length = piece.begin + piece.count
            self._scheduler.publish(row)
            try:
                self._read(row, piece, logits[first:at])
            except Exception as error:
                self._fail(row, error)
            if row.state != ENDED and row.generated == 0 and row.length == row.prompted:
                choices.append(Choice(row, at - 1))
        if not choices:
            return
        choose(choices, logits, self._allowed)
        now = time.monotonic()
        for choice in choices:
            try:
                if choice.error is not None:
                    raise choice.error
                self._accept(choice, now)
            except Exception as error:
                self._fail(choice.row, error)

    def _input(self, pieces: Sequence[Piece]) -> StepInput:
        """What the model is given."""
        count = len(pieces)
        begins = np.array([piece.begin for piece in pieces])
        counts = np.array([piece.count for piece in pieces])
        wanted = np.array([piece.outputs for piece in pieces])
        starts = np.zeros(count + 1, np.int64)
        np.cumsum(counts, out=starts[1:])
        if starts[-1] == count:
            tokens = np.array([piece.row.tokens[piece.begin] for piece in pieces])
            positions = begins
        else:
            tokens = np.concatenate([_tokens(piece) for piece in pieces])
            positions = _ranges(begins, counts)
        pages = self._scheduler.table[[piece.row.slot for piece in pieces]]
        outputs = _ranges(starts[1:] - wanted, wanted)
        singly = np.array([piece.singly for piece in pieces])
        arrays = tokens, positions, starts, begins, outputs, pages, singly
        return StepInput(*map(torch.from_numpy, arrays))

    def _read(self, row: Row, piece: Piece, logits: Tensor) -> None:
        """Note that tokens of a prompt have been read, and their scores.

        Args:
            logits: (outputs, V) after the piece's last tokens.
        """
        if row.told:
            return
        if row.prompt_scores is not None and row.alternatives is not None:
            targets = row.tokens[piece.begin + 1 : piece.begin + piece.count + 1]
            if targets:
                check_numbers(logits[: len(targets)])
                found = score(logits[: len(targets)], targets, row.alternatives)
                row.prompt_scores.add(found)
        if row.length == row.prompted:
            row.told = True
            self._counts.prompt_tokens += row.prompted
            self._counts.prefix_hit_tokens += row.cached
            row.ticket.tell(PromptRead(row.prompted, row.cached, row.prompt_scores))
            if row.limit == 0:
                self._finish(row, "length")

    def _accept(self, choice: Choice, now: float) -> None:
        """Append the tokens that were chosen for a row, until one of them is its last one."""
        row = choice.row
        continuation, ticket = row.continuation, row.ticket
        drafted = row.decodes and self._drafter is not None and row.job.speculate
        for place, token in enumerate(choice.tokens):
            reason = self._reason(row, token)
            if reason is None and row.deadline is not None and now > row.deadline:
                reason = "time"
            row.append(token)
            self._counts.generated_tokens += 1
            piece = continuation.push(token, reason)
            scores = None
            if choice.scores is not None:
                scores = choice.scores.of(place)
                continuation.scores.add(scores)
            if ticket.watched:
                ticket.tell(Token(row.generated - 1, token, piece, scores))
            if reason is not None:
                break
        if drafted:
            self._observe(row.id, choice.drafts, choice.tokens[: place + 1])
        if reason is not None:
            self._finish(row, reason)

    def _observe(self, row_id: int, drafts: Sequence[int], tokens: list[int]) -> None:
        """Count the drafts that were right, and tell the drafter."""
        assert self._drafter is not None
        accepted = sum(map(eq, tokens, drafts))
        self._counts.drafted_tokens += len(drafts)
        self._counts.accepted_tokens += accepted
        self._drafter.observe(row_id, len(drafts), accepted, tokens)

    def _reason(self, row: Row, token: int) -> str | None:
        """Why a row ends with this next token; None: it goes on."""
        request = row.job.request
        criteria = request.criteria
        reads_text = criteria.strings or criteria.sequences
        reason = criteria.reason([*row.continuation.tokens, token] if reads_text else [token])
        if reason is None and request.callables.criteria:
            stops = request.callables.stop([*row.tokens, token], self.model.device)
            reason = "stop" if stops else None
        if row.matcher is not None:
            row.matcher.advance(token)
            if reason is None and row.matcher.finished:
                reason = "stop"
        if reason is None and row.generated + 1 == row.limit:
            reason = "length"
        return reason

    def _finish(self, row: Row, reason: str) -> None:
        """End a job with the result that it has."""
        try:
            if row.continuation.reason is None:
                row.continuation.end(reason)
            self._end(row, Finished(row.generation()))
        except Exception as error:  # of a listener, or of a tokenizer
            self._end(row, Failed(error))

    def _fail(self, row: Row, error: Exception) -> None:
        """End a job with an error."""
        traceback.clear_frames(error.__traceback__)  # which may hold logits
        with contextlib.suppress(Exception):  # a listener's
            self._end(row, Failed(error))

    def _end(self, row: Row, outcome: Finished | Failed) -> None:
        if row.state != ENDED:
            self._scheduler.remove(row)
            row.state = ENDED
            if self._drafter is not None:
                self._drafter.forget(row.id)
        row.ticket.close(outcome)


def _most_drafts(row: Row) -> int:
    """Most tokens that may be proposed for a row: one more is chosen after the last of them."""
    return row.limit - row.generated - 1


def _draft_row(row: Row) -> DraftRow:
    numbers, begin = row.numbers, row.generated

    def uniforms(count: int) -> list[float]:
        assert numbers is not None
        return [numbers.at(begin + place) for place in range(count)]

    return DraftRow(
        row.id,
        row.tokens,
        _most_drafts(row),
        row.job.request.options,
        None if numbers is None else uniforms,
    )


def _tokens(piece: Piece) -> np.ndarray:
    known = piece.row.ids[piece.begin : piece.begin + piece.count - len(piece.drafts)]
    return np.concatenate([known, piece.drafts]) if piece.drafts else known


def _ranges(begins: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """begin, begin + 1, … (count numbers) for each begin and count."""
    ends = counts.cumsum()
    total = int(ends[-1])
    return np.repeat(begins - (ends - counts), counts) + np.arange(total)


def _default_tokens(model: GPT2, entry_bytes: int, max_rows: int) -> int:
    """Tokens of a cache whose size is not given; see `BatchEngine`."""
    room = model.config.n_positions
    free = available(model.device)
    wanted = max_rows * room
    if free is None:
        return wanted
    return max(room, min(wanted, int(free * _SHARE) // entry_bytes))
