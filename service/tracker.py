"""Jobs that go on whether or not their client waits: how far they are, what became of them. Makes no answers."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Iterator
from contextlib import contextmanager
from dataclasses import replace

from service.errors import job_not_found, queue_unavailable, too_many_requests
from service.jobs import EXPIRED
from service.queue.base import LATE_S, JobQueue, QueueUnavailable, Status
from service.telemetry.metrics import Metrics

HEARTBEAT_S = 15.0
"""The longest silence of `Tracker.follow`."""

# A job that moves is asked about often, one that waits seldom.
_POLLS_S = (0.005, 0.25)
_SLOWER = 1.5


class Tracker:
    """Tells of jobs whose outcome the queue keeps, whichever process accepted them.

    Who asks for a job now and then is taken to come again for ``patience_s`` seconds after each time.
    """

    def __init__(
        self,
        queue: JobQueue,
        metrics: Metrics,
        stopping: asyncio.Event,
        patience_s: float,
    ) -> None:
        self._queue = queue
        self._metrics = metrics
        self._stopping = stopping
        self._patience_s = patience_s
        self.following = 0
        self._awaited: dict[str, float] = {}

    def expect(self, job_id: str) -> None:
        """Note that somebody will ask what became of a job."""
        self._awaited.pop(job_id, None)
        self._awaited[job_id] = time.monotonic()
        self._let_go()

    @property
    def awaited(self) -> bool:
        """Whether somebody who asked for a job, or was given one, may come again to be told of its end."""
        self._let_go()
        return bool(self._awaited)

    def _let_go(self) -> None:
        """Forget those who do not come again."""
        while self._awaited:
            job_id, heard = next(iter(self._awaited.items()))
            if heard + self._patience_s > time.monotonic():
                return
            del self._awaited[job_id]

    async def status(self, job_id: str) -> Status:
        """How far the job has come. Raises ApiError 404 for one that is not known (any more), 503 without a queue."""
        try:
            status = await self._look(job_id)
            if status.outcome is None:
                self.expect(job_id)
            else:
                self._awaited.pop(job_id, None)
            return status
        except KeyError:
            raise job_not_found(job_id) from None
        except QueueUnavailable as error:
            raise queue_unavailable() from error

    async def cancel(self, job_id: str) -> Status:
        """Give the job up, unless it is over, and tell what became of it. Raises as `status` does."""
        status = await self.status(job_id)  # Only a job that is kept may be cancelled by whoever knows its id.
        if status.outcome is not None:
            return status  # Also where it failed by its deadline alone, which the queue does not know.
        try:
            stage = await self._queue.cancel(job_id)
        except QueueUnavailable as error:
            raise queue_unavailable() from error
        if stage is not None:
            self._metrics.cancelled.labels(stage).inc()
            self._metrics.jobs.labels("cancelled").inc()
        return await self.status(job_id)

    @contextmanager
    def follower(self, most: int) -> Iterator[None]:
        """Count one who is told of a job as it moves, which ``most`` may be. Raises ApiError 429 instead."""
        if self.following >= most:
            self._metrics.rejected.labels("too_many_requests").inc()
            raise too_many_requests()
        self.following += 1
        try:
            yield
        finally:
            self.following -= 1

    async def follow(self, job_id: str, preview: bool = False) -> AsyncGenerator[Status | None, None]:
        """The status whenever it has changed, until the job is over or the service stops; None for a heartbeat.

        While the queue is away nothing changes. Raises KeyError for a job that is not known (any more).
        """
        last: Status | None = None
        shortest, longest = _POLLS_S
        wait_s, told = shortest, time.monotonic()
        while True:
            stopping = self._stopping.is_set()
            status = await self._look_if_there(job_id, preview)
            if status is not None and (last is None or _differ(status, last)):
                yield status
                last, wait_s, told = status, shortest, time.monotonic()
            elif time.monotonic() - told >= HEARTBEAT_S:
                yield None
                told = time.monotonic()
            if last is not None and last.outcome is not None:
                self._awaited.pop(job_id, None)
                return
            if stopping:
                return
            await self._pause(job_id, wait_s)
            wait_s = min(wait_s * _SLOWER, longest)

    async def over(self, job_id: str) -> Status:
        """The status of the job once it is over; the last one known where the service stops. KeyError as `follow`."""
        found: Status | None = None
        async for status in self.follow(job_id):
            found = status or found
        if found is None:
            raise KeyError(job_id)
        return found

    async def _look(self, job_id: str, preview: bool = False) -> Status:
        status = await self._queue.status(job_id, preview)
        if status.outcome is None and status.left_s < -LATE_S:
            return replace(status, state="failed", position=None, outcome=EXPIRED)
        return status

    async def _look_if_there(self, job_id: str, preview: bool) -> Status | None:
        try:
            return await self._look(job_id, preview)
        except QueueUnavailable:
            return None

    async def _pause(self, job_id: str, seconds: float) -> None:
        """Wait, at most until the service stops or the job is over."""
        waiting = [asyncio.ensure_future(one) for one in (self._stopping.wait(), self._queue.ended(job_id, seconds))]
        try:
            await asyncio.wait(waiting, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for one in waiting:
                if one.cancel() is False:
                    one.exception()  # of a job that is known no longer: whoever asks for it next is told


def _differ(status: Status, other: Status) -> bool:
    return any(getattr(status, name) != getattr(other, name) for name in ("state", "done", "position", "preview"))
