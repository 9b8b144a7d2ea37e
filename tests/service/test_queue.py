"""The contract of a job queue: from submitting to settling. Every implementation passes the same tests."""

from __future__ import annotations

import asyncio
import threading
import time

import numpy as np
import pytest

from engines.pipeline import MAX_SEED, Edit, Inpaint
from service.jobs import Failed, Job, Output, Priority
from service.queue import leases
from service.queue.base import (
    JobQueue,
    QueueFull,
    QueueStats,
)
from service.queue.memory import MemoryQueue
from tests.service.helpers import random_image, wait_until
from tests.service.queues import FINISHED, KEEP, MODEL, job, taken

pytestmark = pytest.mark.anyio


async def test_jobs_are_taken_once_and_oldest_first(queue: JobQueue) -> None:
    for name in "abc":
        await queue.submit(job(name))
    assert taken(queue, 2) == ["a", "b"]
    assert taken(queue, 2) == ["c"]
    assert taken(queue, 2) == []


async def test_a_job_is_owed_until_it_is_settled_or_cancelled(queue: JobQueue) -> None:
    assert not queue.owes(MODEL)
    await queue.submit(job("a", priority=Priority.HIGH))
    await queue.submit(job("b"))
    assert queue.owes(MODEL)
    assert not queue.owes("other@000000000000")
    await queue.cancel("b")
    taken(queue, 1)
    assert queue.owes(MODEL)
    queue.settle("a", FINISHED)
    assert not queue.owes(MODEL)


async def test_take_counts_images_but_gives_at_least_one_job(queue: JobQueue) -> None:
    await queue.submit(job("big", images=6, steps=1))
    await queue.submit(job("small", images=2, steps=1))
    await queue.submit(job("last", images=2, steps=1))
    assert taken(queue, 4) == ["big"]
    assert taken(queue, 3) == ["small"]
    assert taken(queue, 0) == []


async def test_an_outcome_reaches_the_one_who_waits(queue: JobQueue) -> None:
    await queue.submit(job("a"))
    waiting = asyncio.create_task(queue.outcome("a"))
    taken(queue, 1)
    assert queue.settle("a", FINISHED)
    assert await waiting == FINISHED


async def test_an_outcome_waits_for_the_one_who_comes_late_and_is_given_once(queue: JobQueue) -> None:
    await queue.submit(job("a"))
    taken(queue, 1)
    queue.settle("a", FINISHED)
    assert await queue.outcome("a") == FINISHED
    with pytest.raises(KeyError):
        await queue.outcome("a")


async def test_who_asks_again_and_again_whether_a_job_is_over_leaves_nothing_behind() -> None:
    queue = MemoryQueue(100)
    await queue.submit(job("a"), KEEP)
    for _ in range(50):
        await queue.ended("a", 0.0)
    over = queue._shelf.ended("a")
    assert len(over._done_callbacks) == 1
    assert taken(queue) == ["a"]
    waits = asyncio.create_task(queue.ended("a", 60.0))
    await asyncio.sleep(0)
    queue.settle("a", FINISHED)
    await asyncio.wait_for(waits, 10)


async def test_the_first_settlement_counts(queue: JobQueue) -> None:
    await queue.submit(job("a"))
    taken(queue, 1)
    assert queue.settle("a", FINISHED)
    assert not queue.settle("a", Failed("engine", "too late"))
    assert await queue.outcome("a") == FINISHED
    assert not queue.settle("never seen", FINISHED)


async def test_a_queued_job_that_is_cancelled_is_never_taken(queue: JobQueue) -> None:
    await queue.submit(job("a"))
    await queue.submit(job("b"))
    assert await queue.cancel("a") == "queued"
    assert taken(queue, 9) == ["b"]
    assert queue.stats() == QueueStats(0, 0, 0.0)


async def test_a_running_job_that_is_cancelled_is_made_known_until_it_is_settled(queue: JobQueue) -> None:
    await queue.submit(job("a"))
    taken(queue, 1)
    assert queue.cancelled(["a"]) == set()
    assert await queue.cancel("a") == "running"
    assert queue.cancelled(["a", "b"]) == {"a"}
    queue.settle("a", Failed("cancelled", "gone"))
    assert queue.cancelled(["a"]) == set()


async def test_cancelling_what_is_over_or_unknown_does_nothing(queue: JobQueue) -> None:
    await queue.submit(job("a"))
    taken(queue, 1)
    queue.settle("a", FINISHED)
    assert await queue.cancel("a") is None
    assert await queue.cancel("a") is None
    assert await queue.cancel("never seen") is None
    assert queue.cancelled(["a"]) == set()


async def test_who_waits_learns_of_the_cancellation(queue: JobQueue) -> None:
    await queue.submit(job("a"))
    waiting = asyncio.create_task(queue.outcome("a"))
    await asyncio.sleep(0)
    await queue.cancel("a")
    outcome = await waiting
    assert isinstance(outcome, Failed)
    assert outcome.reason == "cancelled"


async def test_who_stops_waiting_has_not_cancelled(queue: JobQueue) -> None:
    await queue.submit(job("a"))
    waiting = asyncio.create_task(queue.outcome("a"))
    await asyncio.sleep(0)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert taken(queue, 1) == ["a"]
    assert queue.settle("a", FINISHED)
    assert await queue.outcome("a") == FINISHED


async def test_the_same_job_is_not_accepted_twice(queue: JobQueue) -> None:
    await queue.submit(job("a"))
    with pytest.raises(ValueError, match="before"):
        await queue.submit(job("a"))


async def test_stats_tell_of_what_waits(queue: JobQueue) -> None:
    await queue.submit(job("a", images=2, steps=4, age_s=60))
    await queue.submit(job("b", steps=1, age_s=30))
    both = queue.stats()
    assert (both.depth, both.cost) == (2, 9)
    assert both.oldest_s == pytest.approx(60, abs=10)
    taken(queue, 2)
    other = queue.stats()
    assert (other.depth, other.cost) == (1, 1)
    assert other.oldest_s == pytest.approx(30, abs=10)


async def test_a_job_comes_as_it_was_submitted(queue: JobQueue) -> None:
    image, repaint = random_image(1), random_image(2)[..., 0] > 128
    tasks = (
        Edit("a red cat", 4, 2.5, MAX_SEED, image, strength=0.5),
        Inpaint("\U0001f600 a 'dog'", 4, 0.1 + 0.2, 0, image, repaint, strength=0.3),
    )
    now = time.monotonic()
    sent = Job("a", "request", tasks, Output("webp", 50), now - 5, now + 60, MODEL)
    await queue.submit(sent)
    [came] = queue.take({MODEL: 9}, 1.0)
    assert (came.id, came.request_id, came.output, came.model) == ("a", "request", Output("webp", 50), MODEL)
    assert (came.submitted, came.deadline) == pytest.approx((sent.submitted, sent.deadline), abs=5)
    assert came.cost == sent.cost
    for task, original in zip(came.tasks, tasks, strict=True):
        assert isinstance(task, Edit | Inpaint)
        assert (type(task), task.condition, task.guidance) == (type(original), original.condition, original.guidance)
        assert (task.steps, task.seed, task.strength) == (original.steps, original.seed, original.strength)
        assert np.array_equal(task.image, image)
    assert isinstance(came.tasks[1], Inpaint)
    assert np.array_equal(came.tasks[1].repaint, repaint)


async def test_a_job_goes_to_who_has_its_model(queue: JobQueue) -> None:
    await queue.submit(job("a", model="one@1"))
    await queue.submit(job("b", model="two@2"))
    await queue.submit(job("c", model="one@1"))
    assert taken(queue, 9, "three@3") == []
    assert taken(queue, 9, "two@2") == ["b"]
    assert queue.stats().depth == 2
    await queue.submit(job("d", model="two@2"))
    assert [one.id for one in queue.take({"one@1": 9, "two@2": 9, "three@3": 9}, 0.0)] == ["a", "c", "d"]


async def test_what_can_only_be_failed_is_left_to_others_for_a_while_where_there_may_be_some(
    queue: JobQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(leases, "PATIENCE_S", 1.0)
    assert taken(queue) == []  # Connects, which may take as long.
    await queue.submit(job("refused", priority=Priority.HIGH))
    await queue.submit(job("other", model="other@1"))
    found = [one.id for one in queue.take({MODEL: 9, "other@1": 9}, 0.05, {MODEL})]
    if not queue.durable:
        assert found == ["refused", "other"]
        return
    assert found == ["other"]
    wait_until(lambda: [one.id for one in queue.take({MODEL: 9}, 0.05, {MODEL})] == ["refused"], 20)


async def test_what_can_only_be_failed_is_left_to_those_who_have_jobs_of_its_model(
    queue: JobQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(leases, "PATIENCE_S", 0.001)
    await queue.submit(job("made"))
    await queue.submit(job("waits", priority=Priority.HIGH))
    await queue.submit(job("too"))
    assert taken(queue, 1) == ["waits"]
    await asyncio.sleep(0.005)
    if queue.durable:
        assert queue.take({MODEL: 9}, 0.0, {MODEL}) == []
    queue.settle("waits", FINISHED)
    assert [one.id for one in queue.take({MODEL: 9}, 0.0, {MODEL})] == ["made", "too"]


async def test_a_job_that_is_passed_on_waits_again(queue: JobQueue) -> None:
    for name, keep in (("a", KEEP), ("b", None), ("gone", None)):
        await queue.submit(job(name), keep)
    assert taken(queue) == ["a", "b", "gone"]
    await queue.submit(job("c"))
    await queue.cancel("gone")
    assert not queue.pass_on("gone")
    assert not queue.pass_on("never seen")
    assert [queue.pass_on(name) for name in "ab"] == [queue.durable] * 2
    if queue.durable:
        assert (queue.stats().depth, queue.stats().cost) == (3, 12)
        status = await queue.status("a")
        assert (status.state, status.position) == ("queued", 1)
        assert not queue.settle("a", FINISHED)
        assert await queue.cancel("b") == "queued"
        assert taken(queue) == ["c", "a"]
    assert queue.settle("a", FINISHED)
    assert (await queue.status("a")).outcome == FINISHED


async def test_each_model_has_a_room_of_its_own(queue: JobQueue) -> None:
    for name in "abcd":
        await queue.submit(job(name, images=2, model="one@1"))
    for name in "ef":
        await queue.submit(job(name, images=3, model="two@2"))
    rooms = {"one@1": 4, "two@2": 1, "three@3": 9}
    assert [one.id for one in queue.take(rooms, 0.0)] == ["a", "b", "e"]
    assert [one.id for one in queue.take({"one@1": 3}, 0.0)] == ["c"]
    assert [one.id for one in queue.take({"one@1": 9, "two@2": 9}, 0.0)] == ["d", "f"]


async def test_take_waits_for_a_job_and_only_for_the_first(queue: JobQueue) -> None:
    found: list[list[str]] = []
    thread = threading.Thread(target=lambda: found.append([job.id for job in queue.take({MODEL: 4}, 10.0)]))
    thread.start()
    await queue.submit(job("a"))
    await asyncio.to_thread(thread.join)
    assert found == [["a"]]
    begin = time.monotonic()
    assert queue.take({MODEL: 4}, 0.02) == []
    assert time.monotonic() - begin < 5


async def test_many_workers_share_many_jobs_without_loss(queue: JobQueue) -> None:
    names = [f"job-{k}" for k in range(64)]
    seen: list[str] = []

    def work() -> None:
        while len(seen) < len(names):
            for found in queue.take({MODEL: 3}, 0.01):
                seen.append(found.id)
                queue.settle(found.id, FINISHED)

    workers = [threading.Thread(target=work) for _ in range(4)]
    for worker in workers:
        worker.start()

    async def ask(name: str) -> None:
        while True:
            try:
                await queue.submit(job(name, steps=1))
                break
            except QueueFull:
                await asyncio.sleep(0.001)
        assert await queue.outcome(name) == FINISHED

    await asyncio.gather(*map(ask, names))
    for worker in workers:
        await asyncio.to_thread(worker.join)
    assert sorted(seen) == sorted(names)


def test_cost_counts_the_steps_that_run() -> None:
    edit = Edit("a cat", 4, 0.0, 0, random_image(), strength=0.5)
    assert Job("a", "a", (edit, edit), Output("png"), 0.0, 1.0).cost == 4
