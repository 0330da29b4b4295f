"""How many tokens to propose: as many as pay, by what steps cost and proposals have come to.

A step over T tokens takes c(T) seconds. A row whose proposals are right with probability p at each
place gets 1 + p + p^2 + … + p^k tokens from a step that verifies k. Of all rows' places, the
likeliest N are taken for which

    (rows + sum of their p^j) / (c(rows + N) + depth * seconds to draft one place)

is highest; that may be none. c and p are exponential averages of what was measured. Time decides
only how many tokens are proposed, never which ones a text has.
"""

from __future__ import annotations

import copy
import time
from bisect import bisect_left
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field

MOST = 15
"""Most tokens proposed for a row, unless it is set otherwise: with the newest one, a step of 16."""

_SLOPE = 0.04
"""Cost of a further token in units of a step of one, until one is measured."""
_FRESH = 0.2
"""Weight of a new measurement in the averages of a row, and of times."""
_FRESH_OF_ALL = 0.05
"""The same in the averages of all rows, with which a new one begins."""
_OUTLIER = 2.0
"""A measured time counts as this many times what was expected, at most: the machine does other
things, and the step may have read prompts."""
_STALE = 400
"""Steps after which a cost that has not been measured again is forgotten."""
_LEAST = 0.02
"""A place that is right less often than this is not worth looking at."""
_RESTS = (4, 64)
"""Chances that go by after one that did not pay, for its row and kind: from the first number to the
second, doubled each time."""
_PROBE = 1
"""Tokens of the proposal that finds out whether a rested row's pay again."""

_PROBING = 0.01
"""Share of the time that probes may take."""


class StepCosts:
    """Seconds of a step by its number of tokens, as measured lately."""

    def __init__(self) -> None:
        self._sizes: list[int] = []
        self._seconds: dict[int, float] = {}
        self._counts: dict[int, int] = {}
        self._measured: dict[int, int] = {}
        self._steps = 0
        self._slope = _SLOPE
        """Cost of a further token in units of a step of one, where nothing else is known."""

    def add(self, tokens: int, seconds: float) -> None:
        """Count a step."""
        self._steps += 1
        seconds = max(seconds, 1e-9)  # a coarse clock may have stood still
        if self._sizes:
            expected = self.seconds(tokens)
            seconds = min(seconds, _OUTLIER * expected)
            weight = max(_FRESH, 1 / (1 + self._counts.get(tokens, 0)))
            seconds = expected + weight * (seconds - expected)
        if tokens not in self._seconds:
            self._sizes.insert(bisect_left(self._sizes, tokens), tokens)
        self._seconds[tokens] = seconds
        self._counts[tokens] = self._counts.get(tokens, 0) + 1
        self._measured[tokens] = self._steps
        if tokens > (least := self._sizes[0]):
            # c(T) / c(t) = (1 + s (T - 1)) / (1 + s (t - 1)), solved for s.
            ratio = self._seconds[tokens] / self._seconds[least]
            room = (tokens - 1) - ratio * (least - 1)
            slope = min(max((ratio - 1) / room, 0.0), 1.0) if room > 0 else 1.0
            self._slope += _FRESH * (slope - self._slope)
        if self._steps % _STALE == 0:
            for size in list(self._sizes):
                if self._measured[size] <= self._steps - _STALE:
                    self._sizes.remove(size)
                    del self._seconds[size], self._measured[size], self._counts[size]

    def seconds(self, tokens: int) -> float:
        """The expected time of a step: between neighbors that were measured, or from the nearest;
        in units of one token's where nothing was."""
        if not self._sizes:
            return self._prior(tokens)
        place = bisect_left(self._sizes, tokens)
        if place == len(self._sizes):
            below = self._sizes[-1]
            return self._seconds[below] * self._prior(tokens) / self._prior(below)
        above = self._sizes[place]
        if place == 0:
            return self._seconds[above] * self._prior(tokens) / self._prior(above)
        below = self._sizes[place - 1]
        share = (tokens - below) / (above - below)
        return (1 - share) * self._seconds[below] + share * self._seconds[above]

    def _prior(self, tokens: int) -> float:
        """The time of a step in units of one token's, before it is measured."""
        return 1 + self._slope * (tokens - 1)


@dataclass
class _Rest:
    """How long proposals of a kind, which did not pay, are not made for a row."""

    left: int = 0
    """So many more chances go by."""
    longest: int = _RESTS[0]
    probes: bool = False
    """The next proposal is a probe."""


@dataclass
class _Row:
    """What a row's proposals have come to."""

    rates: dict[Hashable, float]
    """Share of places that were right, by kind of proposal."""
    kind: Hashable = None
    """The kind of the newest proposal."""
    rate: float = 0.0
    """The rate that was expected of it."""
    rests: dict[Hashable, _Rest] = field(default_factory=dict)
    """By kind of proposal."""


@dataclass(frozen=True)
class Chance:
    """A proposal that could be made for a row."""

    row_id: int
    kind: Hashable
    """Proposals of one kind are right about as often as each other."""
    rate: float
    """Share of places expected to be right before anything is known of this kind."""
    most: int
    """Tokens that there are to propose."""


class DraftLengths:
    """Numbers of tokens to propose, learned while it goes on.

    Args:
        most: the largest of them.
        clock: seconds.
    """

    def __init__(self, most: int = MOST, clock: Callable[[], float] = time.perf_counter):
        self.most = most
        self.costs = StepCosts()
        self._clock = clock
        self._rates: dict[Hashable, float] = {}
        self._rows: dict[int, _Row] = {}
        self._begun: tuple[int, float] | None = None
        self._draft_seconds = 0.0

    def renewed(self) -> DraftLengths:
        """The same for other rows: it begins with what has been learned here."""
        other = DraftLengths(self.most, self._clock)
        other.costs = copy.deepcopy(self.costs)
        other._rates = dict(self._rates)
        other._draft_seconds = self._draft_seconds
        return other

    def choose(self, chances: Sequence[Chance], rows: int) -> list[int]:
        """Number of tokens to propose of each chance; 0 where it does not pay.

        Args:
            chances: of different rows.
            rows: number of rows in the step, each of which has one token anyway.
        """
        gains: list[tuple[float, int, int]] = []
        tried: list[int] = []
        for place, chance in enumerate(chances):
            rest = self._rest(chance)
            if rest.left:
                rest.left -= 1
                continue
            tried.append(place)
            rate = gain = self.rate(chance)
            for depth in range(1, min(chance.most, self.most) + 1):
                if gain < _LEAST:
                    break
                gains.append((gain, place, depth))
                gain *= rate
        gains.sort(key=lambda gain: (-gain[0], gain[2]))
        lengths = [0] * len(chances)
        taken, total, deepest = 0, float(rows), 0
        best = total / self.costs.seconds(rows)
        for count, (gain, _, depth) in enumerate(gains, start=1):
            total += gain
            deepest = max(deepest, depth)
            seconds = self.costs.seconds(rows + count) + deepest * self._draft_seconds
            if total / seconds > best:
                best, taken = total / seconds, count
        for _, place, depth in gains[:taken]:
            lengths[place] = depth
        for place in tried:
            chance, rest = chances[place], self._rest(chances[place])
            row = self._row(chance.row_id)
            row.kind, row.rate = chance.kind, self.rate(chance)
            if lengths[place]:
                rest.longest = _RESTS[0]
            elif rest.probes:
                lengths[place] = min(_PROBE, chance.most, self.most)
            else:
                extra = self.costs.seconds(rows + _PROBE) / self.costs.seconds(rows) - 1
                rest.left = max(rest.longest, int(extra / _PROBING))
                rest.probes = True
                rest.longest = min(2 * rest.longest, _RESTS[1])
                continue
            rest.probes = False
        return lengths

    def rate(self, chance: Chance) -> float:
        """Share of places expected to be right: of the row's proposals of this kind, or of all."""
        row = self._rows.get(chance.row_id)
        if row is not None and chance.kind in row.rates:
            return row.rates[chance.kind]
        return self._rates.get(chance.kind, chance.rate)

    def start(self, tokens: int, draft_seconds: float = 0.0) -> None:
        """Note that a step begins now.

        Args:
            tokens: that it has, of which the rows' newest are one each.
            draft_seconds: that a place of its proposals took to draft; 0: there were none, or it
                took no time.
        """
        if draft_seconds:
            before = self._draft_seconds or draft_seconds
            self._draft_seconds = before + _FRESH * (draft_seconds - before)
        self._begun = (tokens, self._clock())

    def observe(self, row_id: int, proposed: int, accepted: int) -> None:
        """Hear the outcome of a step for a row; the first call after `start` ends the step's time.

        Args:
            row_id: the row's.
            proposed: tokens of its proposal that were verified.
            accepted: how many of them, from the first one on, were right.
        """
        if self._begun is not None:
            tokens, begun = self._begun
            self.costs.add(tokens, self._clock() - begun)
            self._begun = None
        row = self._rows.get(row_id)
        if row is None or not proposed:
            return
        trials = accepted + (accepted < proposed)
        for rates, fresh in ((row.rates, _FRESH), (self._rates, _FRESH_OF_ALL)):
            before = rates.get(row.kind, row.rate)
            weight = 1 - (1 - fresh) ** trials
            rates[row.kind] = before + weight * (accepted / trials - before)

    def forget(self, row_id: int) -> None:
        """Free what is kept for a row."""
        self._rows.pop(row_id, None)

    def _rest(self, chance: Chance) -> _Rest:
        return self._row(chance.row_id).rests.setdefault(chance.kind, _Rest())

    def _row(self, row_id: int) -> _Row:
        return self._rows.setdefault(row_id, _Row({}))
