"""The contract of a job queue: outcomes that are kept, keys that name jobs, positions and previews."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from dataclasses import replace

import pytest

from service.jobs import EXPIRED, Failed, Finished, Job, Output, Priority, Timings
from service.queue import line
from service.queue.base import (
    FARTHEST_POSITION,
    FRESH_S,
    LATE_S,
    JobQueue,
    Keep,
    KeyConflict,
    QueueFull,
    QueueStats,
)
from service.queue.memory import MemoryQueue
from tests.service.queues import FINISHED, KEEP, MODEL, job, taken

pytestmark = pytest.mark.anyio


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


async def test_what_has_failed_by_its_time_stays_failed(queue: JobQueue) -> None:
    for name, left_s in (("late", -1 - LATE_S), ("just in time", 5 - LATE_S)):
        await queue.submit(job(name, left_s=left_s), KEEP)
        assert taken(queue) == [name]
    assert queue.settle("late", FINISHED) == (await queue.status("late")).outcome == EXPIRED
    assert queue.settle("just in time", FINISHED) == FINISHED
    assert [(await queue.status(name)).state for name in ("late", "just in time")] == ["failed", "done"]


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
    for name in "abc":
        await finish(queue, name)
    await asyncio.sleep(FRESH_S)
    await finish(queue, "d")
    assert [await known(queue, name) for name in ("waits", *"abcd")] == [True, False, True, True, True]


async def test_an_outcome_that_is_fresh_stays_for_who_waits_for_it(queue: JobQueue) -> None:
    for name in "abcdef":
        await finish(queue, name)
    assert all([await known(queue, name) for name in "abcdef"])
    await asyncio.sleep(FRESH_S)
    await finish(queue, "g")
    assert [await known(queue, name) for name in "abcdefg"] == [False] * 4 + [True] * 3


async def test_outcomes_that_are_kept_for_other_times_go_at_their_end_or_as_the_oldest(queue: JobQueue) -> None:
    for name, seconds in (("a", 600.0), ("b", 600.0), ("short", 0.2)):
        await finish(queue, name, keep=Keep(seconds))
    await asyncio.sleep(FRESH_S)
    for name in "cd":
        await finish(queue, name, keep=Keep(10.0))
    assert [await known(queue, name) for name in ("a", "b", "short", "c", "d")] == [False, True, False, True, True]


async def test_of_outcomes_with_too_many_bytes_the_oldest_go_and_the_newest_stays(queue: JobQueue) -> None:
    await finish(queue, "a", bytes(400))
    await finish(queue, "b", bytes(100))
    await asyncio.sleep(FRESH_S)
    await finish(queue, "c", bytes(600))
    assert [await known(queue, name) for name in "abc"] == [False, True, True]
    await asyncio.sleep(FRESH_S)
    await finish(queue, "huge", bytes(5000))
    assert [await known(queue, name) for name in ("b", "c", "huge")] == [False, False, True]


async def test_who_waits_for_the_end_is_told_at_once_or_in_time(queue: JobQueue) -> None:
    await queue.submit(job("a"), KEEP)
    assert taken(queue, 1) == ["a"]
    begin = time.monotonic()
    await queue.ended("a", 0.2)
    assert time.monotonic() - begin >= 0.2
    waiting = asyncio.create_task(queue.ended("a", 0.5))
    await asyncio.sleep(0)
    queue.settle("a", FINISHED)
    await asyncio.wait_for(waiting, 5)
    assert (await queue.status("a")).outcome == FINISHED


async def test_an_outcome_is_kept_for_its_time(queue: JobQueue) -> None:
    await finish(queue, "short", keep=Keep(0.2))
    assert await known(queue, "short")
    await asyncio.sleep(0.25)
    assert not await known(queue, "short")


async def test_a_key_gives_the_job_that_it_named_first(queue: JobQueue) -> None:
    keep = Keep(60.0, "note", "key", "digest")
    assert await queue.submit(job("a"), keep) == "a"
    assert await queue.submit(job("b"), keep) == "a"
    assert await queue.holder(keep) == "a"
    assert await queue.holder(replace(keep, key="another key")) is None
    assert await queue.holder(KEEP) is None
    for refused in (
        queue.submit(job("c"), replace(keep, digest="another")),
        queue.holder(replace(keep, digest="other")),
    ):
        with pytest.raises(KeyConflict):
            await refused
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


async def test_a_key_is_free_again_when_its_job_is_late_and_nobody_says_so(queue: JobQueue) -> None:
    keep = Keep(60.0, "", "key", "digest")
    await queue.submit(job("a", left_s=1 - LATE_S), keep)
    taken(queue, 1)
    assert await queue.submit(job("b"), keep) == "a"
    await queue.submit(job("c", left_s=-1 - LATE_S), Keep(60.0, "", "another key", "digest"))
    taken(queue, 1)
    assert await queue.submit(job("d"), Keep(60.0, "", "another key", "digest")) == "d"


async def test_a_key_is_free_again_when_its_job_waits_past_its_time(queue: JobQueue) -> None:
    keep = Keep(60.0, "", "key", "digest")
    await queue.submit(job("a", left_s=-0.1), keep)
    assert await queue.submit(job("b"), keep) == "b"
    assert await queue.submit(job("c"), keep) == "b"


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


async def test_a_position_follows_whatever_joins_or_leaves_the_line(queue: JobQueue) -> None:
    async def positions(names: str) -> list[int | None]:
        return [(await queue.status(name)).position for name in names]

    for name in "abcd":
        await queue.submit(job(name), KEEP)
        assert (await queue.status(name)).position == "abcd".index(name)
    await queue.submit(job("other", model="other@1"), KEEP)
    assert await positions("abcd") == [0, 1, 2, 3]
    await queue.cancel("b")
    assert await positions("abcd") == [0, None, 1, 2]
    assert taken(queue, 1) == ["a"]
    assert await positions("abcd") == [None, None, 0, 1]
    await queue.submit(job("high", priority=Priority.HIGH), KEEP)
    assert await positions("cd") == [1, 2]
    assert taken(queue, 1, "other@1") == ["other"]
    assert (await queue.status("high")).position == 0


async def test_the_line_is_looked_through_once_however_many_ask(
    anyio_backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    queue, looks = MemoryQueue(2000), Counter[str]()
    names = [f"{k}" for k in range(500)]
    for name in names:
        await queue.submit(job(name, steps=1), KEEP)
    rank = line._rank_of

    def counted(job: Job) -> float:
        looks[job.id] += 1
        return rank(job)

    monkeypatch.setattr(line, "_rank_of", counted)
    for name in names:
        await queue.status(name)
    assert looks == dict.fromkeys(names, 1)
