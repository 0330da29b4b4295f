"""Which jobs run, what each step reads of them, and whose the pages are."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor

from ..scores import Scores
from .models import StepModel
from .pages import PagePool, pages_of
from .row import RUNNING, WAITING, Row

_KEPT = 64
"""Prompts whose last logits are kept: 13 MB of GPT-2's."""


@dataclass(eq=False)
class Piece:
    """Tokens of one row that a step reads."""

    row: Row
    begin: int
    """Position of the first one."""
    count: int
    singly: bool
    """They are computed as steps of one token would compute them."""
    outputs: int
    """Logits are wanted after this many of them, the last ones."""
    admission: int
    """How often the row had been admitted when the piece was planned."""
    drafts: list[int] = field(default_factory=list)
    """Proposed tokens, the last ones of the piece."""


class Scheduler:
    """Admits jobs in their order, plans steps, and hands out pages.

    A job that runs holds pages for what has been read of it; where they run out, the youngest one
    is set back: it waits, without pages, to be read again. The oldest can always go on, since each
    job fits the pool.

    Args:
        model: reads what is planned.
        pages, page_size: of the model's pool.
        columns: most pages of one job.
        max_rows: most jobs that run at once.
        chunk: most tokens of prompts in a step, a multiple of `page_size`.
        shares: prompts that begin alike share pages.
    """

    def __init__(
        self,
        model: StepModel,
        pages: int,
        page_size: int,
        columns: int,
        max_rows: int,
        chunk: int,
        shares: bool,
    ):
        self._model = model
        self._size, self._chunk, self._shares = page_size, chunk, shares
        self.pool = PagePool(pages)
        self.table = np.full((max_rows, columns), -1, np.int64)
        """(max_rows, M) the pages of each running row, by its slot."""
        self._slots = list(range(max_rows - 1, -1, -1))
        self.running: dict[int, Row] = {}
        """By number of the job."""
        self.waiting: OrderedDict[int, Row] = OrderedDict()
        """The same, in the order of admission, which is that of the numbers."""
        self._kept: OrderedDict[bytes, Tensor] = OrderedDict()
        """Logits after the prompts that were read last, by their keys."""
        self.preemptions = 0
        self._steps = 0

    @property
    def jobs(self) -> int:
        """Number of jobs that run or wait."""
        return len(self.running) + len(self.waiting)

    def queue(self, row: Row) -> None:
        """Let a new job wait."""
        self.waiting[row.id] = row

    def remove(self, row: Row) -> None:
        """Forget a job, which has ended, and free its pages."""
        if row.state == RUNNING:
            self._leave(row)
        else:
            self.waiting.pop(row.id, None)

    def admit(self) -> None:
        """Let the jobs that wait run, in their order, while there are rows and pages."""
        while self.waiting and self._slots:
            row = next(iter(self.waiting.values()))
            if self.running and not self._has_room(row):
                return
            del self.waiting[row.id]
            row.state = RUNNING
            row.slot = self._slots.pop()
            row.admissions += 1
            row.served = -1
            self.running[row.id] = row

    def publish(self, row: Row) -> None:
        """Let others find the pages of a row's prompt that are full now."""
        if not self._shares:
            return
        full = min(row.length // self._size, len(row.keys))
        for place in range(row.published, full):
            self.pool.publish(row.pages[place], row.keys[place])
        if row.length == row.prompted and row.published < len(row.pages):
            # Its first entries stay, whatever follows them in the page.
            self.pool.publish(row.pages[-1], row.whole_key)
        row.published = max(row.published, full)

    def keep(self, row: Row, logits: Tensor) -> None:
        """Keep the logits (V,) after a row's prompt for the next job that has the same one."""
        if not self._shares:
            return
        self._kept[row.whole_key] = logits.clone()
        self._kept.move_to_end(row.whole_key)
        if len(self._kept) > _KEPT:
            self._kept.popitem(last=False)

    def extend(self, row: Row, entries: int) -> int:
        """Get a row pages for as many of these entries as there are free ones, of no other job.

        Returns:
            The entries that its pages hold.
        """
        while len(row.pages) * self._size < entries and (page := self.pool.take()) is not None:
            self._hold(row, page)
        return len(row.pages) * self._size

    def _has_room(self, row: Row) -> bool:
        """True if there are pages for all that a row and those that still read have to read, and
        for one more page of each that decodes."""
        promised = 0
        for other in self.running.values():
            wanted = 1 if other.decodes else self._to_read(other) - len(other.pages)
            promised += max(wanted, 0)
        wanted = self._to_read(row)
        if self._may_adopt(row):
            for key in row.keys:
                page = self.pool.find(key)
                if page is None:
                    break
                # One that is held already costs nothing.
                wanted -= self.pool.holders(page) > 0
        return wanted + promised <= self.pool.available

    def _to_read(self, row: Row) -> int:
        """Pages of a row's tokens so far, and of the next one."""
        entries = min(len(row.tokens) + 1, row.prompted + max(row.limit - 1, 0))
        return pages_of(entries, self._size)

    def plan(self, propose: Callable[[list[Piece]], Any] | None = None) -> list[Piece]:
        """What the next step reads: first the texts that go on, then prompts.

        Args:
            propose: adds drafts to the pieces of texts that go on.
        """
        self._steps += 1
        rows = sorted(self.running.values(), key=lambda row: row.id)
        decoding = [row for row in rows if row.decodes]
        pieces = []
        for row in decoding:
            if row.state == RUNNING and self._grow(row, row.length + 1):
                pieces.append(Piece(row, row.length, 1, True, 1, row.admissions))
        if propose is not None:
            propose(pieces)
        pieces.sort(key=lambda piece: piece.row.group)  # so that their logits lie side by side
        readers = [row for row in rows if row.state == RUNNING and not row.decodes]
        pieces += self._plan_prompts(readers)
        return [
            piece
            for piece in pieces
            if piece.row.state == RUNNING and piece.row.admissions == piece.admission
        ]

    def _plan_prompts(self, readers: list[Row]) -> list[Piece]:
        """The pieces of prompts for a step, at most `chunk_tokens` together.

        Every prompt gets the same share, or all that it needs if that is less. Where shares would
        be shorter than a page, those that have waited longest come first. A prompt whose next page
        is being read for another one waits for it.
        """
        readers.sort(key=lambda row: (row.served, row.id))
        size = self._size
        claimed = {
            row.keys[row.length // size]
            for row in readers
            if row.length % size and row.length // size < len(row.keys)
        }
        able, least = [], 0
        for row in readers:
            if least >= self._chunk:
                break
            self._adopt(row)
            if row.remaining == 0:
                continue
            place = row.length // size
            if self._may_adopt(row) and row.length % size == 0 and place < len(row.keys):
                if row.keys[place] in claimed:
                    continue
                claimed.add(row.keys[place])
            able.append(row)
            least += min(row.remaining, size)
        able.sort(key=lambda row: row.remaining)
        left = self._chunk
        pieces = []
        for place, row in enumerate(able):
            if left <= 0 or row.state != RUNNING:
                continue
            piece = self._piece(row, max(1, left // (len(able) - place)))
            if not self._grow(row, piece.begin + piece.count):
                continue
            left -= piece.count
            row.served = self._steps
            pieces.append(piece)
        return pieces

    def _piece(self, row: Row, share: int) -> Piece:
        """The next tokens of a row that reads, about `share` of them."""
        begin, grid = row.length, self._model.grid
        singly = row.single(begin)
        if not singly:
            end = row.prompted
            end = min(end, begin + share if grid == 1 else (begin // grid + 1) * grid)
        elif self._model.verifies:
            end = min(begin + share, begin + row.remaining)
        else:
            end = begin + 1
        count = end - begin
        scoring = row.prompt_scores is not None and not row.told
        outputs = count if scoring else int(end == len(row.tokens) and row.generated == 0)
        return Piece(row, begin, count, singly, outputs, row.admissions)

    def _may_adopt(self, row: Row) -> bool:
        """True if a row may take pages of its prompt from others: scores need all logits."""
        return self._shares and (row.told or row.prompt_scores is None)

    def _adopt(self, row: Row) -> None:
        """Take what comes next of a row's prompt from the cache, as far as it is there."""
        size, grid = self._size, self._model.grid
        if not self._may_adopt(row):
            return
        while row.length % size == 0 and row.length % grid == 0:
            first = row.length // size
            # Modules read whole chunks only; packed weights any number of tokens.
            count = max(1, grid // size)
            keys = row.keys[first : first + count]
            found = [page for key in keys if (page := self.pool.find(key)) is not None]
            end = row.length + count * size
            if len(found) < count or end >= row.prompted:
                break
            for page in found:
                self.pool.share(page)
                self._hold(row, page)
            row.published = len(row.pages)
            self._advance_cached(row, end)
        self._adopt_last(row)

    def _adopt_last(self, row: Row) -> None:
        """Copy the last page of a row's prompt, if the whole prompt has been read before.

        The row will write to the page, and its owner has perhaps gone on in it already. The last
        token is read again, for its logits, unless they were kept.
        """
        rest = row.prompted - row.length
        if row.length % self._size or not 0 < rest <= self._size:
            return
        if row.generated == 0:
            row.first_logits = self._kept.get(row.whole_key)
        end = row.prompted
        if row.generated == 0 and row.first_logits is None:
            end -= 1
            if self._model.grid > 1:
                return
        source = self.pool.find(row.whole_key)
        if source is None or end == row.length:
            row.first_logits = None
            return
        self.pool.share(source)
        own = self.pool.take()
        if own is None:
            row.first_logits = None
        else:
            self._model.copy_page(source, own)
            self._hold(row, own)
            row.published = len(row.pages)
            self._advance_cached(row, end)
        self.pool.release([source])

    def _advance_cached(self, row: Row, length: int) -> None:
        if not row.told:
            row.cached += length - row.length
        row.length = length

    def _hold(self, row: Row, page: int) -> None:
        self.table[row.slot, len(row.pages)] = page
        row.pages.append(page)

    def _grow(self, row: Row, entries: int) -> bool:
        """Get a row the pages for this many entries; the youngest rows give theirs back for that.

        Returns:
            False if the row itself was the youngest one, and waits now.
        """
        while len(row.pages) * self._size < entries:
            page = self.pool.take()
            if page is not None:
                self._hold(row, page)
                continue
            youngest = self.running[max(self.running)]
            self._set_back(youngest)
            if youngest is row:
                return False
        return True

    def _set_back(self, row: Row) -> None:
        """Take a running row's pages; it will read its tokens again."""
        self.preemptions += 1
        self._leave(row)
        row.state = WAITING
        row.length = row.published = 0
        row.first_logits = None
        if not row.told:
            row.cached = 0
            if row.prompt_scores is not None:
                row.prompt_scores = Scores()
        self.waiting[row.id] = row
        self.waiting.move_to_end(row.id, last=False)

    def _leave(self, row: Row) -> None:
        """Give back what a running row holds."""
        del self.running[row.id]
        self.pool.release(row.pages)
        row.pages.clear()
        self.table[row.slot] = -1
        self._slots.append(row.slot)
        row.slot = -1
