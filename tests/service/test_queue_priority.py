"""The contract of a job queue: a step of priority is a head start, and no more."""

from __future__ import annotations

import asyncio

import pytest

from service.jobs import Priority
from service.queue import base, leases, submissions
from service.queue.base import JobQueue, QueueStats
from tests.service.queues import FINISHED, KEEP, MODEL, job, taken

pytestmark = pytest.mark.anyio

LOW, NORMAL, HIGH = Priority


@pytest.fixture
def short_head_start(monkeypatch: pytest.MonkeyPatch) -> float:
    """Seconds that a step of priority is worth in this test."""
    for module in (leases, base, submissions):
        monkeypatch.setattr(module, "HEAD_START_S", 0.1)
    return 0.1


async def test_of_jobs_that_wait_those_of_high_priority_go_first(queue: JobQueue) -> None:
    for name, priority in zip("abcdef", [LOW, NORMAL, HIGH] * 2, strict=True):
        await queue.submit(job(name, priority=priority), KEEP)
    positions = [(await queue.status(name)).position for name in "abcdef"]
    assert positions == [4, 2, 0, 5, 3, 1]
    assert queue.stats().depth == 6
    assert taken(queue, 1) == ["c"]
    assert (await queue.status("f")).position == 0
    assert (await queue.status("d")).position == 4
    assert taken(queue, 3) == ["f", "b", "e"]
    assert taken(queue, 9) == ["a", "d"]


async def test_what_waited_longer_than_the_head_start_is_not_overtaken(
    queue: JobQueue, short_head_start: float
) -> None:
    for name, priority in (("low", LOW), ("normal", NORMAL)):
        await queue.submit(job(name, priority=priority), KEEP)
    await asyncio.sleep(2.5 * short_head_start)
    await queue.submit(job("high", priority=HIGH), KEEP)
    assert [(await queue.status(name)).position for name in ("low", "normal", "high")] in ([0, 1, 2], [1, 0, 2])
    assert taken(queue)[-1] == "high"


async def test_priorities_count_among_models_too(queue: JobQueue) -> None:
    await queue.submit(job("a", model="one@1"))
    await queue.submit(job("b", model="two@2", priority=HIGH))
    assert [found.id for found in queue.take({"one@1": 9, "two@2": 9}, 0.0)] == ["b", "a"]


async def test_a_deadline_at_risk_goes_before_a_priority(queue: JobQueue) -> None:
    await queue.submit(job("first", steps=1))
    assert taken(queue) == ["first"]
    queue.expect(MODEL, 2.0)  # Half of that is counted on: a row-tick a second.
    await queue.submit(job("hurried", steps=4, left_s=24.0, priority=LOW))
    # With this one, what was let in takes a second longer than the hurried one has.
    await queue.submit(job("high", steps=20, left_s=900.0, priority=HIGH))
    assert taken(queue) == ["hurried", "high"]


@pytest.mark.parametrize("priority", Priority)
async def test_a_job_of_any_priority_is_cancelled_and_counted(queue: JobQueue, priority: Priority) -> None:
    await queue.submit(job("a", priority=priority))
    await queue.submit(job("b", priority=priority))
    assert (queue.stats().depth, queue.stats().cost) == (2, 8)
    assert await queue.cancel("a") == "queued"
    [found] = queue.take({MODEL: 9}, 0.0)
    assert (found.id, found.priority) == ("b", priority)
    assert queue.settle("b", FINISHED)
    assert await queue.outcome("b") == FINISHED
    assert queue.stats() == QueueStats(0, 0, 0.0)


@pytest.mark.parametrize("priority", Priority)
async def test_who_waits_for_jobs_is_woken_by_any_priority(queue: JobQueue, priority: Priority) -> None:
    waiting = asyncio.create_task(asyncio.to_thread(taken, queue, wait_s=60.0))
    await asyncio.sleep(0.05)
    await queue.submit(job("a", priority=priority))
    assert await waiting == ["a"]
