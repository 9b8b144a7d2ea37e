"""Which rows form the next tick. Pure policy: no threads, no clock; time is an argument."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from service.batching.caps import Caps
from service.batching.latency import Latency
from service.batching.shares import Shares
from service.queue.base import HEAD_START_S, rank

# A nominal speed, until a tick of a group was measured. Only its proportion between groups matters.
_S_PER_PIXEL = 1e-6
# Splitting a tick must gain at least this, for a measured time is never exact.
_GAIN = 0.9
_MOST_GROUPS = 256


@dataclass(frozen=True, slots=True)
class Candidate:
    """One image that still needs ``remaining`` ticks. Only candidates of one ``group`` can share a tick.

    ``arrived`` and ``deadline`` are seconds on the caller's clock; a higher ``priority`` goes first.
    """

    job_id: str
    index: int
    group: Hashable
    arrived: float
    deadline: float
    priority: int = 0
    remaining: int = 1


@dataclass(frozen=True, slots=True)
class Plan:
    """What to do now: the rows of the next tick, the jobs whose deadline has passed, and those that cannot meet it."""

    batch: tuple[Candidate, ...]
    expired: frozenset[str]
    hopeless: frozenset[str] = frozenset()


class Scheduler:
    """Continuous batching: a tick takes rows of one group, whatever their endpoint and their place on the grid.

    Groups share the worker by deficit round robin on the seconds of their ticks, which are fitted to those that ran.
    Within a group rows go by age, and a step of priority counts as `HEAD_START_S` of it: so nothing is overtaken
    for ever. Where not all can be done in time, those whose deadline is at risk go first, the earliest deadline
    before all; what can no longer meet its own is given up at once. A lone row never waits for company.
    """

    def __init__(self, max_rows: int) -> None:
        """Plan ticks of at most ``max_rows`` rows, and of a group no more than its cap."""
        if max_rows < 1:
            raise ValueError(f"a tick needs room for a row, got {max_rows}")
        self.max_rows = max_rows
        self.caps = Caps()
        self._shares = Shares()
        self._latencies: dict[Hashable, Latency] = {}

    def introduce(self, group: Hashable, pixels: int, seconds_by_rows: Mapping[int, float]) -> None:
        """Learn what ticks of ``group`` took in its warm-up, unless it is known."""
        if group not in self._latencies:
            while len(self._latencies) >= _MOST_GROUPS:
                del self._latencies[next(iter(self._latencies))]
            self._latencies[group] = Latency(pixels * _S_PER_PIXEL, seconds_by_rows)

    def ticked(self, group: Hashable, rows: int, seconds: float) -> None:
        """Learn that a tick of ``group`` took so long."""
        self.introduce(group, 1, {})
        self._latencies[group].observe(rows, seconds)

    def expected_s(self, group: Hashable, rows: int) -> float:
        """Seconds that a tick of ``group`` is expected to take."""
        return self._latencies[group].seconds(rows)

    def plan(self, candidates: Iterable[Candidate], now: float) -> Plan:
        """The next tick among ``candidates``; a job that is expired or hopeless never ticks."""
        live, expired, hopeless = self._sift(candidates, now)
        if not live:
            return Plan((), expired, hopeless)
        ordered = self._in_line(live, now)
        groups: dict[Hashable, list[Candidate]] = {}
        for candidate in ordered:
            groups.setdefault(candidate.group, []).append(candidate)
        batches = {group: rows[: self._rows_that_pay(group, len(rows), now)] for group, rows in groups.items()}
        costs = {group: self.expected_s(group, len(batch)) for group, batch in batches.items()}
        first = ordered[0]
        urgent = len(groups) > 1 and self._is_urgent(first, live, now)
        chosen = self._shares.next(costs, first.group if urgent else None)
        return Plan(tuple(batches[chosen]), expired, hopeless)

    def _is_urgent(self, first: Candidate, live: Sequence[Candidate], now: float) -> bool:
        """Whether the first in the line goes out of its group's turn."""
        at_risk = first.deadline < now + self._backlog_s(live, now)
        return at_risk or rank(first.arrived, first.priority) + HEAD_START_S < now

    def _sift(
        self, candidates: Iterable[Candidate], now: float
    ) -> tuple[list[Candidate], frozenset[str], frozenset[str]]:
        """Those whose whole job can still be done, and the jobs that are late or will be."""
        known = list(candidates)
        for candidate in known:
            self.introduce(candidate.group, 1, {})
        expired = frozenset(candidate.job_id for candidate in known if candidate.deadline <= now)
        left = [candidate for candidate in known if candidate.job_id not in expired]
        hopeless = frozenset(candidate.job_id for candidate in self._lost(left, now))
        return [candidate for candidate in left if candidate.job_id not in hopeless], expired, hopeless

    def _lost(self, candidates: Sequence[Candidate], now: float) -> list[Candidate]:
        """Those that miss their deadline though only what goes before them in the line is done before them.

        Rows that fill a tick start together, once the work before them is done; each that is lost makes the ticks of
        the others shorter.
        """
        company = Counter(candidate.group for candidate in candidates)
        kept: Counter[Hashable] = Counter()
        starts: dict[Hashable, float] = {}
        lost: list[Candidate] = []
        busy_until = now
        for candidate in self._in_line(candidates, now):
            group, rows = candidate.group, self._fit(candidate.group, company[candidate.group], now)
            if kept[group] % rows == 0:
                starts[group] = busy_until
            own_s = candidate.remaining * self._step_s(group, rows)
            if starts[group] + own_s > candidate.deadline:
                lost.append(candidate)
                company[group] -= 1
            else:
                kept[group] += 1
                busy_until += own_s / rows
        for group in {candidate.group for candidate in lost}:
            self._latencies[group].doubt()
        return lost

    def _step_s(self, group: Hashable, rows: int) -> float:
        """What a tick of so many rows takes, 0 where nothing was measured."""
        latency = self._latencies[group]
        return latency.seconds(rows) if latency.known else 0.0

    def _fit(self, group: Hashable, waiting: int, now: float) -> int:
        """As many of the rows that wait as a tick may have."""
        return self.caps.of(group, min(waiting, self.max_rows), now)

    def _backlog_s(self, candidates: Sequence[Candidate], now: float) -> float:
        """Seconds until all of this is done."""
        steps: dict[Hashable, list[int]] = {}
        for candidate in candidates:
            steps.setdefault(candidate.group, []).append(candidate.remaining)
        return sum(self._seconds_of(group, remaining, now) for group, remaining in steps.items())

    def _seconds_of(self, group: Hashable, remaining: Sequence[int], now: float) -> float:
        rows = self._fit(group, len(remaining), now)
        return max(max(remaining), math.ceil(sum(remaining) / rows)) * self.expected_s(group, rows)

    def _in_line(self, candidates: Sequence[Candidate], now: float) -> list[Candidate]:
        if len(candidates) == 1:
            return list(candidates)
        return sorted(candidates, key=partial(self._urgency, now + self._backlog_s(candidates, now)))

    def _urgency(self, done_by: float, candidate: Candidate) -> tuple[bool, float, float, str, int]:
        """The place in the line: those at risk by deadline, then the others by priority and age.

        The queue lets in what can be done in time: so by deadline all are, and a priority makes nobody late.
        """
        if candidate.deadline < done_by:
            return False, candidate.deadline, candidate.arrived, candidate.job_id, candidate.index
        return True, rank(candidate.arrived, candidate.priority), candidate.arrived, candidate.job_id, candidate.index

    def _rows_that_pay(self, group: Hashable, waiting: int, now: float) -> int:
        """How many rows to run at once: all that may, or fewer where two ticks take less than the one.

        An engine of fixed shapes pads: 17 rows may take as long as 32, and 16 and then 1 less than that. That is
        decided by what was measured several times, never by the line or by one slow tick.
        """
        latency = self._latencies[group]
        best = most = self._fit(group, waiting, now)
        if most == 1 or (at_once_s := latency.surely_s(most)) is None:
            return most
        best_s = _GAIN * at_once_s
        for rows in latency.sizes:
            if rows < most and (split_s := latency.seconds(rows) + latency.seconds(most - rows)) < best_s:
                best, best_s = max(rows, most - rows), split_s
        return best
