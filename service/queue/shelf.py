"""Jobs whose outcome is kept, in memory. Knows nothing of waiting or of threads: the queue holds a lock around it."""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field

from service.jobs import Finished, Job, Outcome
from service.queue.base import FRESH_S, LATE_S, WATCHED_S, Bounds, JobState, Keep, KeyConflict, Status, state_after
from service.threads import uncancellable


@dataclass(eq=False, slots=True)
class _Entry:
    keep: Keep
    total: int
    deadline: float
    state: JobState = "queued"
    done: int = 0
    outcome: Outcome | None = None
    expires: float = math.inf
    watched_until: float = -math.inf
    preview: bytes | None = None
    ended: Future[Outcome] = field(default_factory=uncancellable)

    @property
    def size(self) -> int:
        """Bytes of its images."""
        return sum(map(len, self.outcome.images)) if isinstance(self.outcome, Finished) else 0


class Shelf:
    """How far each job has come, and for a while what became of it."""

    def __init__(self, bounds: Bounds, clock: Callable[[], float]) -> None:
        self._bounds = bounds
        self._clock = clock
        self._entries: dict[str, _Entry] = {}
        self._over: OrderedDict[str, _Entry] = OrderedDict()
        self._ends: list[tuple[float, str]] = []  # of these, by when they expire
        self._bytes = 0
        self._keys: dict[str, str] = {}

    def __contains__(self, job_id: str) -> bool:
        return job_id in self._entries

    def holder(self, keep: Keep) -> str | None:
        """The job that the key names, unless it failed. Raises KeyConflict."""
        self._drop_old()
        job_id = self._keys.get(keep.key) if keep.key is not None else None
        if job_id is None or self._failed(self._entries[job_id]):
            return None
        if self._entries[job_id].keep.digest != keep.digest:
            raise KeyConflict
        return job_id

    def _failed(self, entry: _Entry) -> bool:
        if entry.outcome is None:
            # What waits then is not made any more.
            return self._clock() > entry.deadline + (LATE_S if entry.state == "running" else 0.0)
        return entry.state != "done"

    def is_late(self, job_id: str) -> bool:
        """Whether it is one of these, and whoever asks is told that it has failed by its deadline."""
        entry = self._entries.get(job_id)
        return entry is not None and self._clock() > entry.deadline + LATE_S

    def begin(self, job: Job, keep: Keep) -> None:
        """A job was accepted."""
        self._entries[job.id] = _Entry(keep, job.cost, job.deadline)
        if keep.key is not None:
            self._keys[keep.key] = job.id

    def taken(self, job_id: str) -> None:
        """It was taken, if it is one of these."""
        if (entry := self._entries.get(job_id)) is not None:
            entry.state = "running"

    def progress(self, job_id: str, done: int) -> bool:
        """So many of its row-ticks have run, if it is one of these and not over. Says whether previews are wanted."""
        entry = self._entries.get(job_id)
        if entry is None or entry.outcome is not None:
            return False
        entry.done = done
        return entry.watched_until > self._clock()

    def show(self, job_id: str, preview: bytes) -> None:
        """There is a preview of it, if it is one of these and not over."""
        entry = self._entries.get(job_id)
        if entry is not None and entry.outcome is None:
            entry.preview = preview

    def end(self, job_id: str, outcome: Outcome) -> bool:
        """It has an outcome. The first one counts and gives True."""
        entry = self._entries[job_id]
        if entry.outcome is not None:
            return False
        entry.outcome, entry.preview = outcome, None
        entry.ended.set_result(outcome)
        entry.state = state_after(outcome)
        entry.expires = self._clock() + entry.keep.seconds
        self._over[job_id] = entry
        insort(self._ends, (entry.expires, job_id))
        self._bytes += entry.size
        self._drop_old()
        return True

    def ended(self, job_id: str) -> Future[Outcome]:
        """What is done when the job is over; KeyError where it is not here."""
        return self._entries[job_id].ended

    def status(self, job_id: str, preview: bool) -> Status:
        """How far it has come; its position is the queue's to say. KeyError where it is not here."""
        self._drop_old()
        entry = self._entries[job_id]
        now = self._clock()
        if preview:
            entry.watched_until = now + WATCHED_S
        return Status(
            state=entry.state,
            done=entry.done,
            total=entry.total,
            left_s=entry.deadline - now,
            note=entry.keep.note,
            outcome=entry.outcome,
            preview=entry.preview if preview else None,
        )

    def _drop_old(self) -> None:
        while self._ends and self._ends[0][0] <= self._clock():
            self._drop(self._ends[0][1])
        while self._has_too_much():
            self._drop(next(iter(self._over)))

    def _drop(self, job_id: str) -> None:
        entry = self._over.pop(job_id)
        del self._ends[bisect_left(self._ends, (entry.expires, job_id))]
        del self._entries[job_id]
        self._bytes -= entry.size
        if entry.keep.key is not None and self._keys.get(entry.keep.key) == job_id:
            del self._keys[entry.keep.key]

    def _has_too_much(self) -> bool:
        if len(self._over) <= 1 or (len(self._over) <= self._bounds.outcomes and self._bytes <= self._bounds.bytes):
            return False
        oldest = next(iter(self._over.values()))
        return oldest.expires - oldest.keep.seconds + FRESH_S <= self._clock()
