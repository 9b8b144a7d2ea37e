"""The contract of a job queue: who is let in, and when the others may come back."""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace

import pytest

from service.jobs import Priority
from service.queue.base import JobQueue, Keep, KeyConflict, QueueFull, QueueStats
from tests.service.queues import FINISHED, MAX_COST, MODEL, ROOM, job, taken

pytestmark = pytest.mark.anyio


async def test_a_full_queue_refuses_and_takes_again_when_there_is_room(queue: JobQueue) -> None:
    for k in range(8):
        await queue.submit(job(f"{k}"))
    with pytest.raises(QueueFull) as caught:
        await queue.submit(job("one more"))
    assert caught.value.retry_after_s >= 1
    assert queue.stats().cost == MAX_COST
    taken(queue, 1)
    await queue.submit(job("one more"))


async def test_who_only_asks_is_told_the_same_and_takes_no_room(queue: JobQueue) -> None:
    for _ in range(20):
        await queue.ask(job("one"))
    assert (queue.stats(), taken(queue)) == (QueueStats(0, 0, 0.0), [])
    for k in range(8):
        await queue.submit(job(f"{k}", age_s=0.5))
    asked = job("one more", identity="client")
    for knock in (queue.ask, queue.submit, queue.ask):
        with pytest.raises(QueueFull) as caught:
            await knock(asked)
        assert caught.value.retry_after_s == 1
    await asyncio.sleep(1.05)
    await queue.ask(asked)
    await queue.submit(asked)
    with pytest.raises(QueueFull):
        await queue.ask(job("once more", identity="client"))


async def test_who_asks_with_a_key_is_not_refused_what_is_there(queue: JobQueue) -> None:
    keep = Keep(60.0, "", "a key", "a digest")
    await queue.submit(job("0"), keep)
    for k in range(1, 8):
        await queue.submit(job(f"{k}"))
    await queue.ask(job("again"), keep)
    assert await queue.submit(job("again"), keep) == "0"
    with pytest.raises(KeyConflict):
        await queue.ask(job("another"), replace(keep, digest="another digest"))


async def test_a_job_dearer_than_the_bound_runs_when_nothing_else_waits(queue: JobQueue) -> None:
    await queue.submit(job("huge", images=16, steps=4))
    with pytest.raises(QueueFull):
        await queue.submit(job("tiny", steps=1))
    assert taken(queue, 1) == ["huge"]


async def work(queue: JobQueue, jobs: int, seconds: float) -> float:
    """Finish so many jobs, one after the other; row-ticks a second, of which each has 4."""
    begin = time.monotonic()
    for _ in range(jobs):
        [name] = taken(queue, 1)
        await asyncio.sleep(seconds)
        queue.settle(name, FINISHED)
    return jobs * 4 / (time.monotonic() - begin)


async def test_a_job_that_would_come_too_late_behind_the_others_is_refused(queue: JobQueue) -> None:
    for k in range(8):
        await queue.submit(job(f"{k}"))
    await work(queue, 4, 0.1)
    with pytest.raises(QueueFull):
        await queue.submit(job("late", left_s=0.5))
    await queue.submit(job("in time"))
    assert taken(queue, 9) == ["4", "5", "6", "7", "in time"]
    # What workers have is before it too.
    with pytest.raises(QueueFull):
        await queue.submit(job("late", left_s=0.5))
    for name in ("4", "5", "6", "7", "in time"):
        queue.settle(name, FINISHED)
    await queue.submit(job("nobody before it", left_s=0.5))


async def test_what_other_models_have_takes_room_as_far_as_it_is_done_until_then(queue: JobQueue) -> None:
    other = "other@000000000000"
    for model in (MODEL, other):
        queue.expect(model, 2.0)  # Half of that is counted on: a row-tick a second.
    await queue.submit(job("first"))
    for name in ("a", "b", "c"):
        await queue.submit(job(name, left_s=600.0, model=other))
    # Until 8 s were for this model the other has 8 of its 12, and three quarters of them lessen the half of the limit.
    with pytest.raises(QueueFull) as caught:
        await queue.submit(job("late", left_s=40.0))
    assert caught.value.retry_after_s == pytest.approx(2 * (8 - (20 - 0.75 * 8) / 2), abs=1)
    await queue.submit(job("in time", left_s=46.0))
    with pytest.raises(QueueFull):  # All of the other's 12 s by now.
        await queue.submit(job("late too", left_s=60.0))
    for name in taken(queue, model=other):
        queue.settle(name, FINISHED)
    await queue.submit(job("alone", left_s=50.0))


async def test_what_others_have_keeps_nobody_out_of_a_model_with_nothing_to_do(queue: JobQueue) -> None:
    other = "other@000000000000"
    for model in (MODEL, other):
        queue.expect(model, 2.0)
    for k in range(4):
        await queue.submit(job(f"{k}", left_s=600.0, model=other))
    await queue.submit(job("the first", left_s=1.0))


async def test_what_waits_with_less_priority_is_not_before_a_job(queue: JobQueue) -> None:
    await queue.submit(job("first"))
    assert taken(queue, 1) == ["first"]
    queue.expect(MODEL, 2.0)  # Half of that is counted on: a row-tick a second.
    for name in ("a", "b"):
        await queue.submit(job(name, left_s=600.0, priority=Priority.LOW))
    with pytest.raises(QueueFull):
        await queue.submit(job("as low", left_s=50.0, priority=Priority.LOW))
    await queue.submit(job("normal", left_s=50.0))
    with pytest.raises(QueueFull):  # What runs is before it, and the one of its own priority.
        await queue.submit(job("another", left_s=40.0))
    await queue.submit(job("high", left_s=40.0, priority=Priority.HIGH))


async def test_of_the_bound_newcomers_fill_a_quarter_half_or_all_by_priority(queue: JobQueue) -> None:
    for priority, part in ((Priority.LOW, 4), (Priority.NORMAL, 2), (Priority.HIGH, 1)):
        while queue.stats().cost < ROOM // part:
            await queue.submit(job(f"{priority} {queue.stats().cost}", priority=priority))
        with pytest.raises(QueueFull):
            await queue.submit(job(f"{priority}", priority=priority))
    for name in taken(queue, 99):
        queue.settle(name, FINISHED)
    assert queue.stats() == QueueStats(0, 0, 0.0)


async def test_refused_high_priority_is_not_told_to_wait_for_those_below(queue: JobQueue) -> None:
    queue.expect(MODEL, 2.0)
    await queue.submit(job("low", images=3, left_s=600.0, priority=Priority.LOW))
    assert taken(queue) == ["low"]
    low, high = [], []
    for k in range(5):
        for priority, told in ((Priority.LOW, low), (Priority.HIGH, high)):
            with pytest.raises(QueueFull) as caught:
                await queue.submit(job(f"{priority} {k}", priority=priority, left_s=8.0, identity=f"{priority} {k}"))
            told.append(caught.value.retry_after_s)
    assert high[-1] - high[0] == pytest.approx(4 * 8, abs=2)  # 4 row-ticks each, at half the speed
    assert low[-1] >= high[-2]  # Behind the high ones.


async def test_a_queue_goes_by_what_it_expects_until_that_is_measured(queue: JobQueue) -> None:
    await queue.submit(job("a"))
    taken(queue, 1)
    await queue.submit(job("b", left_s=10.0))
    queue.expect(MODEL, 0.1)
    with pytest.raises(QueueFull):
        await queue.submit(job("c", left_s=10.0))
    queue.settle("a", FINISHED)
    queue.expect(MODEL, 0.01)
    await work(queue, 1, 0.01)
    await queue.submit(job("d", left_s=10.0))


async def test_what_is_expected_counts_before_the_first_job_is_taken(queue: JobQueue) -> None:
    queue.expect(MODEL, 0.1)
    await queue.submit(job("a", left_s=10.0))  # Nobody is before it.
    with pytest.raises(QueueFull):
        await queue.submit(job("b", left_s=10.0))


async def test_who_was_refused_is_given_the_time_at_which_those_before_are_done(queue: JobQueue) -> None:
    for k in range(8):
        await queue.submit(job(f"{k}"))
    speed = await work(queue, 3, 0.3)
    for k in range(8, 11):
        await queue.submit(job(f"{k}"))
    waits = []
    for k in range(16):
        with pytest.raises(QueueFull) as caught:
            await queue.submit(job(f"refused-{k}", left_s=60.0, identity=f"client {k}"))
        waits.append(caught.value.retry_after_s)
    assert waits == sorted(waits)
    assert all(wait == int(wait) >= 1 for wait in waits)
    # The first comes when there is room, the last when the work of those before it is done too.
    assert waits[-1] - waits[0] >= 0.5 * (len(waits) - 1) * 4 / speed - 1


async def test_who_comes_back_as_told_goes_before_newcomers(queue: JobQueue) -> None:
    for k in range(8):
        await queue.submit(job(f"{k}"))
    with pytest.raises(QueueFull) as caught:
        await queue.submit(job("early", left_s=60.0, identity="client"))
    with pytest.raises(QueueFull) as again:
        await queue.submit(job("too early", left_s=60.0, identity="client"))
    assert again.value.retry_after_s <= caught.value.retry_after_s == 1
    await asyncio.sleep(1.05)
    with pytest.raises(QueueFull):
        await queue.submit(job("newcomer", left_s=60.0, identity="another"))
    await queue.submit(job("as told", left_s=60.0, identity="client"))
    with pytest.raises(QueueFull):
        await queue.submit(job("once more", left_s=60.0, identity="client"))
