"""The contract of a job queue. Every implementation passes the same tests."""

from __future__ import annotations

import asyncio
import dataclasses
import threading
import time
from collections.abc import AsyncIterator

import numpy as np
import pytest

from engines.pipeline import MAX_SEED, Edit, Generate, Inpaint
from service.jobs import Failed, Finished, Job, Output, Timings
from service.queue.base import FARTHEST_POSITION, Bounds, JobQueue, Keep, KeyConflict, QueueFull, QueueStats
from service.queue.memory import MemoryQueue
from service.queue.redis import RedisQueue
from tests.service.helpers import random_image
from tests.service.redis_server import RedisServer

pytestmark = pytest.mark.anyio

FINISHED = Finished((b"image",), Timings(0, 0, 0, 0), (1,))
MODEL = "tiny@000000000000"
# Of newcomers, who may fill a third of the room.
MAX_COST = 32
BOUNDS = Bounds(outcomes=3, bytes=1000)
KEEP = Keep(60.0, "a note")


def open_queue(kind: str, request: pytest.FixtureRequest) -> JobQueue:
    if kind == "memory":
        return MemoryQueue(3 * MAX_COST, bounds=BOUNDS)
    server: RedisServer = request.getfixturevalue("redis_server")
    return RedisQueue(server.url, 3 * MAX_COST, bounds=BOUNDS)


@pytest.fixture(params=["memory", "redis"])
async def queue(anyio_backend: str, request: pytest.FixtureRequest) -> AsyncIterator[JobQueue]:
    opened = open_queue(request.param, request)
    yield opened
    await opened.close()


def job(name: str, images: int = 1, steps: int = 4, age_s: float = 0.0, model: str = MODEL) -> Job:
    tasks = tuple(Generate("a cat", steps, 0.0, seed) for seed in range(images))
    now = time.monotonic()
    return Job(name, name, tasks, Output("png"), now - age_s, now + 60, model)


def taken(queue: JobQueue, rows: int, model: str = MODEL) -> list[str]:
    return [job.id for job in queue.take({model}, rows, 0.0)]


async def test_jobs_are_taken_once_and_oldest_first(queue: JobQueue) -> None:
    for name in "abc":
        await queue.submit(job(name))
    assert taken(queue, 2) == ["a", "b"]
    assert taken(queue, 2) == ["c"]
    assert taken(queue, 2) == []


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


async def test_a_full_queue_refuses_and_takes_again_when_there_is_room(queue: JobQueue) -> None:
    for k in range(8):
        await queue.submit(job(f"{k}"))
    with pytest.raises(QueueFull) as caught:
        await queue.submit(job("one more"))
    assert caught.value.retry_after_s >= 1
    assert queue.stats().cost == MAX_COST
    taken(queue, 1)
    await queue.submit(job("one more"))


async def test_a_job_dearer_than_the_bound_runs_when_nothing_else_waits(queue: JobQueue) -> None:
    await queue.submit(job("huge", images=16, steps=4))
    with pytest.raises(QueueFull):
        await queue.submit(job("tiny", steps=1))
    assert taken(queue, 1) == ["huge"]


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


async def work(queue: JobQueue, jobs: int, seconds: float) -> float:
    """Finish so many jobs, one after the other; row-ticks a second, of which each has 4."""
    begin = time.monotonic()
    for _ in range(jobs):
        [name] = taken(queue, 1)
        await asyncio.sleep(seconds)
        queue.settle(name, FINISHED)
    return jobs * 4 / (time.monotonic() - begin)


def due_in(seconds: float, name: str, identity: str = "") -> Job:
    return dataclasses.replace(job(name), deadline=time.monotonic() + seconds, identity=identity)


async def test_a_job_that_would_come_too_late_behind_the_others_is_refused(queue: JobQueue) -> None:
    for k in range(8):
        await queue.submit(job(f"{k}"))
    await work(queue, 4, 0.1)
    with pytest.raises(QueueFull):
        await queue.submit(due_in(0.5, "late"))
    await queue.submit(job("in time"))
    assert taken(queue, 9) == ["4", "5", "6", "7", "in time"]
    # What workers have is before it too.
    with pytest.raises(QueueFull):
        await queue.submit(due_in(0.5, "late"))
    for name in ("4", "5", "6", "7", "in time"):
        queue.settle(name, FINISHED)
    await queue.submit(due_in(0.5, "nobody before it"))


async def test_a_queue_goes_by_what_it_expects_until_that_is_measured(queue: JobQueue) -> None:
    await queue.submit(job("a"))
    taken(queue, 1)
    await queue.submit(due_in(10.0, "b"))
    queue.expect(MODEL, 0.1)
    with pytest.raises(QueueFull):
        await queue.submit(due_in(10.0, "c"))
    queue.settle("a", FINISHED)
    queue.expect(MODEL, 0.01)
    await work(queue, 1, 0.01)
    await queue.submit(due_in(10.0, "d"))


async def test_who_was_refused_is_given_the_time_at_which_those_before_are_done(queue: JobQueue) -> None:
    for k in range(8):
        await queue.submit(job(f"{k}"))
    speed = await work(queue, 3, 0.3)
    for k in range(8, 11):
        await queue.submit(job(f"{k}"))
    waits = []
    for k in range(16):
        with pytest.raises(QueueFull) as caught:
            await queue.submit(due_in(60.0, f"refused-{k}", f"client {k}"))
        waits.append(caught.value.retry_after_s)
    assert waits == sorted(waits)
    assert all(wait == int(wait) >= 1 for wait in waits)
    # The first comes when there is room, the last when the work of those before it is done too.
    assert waits[-1] - waits[0] >= 0.5 * (len(waits) - 1) * 4 / speed - 1


async def test_who_comes_back_as_told_goes_before_newcomers(queue: JobQueue) -> None:
    for k in range(8):
        await queue.submit(job(f"{k}"))
    with pytest.raises(QueueFull) as caught:
        await queue.submit(due_in(60.0, "early", "client"))
    with pytest.raises(QueueFull) as again:
        await queue.submit(due_in(60.0, "too early", "client"))
    assert again.value.retry_after_s <= caught.value.retry_after_s == 1
    await asyncio.sleep(1.05)
    with pytest.raises(QueueFull):
        await queue.submit(due_in(60.0, "newcomer", "another"))
    await queue.submit(due_in(60.0, "as told", "client"))
    with pytest.raises(QueueFull):
        await queue.submit(due_in(60.0, "once more", "client"))


async def test_a_job_comes_as_it_was_submitted(queue: JobQueue) -> None:
    image, repaint = random_image(1), random_image(2)[..., 0] > 128
    tasks = (
        Edit("a red cat", 4, 2.5, MAX_SEED, image, strength=0.5),
        Inpaint("\U0001f600 a 'dog'", 4, 0.1 + 0.2, 0, image, repaint, strength=0.3),
    )
    now = time.monotonic()
    sent = Job("a", "request", tasks, Output("webp", 50), now - 5, now + 60, MODEL)
    await queue.submit(sent)
    [came] = queue.take({MODEL}, 9, 1.0)
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
    assert [one.id for one in queue.take({"one@1", "two@2", "three@3"}, 9, 0.0)] == ["a", "c", "d"]


async def test_take_waits_for_a_job_and_only_for_the_first(queue: JobQueue) -> None:
    found: list[list[str]] = []
    thread = threading.Thread(target=lambda: found.append([job.id for job in queue.take({MODEL}, 4, 10.0)]))
    thread.start()
    await queue.submit(job("a"))
    await asyncio.to_thread(thread.join)
    assert found == [["a"]]
    begin = time.monotonic()
    assert queue.take({MODEL}, 4, 0.02) == []
    assert time.monotonic() - begin < 5


async def known(queue: JobQueue, job_id: str) -> bool:
    try:
        await queue.status(job_id)
    except KeyError:
        return False
    return True


async def test_a_job_that_is_kept_tells_how_far_it_has_come(queue: JobQueue) -> None:
    await queue.submit(job("first"))
    assert await queue.submit(job("a", images=2), KEEP) == "a"
    queued = await queue.status("a")
    assert (queued.state, queued.done, queued.total, queued.position) == ("queued", 0, 8, 1)
    assert (queued.note, queued.outcome) == ("a note", None)
    assert queued.left_s == pytest.approx(60, abs=10)
    taken(queue, 1)
    assert (await queue.status("a")).position == 0
    assert taken(queue, 9) == ["a"]
    queue.progress({"a": 3, "first": 1, "never seen": 1})
    running = await queue.status("a")
    assert (running.state, running.done, running.position) == ("running", 3, None)
    assert queue.settle("a", FINISHED)
    done = await queue.status("a")
    assert (done.state, done.note, done.outcome) == ("done", "a note", FINISHED)


async def test_an_outcome_that_is_kept_is_had_by_whoever_asks_and_as_often(queue: JobQueue) -> None:
    await queue.submit(job("a"), KEEP)
    taken(queue, 1)
    assert queue.settle("a", FINISHED)
    assert not queue.settle("a", Failed("engine", "too late"))
    queue.progress({"a": 1})
    for _ in range(2):
        assert (await queue.status("a")).outcome == FINISHED
    with pytest.raises(KeyError):
        await queue.outcome("a")


async def test_a_failure_is_kept_too(queue: JobQueue) -> None:
    failure = Failed("engine", "broken", "code", "param", retryable=True)
    await queue.submit(job("a"), KEEP)
    taken(queue, 1)
    queue.settle("a", failure)
    status = await queue.status("a")
    assert (status.state, status.outcome) == ("failed", failure)


async def test_jobs_that_are_not_kept_have_no_status(queue: JobQueue) -> None:
    await queue.submit(job("a"))
    for name in ("a", "never seen", ""):
        assert not await known(queue, name)


@pytest.mark.parametrize("take_first", [False, True])
async def test_a_kept_job_that_is_cancelled_says_so(queue: JobQueue, take_first: bool) -> None:
    await queue.submit(job("a"), KEEP)
    if take_first:
        taken(queue, 1)
    assert await queue.cancel("a") == ("running" if take_first else "queued")
    assert await queue.cancel("a") is None
    assert queue.cancelled(["a"]) == ({"a"} if take_first else set())
    assert taken(queue, 9) == []
    assert not queue.settle("a", FINISHED)
    status = await queue.status("a")
    assert status.state == "cancelled"
    assert isinstance(status.outcome, Failed)
    assert status.outcome.reason == "cancelled"
    assert queue.stats() == QueueStats(0, 0, 0.0)


async def test_cancelling_does_not_take_a_kept_outcome_away(queue: JobQueue) -> None:
    await queue.submit(job("a"), KEEP)
    taken(queue, 1)
    queue.settle("a", FINISHED)
    assert await queue.cancel("a") is None
    assert (await queue.status("a")).outcome == FINISHED


async def finish(queue: JobQueue, name: str, image: bytes = b"image", keep: Keep = KEEP) -> None:
    await queue.submit(job(name, steps=1), keep)
    assert taken(queue, 1) == [name]
    queue.settle(name, Finished((image,), Timings(0, 0, 0, 0), (1,)))


async def test_of_too_many_outcomes_the_oldest_go(queue: JobQueue) -> None:
    await queue.submit(job("waits", model="other@1"), KEEP)
    for name in "abcd":
        await finish(queue, name)
    assert [await known(queue, name) for name in ("waits", *"abcd")] == [True, False, True, True, True]


async def test_of_outcomes_with_too_many_bytes_the_oldest_go_and_the_newest_stays(queue: JobQueue) -> None:
    await finish(queue, "a", bytes(400))
    await finish(queue, "b", bytes(100))
    await finish(queue, "c", bytes(600))
    assert [await known(queue, name) for name in "abc"] == [False, True, True]
    await finish(queue, "huge", bytes(5000))
    assert [await known(queue, name) for name in ("b", "c", "huge")] == [False, False, True]


async def test_an_outcome_is_kept_for_its_time(queue: JobQueue) -> None:
    await finish(queue, "short", keep=Keep(0.2))
    assert await known(queue, "short")
    await asyncio.sleep(0.25)
    assert not await known(queue, "short")


async def test_a_key_gives_the_job_that_it_named_first(queue: JobQueue) -> None:
    keep = Keep(60.0, "note", "key", "digest")
    assert await queue.submit(job("a"), keep) == "a"
    assert await queue.submit(job("b"), keep) == "a"
    with pytest.raises(KeyConflict):
        await queue.submit(job("c"), Keep(60.0, "note", "key", "another digest"))
    assert await queue.submit(job("d"), Keep(60.0, "note", "another key", "digest")) == "d"
    assert taken(queue, 9) == ["a", "d"]
    queue.settle("a", FINISHED)
    assert await queue.submit(job("e"), keep) == "a"
    assert queue.stats().depth == 0


async def test_a_key_is_free_again_when_its_job_failed_or_is_forgotten(queue: JobQueue) -> None:
    keep = Keep(0.2, "", "key", "digest")
    await queue.submit(job("a"), keep)
    taken(queue, 1)
    queue.settle("a", Failed("stopped", "the service is shutting down"))
    assert await queue.submit(job("b"), keep) == "b"
    await queue.cancel("b")
    assert await queue.submit(job("c"), keep) == "c"
    taken(queue, 1)
    queue.settle("c", FINISHED)
    assert await queue.submit(job("d"), keep) == "c"
    await asyncio.sleep(0.25)
    assert await queue.submit(job("d"), Keep(60.0, "", "key", "another digest")) == "d"


async def test_a_key_of_a_job_that_was_refused_stays_free(queue: JobQueue) -> None:
    keep = Keep(60.0, "", "key", "digest")
    await queue.submit(job("huge", images=16))
    with pytest.raises(QueueFull):
        await queue.submit(job("a"), keep)
    assert not await known(queue, "a")
    taken(queue, 1)
    assert await queue.submit(job("b"), keep) == "b"


async def test_previews_are_made_for_who_asks_while_the_job_runs(queue: JobQueue) -> None:
    await queue.submit(job("a"), KEEP)
    await queue.submit(job("unseen"), KEEP)
    taken(queue, 2)
    assert queue.progress({"a": 1, "unseen": 1}) == set()
    assert (await queue.status("a", preview=True)).preview is None
    assert queue.progress({"a": 2, "unseen": 2, "never seen": 1}) == {"a"}
    queue.show("a", b"small")
    queue.show("never seen", b"small")
    assert (await queue.status("a", preview=True)).preview == b"small"
    assert (await queue.status("a")).preview is None
    queue.settle("a", FINISHED)
    queue.show("a", b"too late")
    assert (await queue.status("a", preview=True)).preview is None
    assert queue.progress({"a": 3}) == set()


async def test_far_behind_there_is_no_position(queue: JobQueue) -> None:
    for k in range(FARTHEST_POSITION + 2):
        # Without cost, so that all fit.
        empty = Job(f"{k}", f"{k}", (), Output("png"), time.monotonic(), time.monotonic() + 60, MODEL)
        await queue.submit(empty, KEEP)
    assert (await queue.status(f"{FARTHEST_POSITION}")).position == FARTHEST_POSITION
    assert (await queue.status(f"{FARTHEST_POSITION + 1}")).position is None


async def test_many_workers_share_many_jobs_without_loss(queue: JobQueue) -> None:
    names = [f"job-{k}" for k in range(64)]
    seen: list[str] = []

    def work() -> None:
        while len(seen) < len(names):
            for job in queue.take({MODEL}, 3, 0.01):
                seen.append(job.id)
                queue.settle(job.id, FINISHED)

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
