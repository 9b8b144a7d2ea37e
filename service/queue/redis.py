"""The job queue in Redis: any number of API processes and of workers, on any number of hosts."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import ClassVar

from service.jobs import Job, Outcome
from service.queue import keys
from service.queue.base import DEFAULT_BOUNDS, Bounds, Keep, QueueStats, QueueUnavailable, Stage, Status
from service.queue.clients import AWAY, CoroutinesRedis, ThreadsRedis
from service.queue.leases import Leases
from service.queue.submissions import Submissions


def _ignore(*_: object) -> None:
    pass


class RedisQueue:
    """A JobQueue in the Redis (6.2 or later) at ``url``, where at most ``max_cost`` row-ticks wait for each model.

    Its script `submit` is the door of them all.

    Each model has a stream for each priority, which its workers read as one consumer group, at least once. They take
    the first of the streams' heads by age and priority, or by deadline where that is at risk. The jobs of a worker
    that was silent for ``reclaim_after_s`` go to another, alone, and what has been tried three times goes to the
    stream of dead letters. Redis must not evict keys (maxmemory-policy noeviction), and what it accepted outlives
    its own death only where it persists (appendonly). Outcomes that are kept lie there too, within the ``bounds`` of
    the process that settles. Connections are opened when they are needed.

    All keys lie in one slot: a cluster keeps the whole queue on one of its nodes.
    """

    durable: ClassVar[bool] = True

    def __init__(
        self,
        url: str,
        max_cost: int,
        *,
        bounds: Bounds = DEFAULT_BOUNDS,
        reclaim_after_s: float = 15.0,
        on_redelivery: Callable[[], None] = _ignore,
        on_dead_letter: Callable[[], None] = _ignore,
        on_late_outcome: Callable[[Outcome], None] = _ignore,
        on_untaken: Callable[[], None] = _ignore,
    ) -> None:
        """`on_late_outcome` is told of what became of each job whose outcome could not be handed over at once.

        `on_untaken` is told of each job that no worker took before its time, whichever process accepted it.
        """
        self._on_untaken = on_untaken
        self._threads = ThreadsRedis(url)
        self._coroutines = CoroutinesRedis(url)
        self._submissions = Submissions(self._coroutines, max_cost, bounds)
        self._leases = Leases(self._threads, reclaim_after_s, bounds, on_redelivery, on_dead_letter, on_late_outcome)

    async def submit(self, job: Job, keep: Keep | None = None) -> str:
        """See JobQueue.submit."""
        return await self._submissions.submit(job, keep)

    async def ask(self, job: Job, keep: Keep | None = None) -> None:
        """See JobQueue.ask."""
        await self._submissions.ask(job, keep)

    async def holder(self, keep: Keep) -> str | None:
        """See JobQueue.holder."""
        return await self._submissions.holder(keep)

    async def outcome(self, job_id: str) -> Outcome:
        """See JobQueue.outcome."""
        return await self._submissions.outcome(job_id)

    async def status(self, job_id: str, preview: bool = False) -> Status:
        """See JobQueue.status."""
        return await self._submissions.status(job_id, preview)

    async def ended(self, job_id: str, wait_s: float) -> None:
        """See JobQueue.ended: any process may settle it, so that is not known at once."""
        await asyncio.sleep(wait_s)

    async def cancel(self, job_id: str) -> Stage | None:
        """See JobQueue.cancel."""
        return await self._submissions.cancel(job_id)

    def take(self, rooms: Mapping[str, int], wait_s: float, refused: Collection[str] = ()) -> list[Job]:
        """See JobQueue.take."""
        return self._leases.take(rooms, wait_s, refused)

    def pass_on(self, job_id: str) -> bool:
        """See JobQueue.pass_on."""
        return self._leases.pass_on(job_id)

    def expect(self, model: str, per_second: float) -> None:
        """See JobQueue.expect."""
        self._leases.expect(model, per_second)

    def cancelled(self, job_ids: Iterable[str]) -> set[str]:
        """See JobQueue.cancelled."""
        return self._leases.cancelled(job_ids)

    def progress(self, done: Mapping[str, int]) -> set[str]:
        """See JobQueue.progress."""
        return self._leases.progress(done)

    def show(self, job_id: str, preview: bytes) -> None:
        """See JobQueue.show."""
        self._leases.show(job_id, preview)

    def settle(self, job_id: str, outcome: Outcome) -> Outcome | None:
        """See JobQueue.settle."""
        return self._leases.settle(job_id, outcome)

    def owes(self, model: str) -> bool:
        """See JobQueue.owes."""
        return self._leases.owes(model)

    def stats(self) -> QueueStats:
        """See JobQueue.stats."""
        try:
            depth, cost, oldest_ms, untaken = self._threads.run("stats", [keys.MODELS])
        except AWAY as error:
            raise QueueUnavailable from error
        for _ in range(untaken):
            self._on_untaken()
        return QueueStats(depth, cost, oldest_ms / 1000)

    async def close(self) -> None:
        """See JobQueue.close."""
        await self._submissions.close()
        await asyncio.to_thread(self._leases.close)
        await self._coroutines.close()
        await asyncio.to_thread(self._threads.close)
