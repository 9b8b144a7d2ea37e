"""Which rows form the next tick. Pure policy: no threads, no clock; time is an argument."""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Candidate:
    """One image that still needs ticks. Only candidates of one ``group`` can share a tick.

    ``arrived`` and ``deadline`` are seconds on the caller's clock.
    """

    job_id: str
    index: int
    group: Hashable
    arrived: float
    deadline: float


@dataclass(frozen=True, slots=True)
class Plan:
    """What to do now: the rows of the next tick, and the jobs whose deadline has passed."""

    batch: tuple[Candidate, ...]
    expired: frozenset[str]


class Scheduler:
    """Continuous batching, oldest first.

    Each tick goes to the group of the oldest candidate and is filled with that group's candidates by age,
    whatever their endpoint and their place on the grid. So nothing starves: the oldest row moves at every
    tick. And a lone row never waits for company.
    """

    def __init__(self, max_rows: int) -> None:
        if max_rows < 1:
            raise ValueError(f"a tick needs room for a row, got {max_rows}")
        self.max_rows = max_rows

    def plan(self, candidates: Iterable[Candidate], now: float) -> Plan:
        """The next tick among ``candidates``; an expired job never ticks."""
        live: list[Candidate] = []
        expired: set[str] = set()
        for candidate in candidates:
            if candidate.deadline <= now:
                expired.add(candidate.job_id)
            else:
                live.append(candidate)
        if not live:
            return Plan((), frozenset(expired))
        live.sort(key=_age)
        group = live[0].group
        batch = [candidate for candidate in live if candidate.group == group]
        return Plan(tuple(batch[: self.max_rows]), frozenset(expired))


def _age(candidate: Candidate) -> tuple[float, str, int]:
    return candidate.arrived, candidate.job_id, candidate.index
