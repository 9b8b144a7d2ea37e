"""The embedded job queue: one process, no persistence."""

from __future__ import annotations

import asyncio
import math
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Mapping
from concurrent.futures import Future
from dataclasses import replace
from itertools import takewhile
from typing import ClassVar

from service.jobs import Finished, Job, Outcome
from service.queue.base import (
    CANCELLED,
    DEFAULT_BOUNDS,
    FARTHEST_POSITION,
    HEAD_START_S,
    RATE_MEMORY_S,
    Bounds,
    Keep,
    QueueFull,
    QueueStats,
    Stage,
    Status,
    retry_after_s,
)
from service.queue.shelf import Shelf

_SMOOTHING = 0.1
# Jobs that were taken and then given up make the queue look faster than it is.
_MARGIN = 1.25


class DrainRate:
    """How fast workers take cost off the queue, in row-ticks a second, forgetting over about ``memory_s``.

    Only time in which something waited counts: an idle worker says nothing about its speed.
    """

    def __init__(self, memory_s: float) -> None:
        self._memory_s = memory_s
        self._cost = 0.0
        self._seconds = 0.0
        self._busy_since: float | None = None

    def taken(self, cost: int, more_waiting: bool, now: float) -> None:
        """Note that ``cost`` was taken at ``now``, and whether anything was left waiting."""
        if self._busy_since is not None:
            elapsed = max(0.0, now - self._busy_since)
            kept = math.exp(-elapsed / self._memory_s)
            self._cost = self._cost * kept + cost
            self._seconds = self._seconds * kept + elapsed
        self._busy_since = now if more_waiting else None

    @property
    def per_second(self) -> float:
        """Row-ticks a second, 0 while nothing is known."""
        return self._cost / self._seconds if self._seconds > 0 else 0.0


def _rank(job: Job) -> float:
    """When the job was submitted, or would have been with no priority, to be where it is in the line."""
    return job.submitted - HEAD_START_S * job.priority


class MemoryQueue:
    """A JobQueue in memory that holds jobs of at most ``max_cost`` row-ticks.

    A job dearer than the whole bound is accepted when nothing else waits; otherwise it could never run. One that would
    come too late behind the others, as fast as they are taken, is refused: better now than when its time is over.
    """

    durable: ClassVar[bool] = False

    def __init__(
        self, max_cost: int, clock: Callable[[], float] = time.monotonic, bounds: Bounds = DEFAULT_BOUNDS
    ) -> None:
        self._max_cost = max_cost
        self._clock = clock
        self._changed = threading.Condition()
        self._waiting: OrderedDict[str, Job] = OrderedDict()
        self._waiting_cost = 0
        self._outcomes: dict[str, Future[Outcome]] = {}
        self._cancelled: set[str] = set()
        self._taken: dict[str, float] = {}
        self._making_s = 0.0
        self._rate = DrainRate(RATE_MEMORY_S)
        self._shelf = Shelf(bounds, clock)

    async def submit(self, job: Job, keep: Keep | None = None) -> str:
        """See JobQueue.submit."""
        with self._changed:
            if keep is not None and (holder := self._shelf.holder(keep)) is not None:
                return holder
            if job.id in self._outcomes or job.id in self._shelf:
                raise ValueError(f"job {job.id} was submitted before")
            if self._waiting and (self._waiting_cost + job.cost > self._max_cost or self._too_late(job)):
                raise QueueFull(self._retry_after_s())
            self._waiting[job.id] = job
            self._waiting_cost += job.cost
            if keep is None:
                self._outcomes[job.id] = _uncancellable()
            else:
                self._shelf.begin(job, keep)
            self._changed.notify_all()
            return job.id

    async def outcome(self, job_id: str) -> Outcome:
        """See JobQueue.outcome."""
        with self._changed:
            future = self._outcomes[job_id]
        outcome = await asyncio.wrap_future(future)
        with self._changed:
            self._outcomes.pop(job_id, None)
        return outcome

    async def status(self, job_id: str, preview: bool = False) -> Status:
        """See JobQueue.status."""
        with self._changed:
            return replace(self._shelf.status(job_id, preview), position=self._position(job_id))

    async def cancel(self, job_id: str) -> Stage | None:
        """See JobQueue.cancel."""
        with self._changed:
            goes_on = self._end(job_id, CANCELLED)
            self._outcomes.pop(job_id, None)
            if not goes_on:
                return None
            if (job := self._waiting.pop(job_id, None)) is not None:
                self._waiting_cost -= job.cost
                return "queued"
            self._cancelled.add(job_id)
            return "running"

    def take(self, models: Collection[str], rows: int, wait_s: float) -> list[Job]:
        """See JobQueue.take."""
        with self._changed:
            if wait_s > 0:
                self._changed.wait_for(lambda: self._next(models) is not None, wait_s)
            taken: list[Job] = []
            room = rows
            # The sort is stable: without priorities the order is that of submission.
            for job in sorted((job for job in self._waiting.values() if job.model in models), key=_rank):
                if room <= 0 or (taken and len(job.tasks) > room):
                    break
                taken.append(self._waiting.pop(job.id))
                self._shelf.taken(job.id)
                room -= len(job.tasks)
            self._taken |= dict.fromkeys((job.id for job in taken), self._clock())
            cost = sum(job.cost for job in taken)
            self._waiting_cost -= cost
            if taken:
                self._rate.taken(cost, bool(self._waiting), self._clock())
            return taken

    def cancelled(self, job_ids: Iterable[str]) -> set[str]:
        """See JobQueue.cancelled."""
        with self._changed:
            return self._cancelled.intersection(job_ids)

    def progress(self, done: Mapping[str, int]) -> set[str]:
        """See JobQueue.progress."""
        with self._changed:
            return {job_id for job_id, ticks in done.items() if self._shelf.progress(job_id, ticks)}

    def show(self, job_id: str, preview: bytes) -> None:
        """See JobQueue.show."""
        with self._changed:
            self._shelf.show(job_id, preview)

    def settle(self, job_id: str, outcome: Outcome) -> bool:
        """See JobQueue.settle."""
        with self._changed:
            self._cancelled.discard(job_id)
            if (taken := self._taken.pop(job_id, None)) is not None and isinstance(outcome, Finished):
                self._making_s += _SMOOTHING * (self._clock() - taken - self._making_s)
            return self._end(job_id, outcome)

    def stats(self) -> QueueStats:
        """See JobQueue.stats."""
        with self._changed:
            oldest = next(iter(self._waiting.values()), None)
            age = max(0.0, self._clock() - oldest.submitted) if oldest else 0.0
            return QueueStats(len(self._waiting), self._waiting_cost, age)

    async def close(self) -> None:
        """See JobQueue.close."""

    def _end(self, job_id: str, outcome: Outcome) -> bool:
        """Hand the outcome over. True for the first of a job."""
        if job_id in self._shelf:
            return self._shelf.end(job_id, outcome)
        future = self._outcomes.get(job_id)
        if future is None or future.done():
            return False
        future.set_result(outcome)
        return True

    def _position(self, job_id: str) -> int | None:
        wanted = self._waiting.get(job_id)
        if wanted is None:
            return None
        before = takewhile(lambda job: job is not wanted, self._waiting.values())
        position = sum(job.model == wanted.model for job in before)
        return position if position <= FARTHEST_POSITION else None

    def _next(self, models: Collection[str]) -> Job | None:
        return next((job for job in self._waiting.values() if job.model in models), None)

    def _too_late(self, job: Job) -> bool:
        """Whether the job would be done after its deadline, as fast as others were taken and then made."""
        if self._rate.per_second == 0:
            return False
        waits_s = (self._waiting_cost + job.cost) / self._rate.per_second
        return self._clock() + _MARGIN * (waits_s + self._making_s) > job.deadline

    def _retry_after_s(self) -> float:
        return retry_after_s(self._waiting_cost, self._rate.per_second)


def _uncancellable() -> Future[Outcome]:
    """A running future cannot be cancelled by an impatient waiter: giving up goes through `cancel`."""
    future: Future[Outcome] = Future()
    future.set_running_or_notify_cancel()
    return future
