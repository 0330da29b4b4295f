"""The work of a step: what the model is given, and what becomes of its logits."""

from __future__ import annotations

import contextlib
import heapq
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import eq

import numpy as np
import torch
from torch import Tensor

from ..decoding import check_numbers
from ..scores import score
from ..speculation.drafter import Drafter, DraftRow
from .choosing import Choice, choose
from .events import Failed, Finished, PromptRead, Token
from .job import Ticket
from .models import StepInput, StepModel
from .row import ENDED, Row
from .scheduler import Piece, Scheduler

_SPARE = 64
"""Deadlines of jobs that have ended which may stay in the list."""


@dataclass
class Counts:
    """What has been done."""

    prefix_hit_tokens: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    steps: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0


class Worker:
    """Carries jobs through their steps, in one thread at a time.

    Args:
        model: computes.
        scheduler: of the same model.
        drafter: proposes tokens, if the model can verify them.
        vocab_size: token ids below this may be chosen.
        device: of the logits.
    """

    def __init__(
        self,
        model: StepModel,
        scheduler: Scheduler,
        drafter: Drafter | None,
        vocab_size: int,
        device: torch.device,
    ):
        self._model, self.scheduler = model, scheduler
        self._drafter = drafter if model.verifies else None
        self._vocab_size, self._device = vocab_size, device
        self._deadlines: list[tuple[float, int, Row]] = []
        self.counts = Counts()

    def add(self, row: Row) -> None:
        """Let a new job wait."""
        self.scheduler.queue(row)
        if row.deadline is None:
            return
        heapq.heappush(self._deadlines, (row.deadline, row.id, row))
        if len(self._deadlines) > 2 * self.scheduler.jobs + _SPARE:
            # Most have ended long before their time, and are kept here by nothing else.
            self._deadlines = [entry for entry in self._deadlines if entry[2].state != ENDED]
            heapq.heapify(self._deadlines)

    def cancel(self, ticket: Ticket) -> None:
        """End a job, unless it has ended."""
        scheduler = self.scheduler
        row = scheduler.running.get(ticket.id) or scheduler.waiting.get(ticket.id)
        if row is not None:
            self.finish(row, "cancelled")

    def end_all(self, end: Callable[[Row], None]) -> None:
        """End all jobs by this function: `finish` or `fail`."""
        scheduler = self.scheduler
        for row in [*scheduler.running.values(), *scheduler.waiting.values()]:
            end(row)

    def step(self) -> bool:
        """Take one step of the model for all that runs; False if there is nothing to do."""
        self._end_late()
        scheduler = self.scheduler
        scheduler.admit()
        if not scheduler.running:
            return False
        pieces = scheduler.plan(None if self._drafter is None else self._propose)
        self.counts.steps += bool(pieces)
        for together in self._model.together([(piece, piece.count) for piece in pieces]):
            self._compute(together)
        self._begin()
        return True

    def _end_late(self) -> None:
        """End the jobs whose time is over."""
        now = time.monotonic()
        while self._deadlines and self._deadlines[0][0] <= now:
            _, _, row = heapq.heappop(self._deadlines)
            if row.state != ENDED:
                self.finish(row, "time")

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
                self.fail(piece.row, error)

    def _verifiable(self, row: Row, proposed: Sequence[int]) -> list[int]:
        """The proposed tokens, from the first one on, that a step can verify."""
        drafts: list[int] = []
        for token in proposed[: _most_drafts(row)]:
            if not 0 <= token < self._vocab_size:
                break
            drafts.append(token)
        if drafts and row.matcher is not None:
            drafts = drafts[: row.matcher.accepts(drafts)]
        if drafts:
            room = self.scheduler.extend(row, row.length + 1 + len(drafts))
            drafts = drafts[: room - row.length - 1]
        return drafts

    def _compute(self, pieces: Sequence[Piece]) -> None:
        """Read pieces and choose tokens after them. An error ends the jobs that it concerns."""
        try:
            logits = self._model.step(self._input(pieces))
        except Exception as error:
            for piece in pieces:
                self.fail(piece.row, error)
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
            self.scheduler.publish(row)
            try:
                self._score(row, piece, logits[first:at])
                if row.length == row.prompted and row.generated == 0:
                    self.scheduler.keep(row, logits[at - 1])
                    self._tell_read(row)
            except Exception as error:
                self.fail(row, error)
            if row.state != ENDED and row.generated == 0 and row.length == row.prompted:
                choices.append(Choice(row, at - 1))
        self._choose(choices, logits)

    def _begin(self) -> None:
        """Choose the first tokens of the rows whose prompts did not have to be read."""
        choices: list[Choice] = []
        logits: list[Tensor] = []
        for row in list(self.scheduler.running.values()):
            if row.first_logits is None:
                continue
            logits.append(row.first_logits)
            row.first_logits = None
            try:
                self._tell_read(row)
            except Exception as error:
                self.fail(row, error)
            if row.state == ENDED:
                logits.pop()
            else:
                choices.append(Choice(row, len(choices)))
        if choices:
            self._choose(choices, torch.stack(logits))

    def _choose(self, choices: Sequence[Choice], logits: Tensor) -> None:
        """Choose the next tokens of rows, and append them. An error ends the row's job."""
        if not choices:
            return
        try:
            choose(choices, logits, self._vocab_size)
        except Exception as error:
            for choice in choices:
                self.fail(choice.row, error)
            return
        now = time.monotonic()
        for choice in choices:
            try:
                if choice.error is not None:
                    raise choice.error
                self._accept(choice, now)
            except Exception as error:
                self.fail(choice.row, error)

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
        pages = self.scheduler.table[[piece.row.slot for piece in pieces]]
        outputs = _ranges(starts[1:] - wanted, wanted)
        singly = np.array([piece.singly for piece in pieces])
        arrays = tokens, positions, starts, begins, outputs, pages, singly
        return StepInput(*map(torch.from_numpy, arrays))

    def _score(self, row: Row, piece: Piece, logits: Tensor) -> None:
        """Note the scores of a prompt's tokens, if the job asks for them.

        Args:
            logits: (outputs, V) after the piece's last tokens.
        """
        if row.told or row.prompt_scores is None or row.alternatives is None:
            return
        targets = row.tokens[piece.begin + 1 : piece.begin + piece.count + 1]
        if targets:
            check_numbers(logits[: len(targets)])
            row.prompt_scores.add(score(logits[: len(targets)], targets, row.alternatives))

    def _tell_read(self, row: Row) -> None:
        """Tell that a prompt has been read."""
        row.told = True
        self.counts.prompt_tokens += row.prompted
        self.counts.prefix_hit_tokens += row.cached
        row.ticket.tell(PromptRead(row.prompted, row.cached, row.prompt_scores))
        if row.limit == 0:
            self.finish(row, "length")

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
            self.counts.generated_tokens += 1
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
            self.finish(row, reason)

    def _observe(self, row_id: int, drafts: Sequence[int], tokens: list[int]) -> None:
        """Count the drafts that were right, and tell the drafter."""
        assert self._drafter is not None
        accepted = sum(map(eq, tokens, drafts))
        self.counts.drafted_tokens += len(drafts)
        self.counts.accepted_tokens += accepted
        self._drafter.observe(row_id, len(drafts), accepted, tokens)

    def _reason(self, row: Row, token: int) -> str | None:
        """Why a row ends with this next token; None: it goes on."""
        request = row.job.request
        criteria = request.criteria
        reads_text = criteria.strings or criteria.sequences
        reason = criteria.reason([*row.continuation.tokens, token] if reads_text else [token])
        if reason is None and request.callables.criteria:
            stops = request.callables.stop([*row.tokens, token], self._device)
            reason = "stop" if stops else None
        if row.matcher is not None:
            row.matcher.advance(token)
            if reason is None and row.matcher.finished:
                reason = "stop"
        if reason is None and row.generated + 1 == row.limit:
            reason = "length"
        return reason

    def finish(self, row: Row, reason: str) -> None:
        """End a job with the result that it has."""
        try:
            if row.continuation.reason is None:
                row.continuation.end(reason)
            self._end(row, Finished(row.generation()))
        except Exception as error:  # of a listener, or of a tokenizer
            self._end(row, Failed(error))

    def fail(self, row: Row, error: Exception) -> None:
        """End a job with an error."""
        traceback.clear_frames(error.__traceback__)  # which may hold logits
        with contextlib.suppress(Exception):  # a listener's
            self._end(row, Failed(error))

    def _end(self, row: Row, outcome: Finished | Failed) -> None:
        if row.state != ENDED:
            self.scheduler.remove(row)
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
