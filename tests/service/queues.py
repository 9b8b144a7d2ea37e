"""What the tests of the queues share: jobs, and queues as processes of their own would have them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest

from engines.pipeline import Generate
from service.jobs import Failed, Finished, Job, Output, Priority, Timings
from service.queue.base import Bounds, JobQueue, Keep
from service.queue.redis import RedisQueue

MODEL = "tiny@000000000000"
FINISHED = Finished((b"image",), Timings(0, 0, 0, 0), (1,))
OTHER = Finished((b"other",), Timings(0, 0, 0, 0), (1,))
# Of newcomers, who may fill half of the room.
MAX_COST = 32
ROOM = 2 * MAX_COST
BOUNDS = Bounds(outcomes=3, bytes=1000)
KEEP = Keep(60.0, "a note")


def job(
    name: str,
    images: int = 1,
    steps: int = 4,
    *,
    age_s: float = 0.0,
    left_s: float = 60.0,
    model: str = MODEL,
    priority: Priority = Priority.NORMAL,
    identity: str = "",
) -> Job:
    """A job that was submitted ``age_s`` ago, with ``left_s`` to its deadline."""
    tasks = tuple(Generate("a cat", steps, 0.0, seed) for seed in range(images))
    now = time.monotonic()
    times = (now - age_s, now + left_s)
    return Job(name, f"request-{name}", tasks, Output("png"), *times, model, priority=priority, identity=identity)


def taken(queue: JobQueue, rows: int = 9, model: str = MODEL, wait_s: float = 0.0) -> list[str]:
    """The names of the jobs that are taken."""
    return [job.id for job in queue.take({model: rows}, wait_s)]


async def soon(queue: JobQueue, job_id: str) -> Finished | Failed:
    """Its outcome."""
    return await asyncio.wait_for(queue.outcome(job_id), 60)


@asynccontextmanager
async def opened(
    url: str, reclaim_after_s: float = 60.0, max_cost: int = ROOM, **told: Callable[..., None]
) -> AsyncIterator[RedisQueue]:
    """The queue at an address, closed whatever happens."""
    queue = RedisQueue(url, max_cost, bounds=BOUNDS, reclaim_after_s=reclaim_after_s, **told)
    try:
        yield queue
    finally:
        await queue.close()


def mute(queue: RedisQueue, monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on it renews nothing, as if its process stood still."""
    monkeypatch.setattr(queue._leases, "_renew", lambda: None)
