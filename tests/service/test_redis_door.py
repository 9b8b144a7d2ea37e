"""The door of the queue in Redis is a script: it must do as the one in memory, which the simulations are of."""

from __future__ import annotations

import time
from dataclasses import replace
from random import Random

import pytest

from engines.pipeline import Generate
from service.jobs import Job, Output, Priority
from service.queue.base import JobQueue, QueueFull
from service.queue.memory import MemoryQueue
from service.queue.redis import RedisQueue
from tests.service.redis_server import RedisServer

pytestmark = pytest.mark.anyio

MAX_COST = 600
# In so short a time no promise falls due.
SHORT_S = 0.9
TRIES = 20


def some_jobs(seed: int, model: str) -> list[Job]:
    rng = Random(seed)
    jobs = []
    for k in range(60):
        tasks = tuple(Generate("a cat", 4, 0.0, seed) for seed in range(rng.randint(1, 4)))
        identity = rng.choice(["", *(f"client {n}" for n in range(20))])
        priority = rng.choice(list(Priority))
        output = Output("png")
        jobs.append(Job(f"{model}-{k}", "", tasks, output, 0.0, 0.0, model, priority=priority, identity=identity))
    return jobs


async def knock(queue: JobQueue, jobs: list[Job], model: str) -> list[float]:
    """Seconds that each job is told to wait, 0 for those that are let in."""
    waits = []
    for k, job in enumerate(jobs):
        now = time.monotonic()
        try:
            # Room for 77.5 row-ticks of newcomers: no sum of the jobs' costs comes near it.
            await queue.submit(replace(job, submitted=now, deadline=now + 31.0))
            waits.append(0.0)
        except QueueFull as full:
            waits.append(full.retry_after_s)
        if k % 10 == 0:
            queue.take({model: 9}, 0.0)
            queue.expect(model, 20.0)
    return waits


@pytest.mark.parametrize("seed", range(3))
async def test_the_door_in_redis_is_the_one_in_memory(anyio_backend: str, redis_server: RedisServer, seed: int) -> None:
    """The same jobs in the same order: as many are let in, and the others are told the same times."""
    memory, redis = MemoryQueue(MAX_COST), RedisQueue(redis_server.url, MAX_COST)
    for turn in range(TRIES):
        model = f"tiny@{turn:012}"
        jobs = some_jobs(seed, model)
        begin = time.monotonic()
        there, here = await knock(redis, jobs, model), await knock(memory, jobs, model)
        if time.monotonic() - begin < SHORT_S:  # else the machine was too busy
            break
    await redis.close()
    assert [wait == 0 for wait in there] == [wait == 0 for wait in here]
    assert there == pytest.approx(here, abs=2)
    assert 5 < sum(wait == 0 for wait in here) < 55
    assert max(here) > 5
