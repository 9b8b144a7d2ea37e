"""The embedded job queue: one process, no persistence."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping
from concurrent.futures import Future
from dataclasses import replace
from operator import itemgetter
from typing import ClassVar
from weakref import WeakKeyDictionary

from service.jobs import CANCELLED, EXPIRED, Job, Outcome
from service.queue.admission import Door
from service.queue.base import (
    DEFAULT_BOUNDS,
    FARTHEST_POSITION,
    LATE_S,
    Bounds,
    Keep,
    QueueFull,
    QueueStats,
    Stage,
    Status,
    finishing_s,
    worked_s,
)
from service.queue.line import Line, urgency
from service.queue.shelf import Shelf
from service.threads import uncancellable


class MemoryQueue:
    """A JobQueue in memory, where at most ``max_cost`` row-ticks wait for each model. Its doors say who is let in."""

    durable: ClassVar[bool] = False

    def __init__(
        self,
        max_cost: int,
        clock: Callable[[], float] = time.monotonic,
        bounds: Bounds = DEFAULT_BOUNDS,
        on_untaken: Callable[[], None] = lambda: None,
    ) -> None:
        """`on_untaken` is told of each job that was not taken before its time."""
        self._clock = clock
        self._on_untaken = on_untaken
        self._changed = threading.Condition()
        self._waiting: OrderedDict[str, Job] = OrderedDict()
        self._lines: defaultdict[str, Line] = defaultdict(Line)
        self._doors: defaultdict[str, Door] = defaultdict(lambda: Door(max_cost, self._doors.values()))
        self._outcomes: dict[str, Future[Outcome]] = {}
        self._cancelled: set[str] = set()
        self._taken: dict[str, Job] = {}
        self._shelf = Shelf(bounds, clock)
        self._ends: WeakKeyDictionary[Future[Outcome], asyncio.Future[Outcome]] = WeakKeyDictionary()

    async def submit(self, job: Job, keep: Keep | None = None) -> str:
        """See JobQueue.submit."""
        with self._changed:
            if keep is not None and (holder := self._shelf.holder(keep)) is not None:
                return holder
            if job.id in self._outcomes or job.id in self._shelf:
                raise ValueError(f"job {job.id} was submitted before")
            self._drop_late()
            now = self._clock()
            wait_s = self._doors[job.model].knock(job.identity, job.cost, job.deadline - now, now, job.priority)
            if wait_s is not None:
                raise QueueFull(wait_s)
            self._waiting[job.id] = job
            self._lines[job.model].add(job)
            if keep is None:
                self._outcomes[job.id] = uncancellable()
            else:
                self._shelf.begin(job, keep)
            self._changed.notify_all()
            return job.id

    async def ask(self, job: Job, keep: Keep | None = None) -> None:
        """See JobQueue.ask."""
        with self._changed:
            if keep is not None and self._shelf.holder(keep) is not None:
                return
            self._drop_late()
            now = self._clock()
            wait_s = self._doors[job.model].ask(job.identity, job.cost, job.deadline - now, now, job.priority)
            if wait_s is not None:
                raise QueueFull(wait_s)

    async def holder(self, keep: Keep) -> str | None:
        """See JobQueue.holder."""
        with self._changed:
            return self._shelf.holder(keep)

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

    async def ended(self, job_id: str, wait_s: float) -> None:
        """See JobQueue.ended."""
        with self._changed:
            over = self._shelf.ended(job_id)
            # One for all who ask and ask again: nothing takes back what it adds to the job's own.
            end = self._ends.get(over) or self._ends.setdefault(over, asyncio.wrap_future(over))
        await asyncio.wait({end}, timeout=wait_s)

    async def cancel(self, job_id: str) -> Stage | None:
        """See JobQueue.cancel."""
        with self._changed:
            goes_on = self._end(job_id, CANCELLED)
            self._outcomes.pop(job_id, None)
            if not goes_on:
                return None
            if job_id in self._waiting:
                self._withdraw(job_id)
                return "queued"
            self._cancelled.add(job_id)
            return "running"

    def take(self, rooms: Mapping[str, int], wait_s: float, refused: Collection[str] = ()) -> list[Job]:
        """See JobQueue.take. There is one worker: nothing is left to others."""
        with self._changed:
            if wait_s > 0:
                self._changed.wait_for(lambda: any(self._lines[model] for model in rooms), wait_s)
            taken = self._first(rooms)
            for job in taken:
                self._taken[job.id] = self._leave(job.id)
                self._shelf.taken(job.id)
                self._doors[job.model].took(job.cost, job.priority)
            return taken

    def pass_on(self, job_id: str) -> bool:
        """See JobQueue.pass_on."""
        return False

    def expect(self, model: str, per_second: float) -> None:
        """See JobQueue.expect."""
        with self._changed:
            self._doors[model].throughput.expect(per_second)

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

    def settle(self, job_id: str, outcome: Outcome) -> Outcome | None:
        """See JobQueue.settle."""
        with self._changed:
            self._cancelled.discard(job_id)
            if (job := self._taken.pop(job_id, None)) is not None:
                self._doors[job.model].settled(job.cost, worked_s(outcome), self._clock(), finishing_s(outcome))
            became = EXPIRED if self._shelf.is_late(job_id) else outcome
            return became if self._end(job_id, became) else None

    def owes(self, model: str) -> bool:
        """See JobQueue.owes."""
        with self._changed:
            return any(job.model == model for jobs in (self._waiting, self._taken) for job in jobs.values())

    def stats(self) -> QueueStats:
        """See JobQueue.stats."""
        with self._changed:
            self._drop_late()
            oldest = next(iter(self._waiting.values()), None)
            age = max(0.0, self._clock() - oldest.submitted) if oldest else 0.0
            cost = sum(door.waiting for door in self._doors.values())
            return QueueStats(len(self._waiting), cost, age)

    async def close(self) -> None:
        """See JobQueue.close."""

    def _drop_late(self) -> None:
        late = self._clock() - LATE_S
        for job in [job for line in self._lines.values() for job in line.due_before(late)]:
            self._withdraw(job.id)
            if self._end(job.id, EXPIRED):
                self._on_untaken()

    def _withdraw(self, job_id: str) -> None:
        job = self._leave(job_id)
        self._doors[job.model].withdrew(job.cost, job.priority)

    def _leave(self, job_id: str) -> Job:
        job = self._waiting.pop(job_id)
        self._lines[job.model].remove(job)
        return job

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
        position = self._lines[wanted.model].position(wanted)
        return position if position <= FARTHEST_POSITION else None

    def _first(self, rooms: Mapping[str, int]) -> list[Job]:
        """Of each model those first in its line; of all that is taken the most urgent first."""
        now, found = self._clock(), []
        for model, room in rooms.items():
            if line := self._lines[model]:
                done_by = now + self._doors[model].backlog_s
                found += [(urgency(job, done_by), job) for job in line.first(room, done_by)]
        # The sort is stable: of those that are alike the first model's go first.
        return [job for _, job in sorted(found, key=itemgetter(0))]
