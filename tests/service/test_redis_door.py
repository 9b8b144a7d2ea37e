"""The door of the queue in Redis is a script: it must do as the one in memory, which the simulations are of."""

from __future__ import annotations

import time
from dataclasses import replace
from itertools import product
from random import Random

import pytest
import redis

from engines.pipeline import Generate
from service.jobs import Finished, Job, Output, Priority, Timings
from service.queue import keys
from service.queue.base import JobQueue, QueueFull
from service.queue.memory import MemoryQueue
from service.queue.redis import RedisQueue
from tests.service import queues
from tests.service.queues import MODEL, opened
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


async def knock(queue: JobQueue, jobs: list[Job], model: str, others: list[Job]) -> list[float]:
    """Seconds that each job is told to wait, 0 for those that are let in while other models have work too."""
    waits = []
    for job in others:
        queue.expect(job.model, 23.0)
        await queue.submit(replace(job, submitted=time.monotonic(), deadline=time.monotonic() + 3600.0))
    for k, job in enumerate(jobs):
        now = time.monotonic()
        try:
            # Alone there were room for 77.5 row-ticks of newcomers: no sum of the jobs' costs comes near it.
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
    memory, other = MemoryQueue(MAX_COST), RedisQueue(redis_server.url, MAX_COST)
    for turn in range(TRIES):
        model = f"tiny@{turn:012}"
        jobs, others = some_jobs(seed, model), some_jobs(seed, f"other@{turn:012}")[: 2 * seed]
        begin = time.monotonic()
        there, here = await knock(other, jobs, model, others), await knock(memory, jobs, model, others)
        if time.monotonic() - begin < SHORT_S:  # else the machine was too busy
            break
    await other.close()
    assert [wait == 0 for wait in there] == [wait == 0 for wait in here]
    assert there == pytest.approx(here, abs=2)
    assert 5 < sum(wait == 0 for wait in here) < 55
    assert max(here) > 5


def pass_time(client: redis.Redis, model: str, seconds: float) -> None:
    """As if the queue had stood still for so long: all that it notes of the times of its throughput is older."""
    for name in ("since", "paused", "resumed"):
        if client.hexists(keys.load(model), name):
            client.hincrby(keys.load(model), name, -keys.milliseconds(seconds))


async def test_what_was_promised_before_its_clock_went_back_binds_nobody(
    anyio_backend: str, redis_server: RedisServer
) -> None:
    async def refused(name: str) -> float:
        with pytest.raises(QueueFull) as full:
            await queue.ask(queues.job(name, identity=name))
        return full.value.retry_after_s

    async with opened(redis_server.url) as queue:
        queue.expect(MODEL, 2.0)
        await queue.submit(queues.job("first", images=6))
        begin_s = await refused("a")
        assert await refused("b") > begin_s + 4
        with redis_server.client() as client:
            client.zincrby(keys.promises(MODEL), 3_600_000, "a")
            for priority in Priority:
                client.hincrbyfloat(keys.load(MODEL), f"next_promise:{priority:d}", 3_600_000)
        assert await refused("a") == pytest.approx(begin_s, abs=2)
        assert begin_s + 4 < await refused("c") < begin_s + 20


async def test_one_promise_far_ahead_is_not_given_to_many(anyio_backend: str, redis_server: RedisServer) -> None:
    """What follows on it lies farther ahead than anyone is told to wait, and is a time nevertheless."""
    waits = []
    async with opened(redis_server.url, max_cost=100_000) as there:
        for queue in (there, MemoryQueue(100_000)):
            queue.expect(MODEL, 1.0)
            await queue.submit(queues.job("first", left_s=3600.0))
            told = []
            for name in "abcd":
                with pytest.raises(QueueFull) as full:
                    await queue.ask(queues.job(name, images=74, left_s=600.0, identity=name))
                told.append(full.value.retry_after_s)
            waits.append(told)
    assert waits[0] == pytest.approx(waits[1], abs=2)
    assert waits[1][0] < 590
    assert waits[1][1:] == [600.0] * 3


@pytest.mark.parametrize(("seed", "expected"), [(0, 20.0), (1, 20.0), (2, 20.0), (3, 1e6)])
async def test_the_throughput_in_redis_is_the_one_in_memory(
    anyio_backend: str, redis_server: RedisServer, seed: int, expected: float
) -> None:
    """Jobs that are finished after a time, and were worked on for another one: some of it before others were.

    Other models have work meanwhile, one of them less than this one. What is expected may be far too much.
    """
    rng, model, others = Random(seed), f"tiny@{seed:012}", {"many@000000000000": 60, "few@000000000000": 10}
    passed, moment = 0.0, time.monotonic()
    memory = MemoryQueue(100_000, lambda: moment + passed)
    async with opened(redis_server.url, max_cost=100_000) as there:
        with redis_server.client() as client:
            seconds, microseconds = client.time()
            ahead_s = moment - seconds - microseconds / 1e6

            def noted_at(name: str) -> float:
                """When Redis last noted something of a model: where this process pauses, it is the same for both."""
                since = client.hget(keys.load(name), "since")
                return moment if since is None else ahead_s + int(since) / 1000

            for name, count in {**others, model: 60}.items():
                for job, queue in product(some_jobs(seed, name)[:count], (there, memory)):
                    await queue.submit(replace(job, submitted=time.monotonic(), deadline=time.monotonic() + 3600.0))
                    moment = noted_at(name)
                for queue in (there, memory):
                    queue.expect(name, expected if name == model else 20.0)
            throughput = memory._doors[model].throughput
            for job in there.take({model: 1000}, 0.0):
                gap_s, worked_s = rng.choice([0.3, 0.3, 0.3, 5.0, 20.0]), rng.choice([0.1, 0.1, 2.0, 17.0])
                pass_time(client, model, gap_s)
                passed += gap_s
                finished = Finished((), Timings(50.0, worked_s / 4, worked_s / 2, worked_s / 4), ())
                memory.take({model: 1000}, 0.0)
                there.settle(job.id, finished)
                moment = noted_at(model)
                memory.settle(job.id, finished)
                kept = {name: float(value) for name, value in client.hgetall(keys.speed(model)).items()}
                seconds = kept[b"seconds"]
                speed, alone = (kept[b"finished"] / of for of in (seconds, kept.get(b"alone", seconds)))
                assert speed == pytest.approx(throughput.per_second, rel=0.1)
                assert alone == pytest.approx(throughput.alone_per_second, rel=0.1)
    assert alone > 1.5 * speed
