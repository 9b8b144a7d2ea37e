"""What the queue in Redis promises beyond the contract: workers that die, and several hosts."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, contextmanager
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import redis

from engines.pipeline import Edit
from service.jobs import Failed, Priority
from service.queue import keys, leases
from service.queue.base import QueueFull, QueueUnavailable
from service.queue.leases import MAX_TRIES
from service.queue.redis import RedisQueue
from tests.service.helpers import random_image, until
from tests.service.queues import FINISHED, KEEP, MODEL, OTHER, ROOM, job, mute, opened, soon, taken
from tests.service.redis_server import RedisServer

pytestmark = pytest.mark.anyio

SILENCE_S = 0.4

OpenQueue = Callable[[], RedisQueue]


class Counts:
    """What the queues of a test reported."""

    redeliveries = 0
    dead_letters = 0

    def redelivery(self) -> None:
        self.redeliveries += 1

    def dead_letter(self) -> None:
        self.dead_letters += 1


@pytest.fixture
def counts() -> Counts:
    return Counts()


@pytest.fixture
async def open_queue(anyio_backend: str, redis_server: RedisServer, counts: Counts) -> AsyncIterator[OpenQueue]:
    """Opens queues as processes of their own would have them."""
    async with AsyncExitStack() as closing:

        def open_queue() -> RedisQueue:
            queue = RedisQueue(
                redis_server.url,
                ROOM,
                reclaim_after_s=SILENCE_S,
                on_redelivery=counts.redelivery,
                on_dead_letter=counts.dead_letter,
            )
            closing.push_async_callback(queue.close)
            return queue

        yield open_queue


@contextmanager
def full(server: RedisServer) -> Iterator[None]:
    """Let a server have no memory left."""
    with redis.Redis.from_url(server.url) as client:
        client.config_set("maxmemory", 1)
        try:
            yield
        finally:
            client.config_set("maxmemory", 0)


async def test_what_a_silent_worker_held_goes_to_another_and_runs_alone(
    open_queue: OpenQueue, counts: Counts, monkeypatch: pytest.MonkeyPatch
) -> None:
    api, silent, other = open_queue(), open_queue(), open_queue()
    mute(silent, monkeypatch)
    for name in "abcd":
        await api.submit(job(name))
    assert taken(silent, 2) == ["a", "b"]
    assert taken(other, 1) == ["c"]
    await asyncio.sleep(1.5 * SILENCE_S)
    # The other holds a job; it gets no more before it comes with empty hands.
    assert taken(other) == []
    assert other.settle("c", FINISHED)
    first = taken(other)
    assert first in (["a"], ["b"])
    assert taken(other) == []
    assert other.settle(first[0], FINISHED)
    second = taken(other)
    assert {*first, *second} == {"a", "b"}
    assert taken(other) == []
    assert other.settle(second[0], FINISHED)
    assert taken(other) == ["d"]
    assert counts.redeliveries == 2
    for name in "abc":
        assert await soon(api, name) == FINISHED


async def test_jobs_of_every_priority_are_kept_by_who_lives_and_go_on_when_he_falls_silent(
    open_queue: OpenQueue, redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    api, holder, other = open_queue(), open_queue(), open_queue()
    for priority in Priority:
        await api.submit(job(priority.name, priority=priority))
    names = {priority.name for priority in Priority}
    assert set(taken(holder)) == names
    assert await asyncio.to_thread(taken, other, wait_s=2 * SILENCE_S) == []
    mute(holder, monkeypatch)
    found: set[str] = set()
    for _ in names:
        [name] = await asyncio.to_thread(taken, other, wait_s=60.0)
        assert other.settle(name, FINISHED)
        found.add(name)
    assert found == names
    await other.close()
    with redis_server.client() as client:
        assert all(client.xlen(keys.jobs(MODEL, priority)) == 0 for priority in Priority)


async def test_who_wakes_up_too_late_is_told_and_changes_nothing(
    open_queue: OpenQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    api, silent, other = open_queue(), open_queue(), open_queue()
    await api.submit(job("a"))
    assert taken(silent) == ["a"]
    await asyncio.sleep(2 * SILENCE_S)
    mute(silent, monkeypatch)
    await asyncio.sleep(1.5 * SILENCE_S)
    assert taken(other) == ["a"]
    assert silent.cancelled(["a"]) == set()
    assert other.settle("a", FINISHED)
    assert silent.cancelled(["a"]) == {"a"}
    assert not silent.settle("a", OTHER)
    assert await soon(api, "a") == FINISHED


async def test_the_first_of_two_workers_counts_whoever_holds_the_job(
    open_queue: OpenQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    api, silent, other = open_queue(), open_queue(), open_queue()
    mute(silent, monkeypatch)
    await api.submit(job("a"))
    assert taken(silent) == ["a"]
    await asyncio.sleep(1.5 * SILENCE_S)
    assert taken(other) == ["a"]
    assert silent.settle("a", FINISHED)
    assert not other.settle("a", OTHER)
    assert await soon(api, "a") == FINISHED
    assert taken(open_queue(), wait_s=1.5 * SILENCE_S) == []


async def test_times_cross_hosts_whose_clocks_differ(open_queue: OpenQueue, monkeypatch: pytest.MonkeyPatch) -> None:
    api, worker = open_queue(), open_queue()
    sent = replace(job("a"), submitted=time.monotonic() - 5)
    await api.submit(sent)
    ahead_s = 1e6
    clock = SimpleNamespace(monotonic=lambda: time.monotonic() + ahead_s)
    with monkeypatch.context() as there:
        there.setattr(leases, "time", clock)
        [came] = worker.take({MODEL: 9}, 0.0)
    assert came.submitted - ahead_s == pytest.approx(sent.submitted, abs=1)
    assert came.deadline - ahead_s == pytest.approx(sent.deadline, abs=1)


async def test_the_line_is_by_age_though_the_entries_of_a_stream_cannot_go_back(
    open_queue: OpenQueue, redis_server: RedisServer
) -> None:
    """As they are after Redis's clock went back."""
    queue = open_queue()
    await queue.submit(job("first"))
    assert taken(queue) == ["first"]
    with redis_server.client() as client:
        stream, ahead = keys.jobs(MODEL, Priority.NORMAL), f"{keys.milliseconds(time.time() + 120)}-0"
        client.xadd(stream, {"nothing": ""}, ahead)
        client.xdel(stream, ahead)
    for name, priority in (("normal", Priority.NORMAL), ("low", Priority.LOW)):
        await queue.submit(job(name, priority=priority))
    assert taken(queue) == ["normal", "low"]


async def test_a_full_redis_takes_no_job_and_lets_go_of_those_it_has(
    open_queue: OpenQueue, redis_server: RedisServer, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    api, worker = open_queue(), open_queue()
    for name in "ab":
        await api.submit(job(name))
    assert taken(worker, 1) == ["a"]
    with full(redis_server):
        for refused in (job("c"), replace(job("d"), model="other@000000000000")):
            await api.ask(refused, None)
            with pytest.raises(QueueUnavailable):
                await api.submit(refused)
        assert worker.settle("a", FINISHED)
        assert await soon(api, "a") == FINISHED
        assert taken(worker) == ["b"]
        assert worker.settle("b", FINISHED)
        assert await soon(api, "b") == FINISHED
    await api.submit(job("c"))
    assert taken(worker) == ["c"]
    assert [message for message in caplog.messages if "the queue" in message] == [
        "the queue is full",
        "the queue has room again",
    ]


async def test_no_images_are_left_of_a_job_that_redis_refused(open_queue: OpenQueue, redis_server: RedisServer) -> None:
    """They would stay for as long as the job might have taken, and keep others out of a Redis that is full."""
    api = open_queue()
    await api.submit(job("a"))
    with redis_server.client() as client:
        client.delete(keys.load(MODEL))
        client.rpush(keys.load(MODEL), "not ours")
        with pytest.raises(QueueUnavailable):
            await api.submit(replace(job("b"), tasks=(Edit("a cat", 4, 0.0, 0, random_image(), strength=0.5),)))
        assert client.keys(keys.images("*")) == []


async def test_a_full_redis_gives_again_what_was_in_an_answer_that_got_lost(
    open_queue: OpenQueue, redis_server: RedisServer
) -> None:
    api, worker = open_queue(), open_queue()
    for name in "ab":
        await api.submit(job(name))
    assert taken(worker, 1) == ["a"]
    del worker._leases._held["a"]
    with full(redis_server):
        assert taken(worker, 1) == ["a"]


async def test_a_user_of_few_rights_does(anyio_backend: str, redis_server: RedisServer) -> None:
    """Those that docs/operations.md names."""
    rights = ["~{fewstep}:*", "+@read", "+@write", "+@connection", "+@scripting", "+time"]
    with redis_server.client() as client:
        client.execute_command("ACL", "SETUSER", "few", "reset", "on", ">secret", *rights)
        try:
            async with opened(f"redis://few:secret@127.0.0.1:{redis_server.port}/0") as queue:
                for name, keep in (("a", None), ("b", KEEP), ("c", KEEP)):
                    await queue.submit(job(name), keep) if keep else await queue.submit(job(name))
                queue.expect(MODEL, 1.0)
                assert taken(queue, 2) == ["a", "b"]
                assert queue.progress({"b": 1}) == set()
                assert await queue.cancel("c") == "queued"
                assert all(queue.settle(name, FINISHED) for name in "ab")
                assert await soon(queue, "a") == FINISHED
                assert (await queue.status("b", preview=True)).outcome == FINISHED
                assert queue.stats().depth == 0
        finally:
            client.execute_command("ACL", "DELUSER", "few")


async def test_a_full_redis_goes_on_with_jobs_that_are_kept(open_queue: OpenQueue, redis_server: RedisServer) -> None:
    api, worker = open_queue(), open_queue()
    for name in "abc":
        await api.submit(job(name), KEEP)
    assert taken(worker, 2) == ["a", "b"]
    with full(redis_server):
        assert (await api.status("a", preview=True)).state == "running"
        assert worker.progress({"a": 1, "b": 1}) == {"a"}
        worker.show("a", b"small")
        assert (await api.status("a", preview=True)).preview == b"small"
        assert await api.cancel("b") == "running"
        assert worker.cancelled("ab") == {"b"}
        assert worker.settle("a", FINISHED)
        assert (await api.status("a")).outcome == FINISHED
        assert taken(worker) == ["c"]


async def test_jobs_whose_answer_was_lost_are_given_again_at_once(
    open_queue: OpenQueue, counts: Counts, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the same worker, once, beside what it holds, and not as tries of their own."""
    api, worker = open_queue(), open_queue()
    await api.submit(job("held"))
    assert taken(worker) == ["held"]
    run = worker._leases._redis.run

    def cut(name: str, *rest: Any) -> Any:
        answer = run(name, *rest)
        if name == "take":
            raise redis.ConnectionError("cut")
        return answer

    for job_id in "abc":
        await api.submit(job(job_id))
    with monkeypatch.context() as patched:
        patched.setattr(leases, "_AFTER_ERROR_S", 0.0)
        patched.setattr(worker._leases._redis, "run", cut)
        assert taken(worker) == []
        assert worker.take({MODEL: ROOM}, 0) == []
    assert await api.cancel("b") == "running"
    await asyncio.sleep(0.01)
    assert taken(worker) == ["a", "c"]
    assert taken(worker) == []
    assert [worker.settle(job_id, FINISHED) for job_id in ("held", "a", "c")] == [FINISHED] * 3
    assert counts.redeliveries == 0


async def test_what_is_expected_is_said_again_to_a_redis_that_lost_it(
    open_queue: OpenQueue, redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(leases, "_BEATS_PER_REMINDER", 1)
    queue = open_queue()
    queue.expect(MODEL, 20.0)
    taken(queue)
    with redis_server.client() as client:
        client.flushall()
        await until(lambda: client.exists(keys.speed(MODEL)) == 1)
        assert client.hget(keys.speed(MODEL), "finished") == b"10.0"


async def test_a_model_that_nobody_asked_for_is_no_faster_than_before(
    open_queue: OpenQueue, redis_server: RedisServer
) -> None:
    queue = open_queue()
    await queue.submit(job("a"))
    taken(queue)
    queue.expect(MODEL, 0.1)
    queue.settle("a", Failed("expired", "too late"))
    with redis_server.client() as client:
        # As if their time were over.
        client.delete(keys.load(MODEL), *(keys.jobs(MODEL, priority) for priority in Priority))
    await queue.submit(job("b", left_s=10.0))
    with pytest.raises(QueueFull):
        await queue.submit(job("c", left_s=10.0))


async def test_a_beat_that_fails_is_not_the_last_one(open_queue: OpenQueue, monkeypatch: pytest.MonkeyPatch) -> None:
    api, slow, other = open_queue(), open_queue(), open_queue()
    renew, failures = slow._leases._renew, iter([True])

    def renewed() -> None:
        if next(failures, False):
            raise TypeError("no error of Redis")
        renew()

    monkeypatch.setattr(slow._leases, "_renew", renewed)
    await api.submit(job("a"))
    assert taken(slow) == ["a"]
    assert await asyncio.to_thread(taken, other, wait_s=4 * SILENCE_S) == []
    assert next(failures, "none left") == "none left"
    assert slow.settle("a", FINISHED)


async def test_a_slow_worker_that_lives_keeps_its_job(open_queue: OpenQueue, counts: Counts) -> None:
    api, slow, other = open_queue(), open_queue(), open_queue()
    await api.submit(job("a"))
    assert taken(slow) == ["a"]
    assert await asyncio.to_thread(taken, other, wait_s=4 * SILENCE_S) == []
    assert slow.settle("a", FINISHED)
    assert counts.redeliveries == 0


async def test_the_jobs_of_a_silent_worker_are_found_among_those_of_many_others(
    open_queue: OpenQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    api, living, silent, other = open_queue(), open_queue(), open_queue(), open_queue()
    mute(silent, monkeypatch)
    for k in range(25):
        await api.submit(job(f"{k}", steps=1))
    assert len(taken(living, 24)) == 24
    assert taken(silent) == ["24"]
    assert await asyncio.to_thread(taken, other, wait_s=10.0) == ["24"]


async def test_a_job_that_brings_down_every_worker_is_given_up(
    open_queue: OpenQueue, redis_server: RedisServer, counts: Counts, monkeypatch: pytest.MonkeyPatch
) -> None:
    api = open_queue()
    await api.submit(job("poison"))
    for _ in range(MAX_TRIES):
        victim = open_queue()
        mute(victim, monkeypatch)
        assert taken(victim) == ["poison"]
        await asyncio.sleep(1.5 * SILENCE_S)
    assert taken(open_queue()) == []
    failed = await soon(api, "poison")
    assert isinstance(failed, Failed)
    assert (failed.reason, failed.retryable) == ("engine", False)
    assert f"{MAX_TRIES} times" in failed.message
    assert (counts.redeliveries, counts.dead_letters) == (MAX_TRIES - 1, 1)
    with redis_server.client() as client:
        [(_, letter)] = client.xrange(keys.DEAD)
        assert (letter[b"id"], letter[b"model"]) == (b"poison", MODEL.encode())
        assert b"request-poison" in letter[b"message"]
        assert client.xlen(keys.jobs(MODEL, Priority.NORMAL)) == 0


async def test_a_job_that_no_worker_can_read_is_given_up_and_the_next_is_taken(
    open_queue: OpenQueue, redis_server: RedisServer, counts: Counts
) -> None:
    queue = open_queue()
    await queue.submit(job("a"))
    await queue.submit(job("b"))
    with redis_server.client() as client:
        client.hset(keys.record("a"), "message", '{"version": 9}')
    assert taken(queue) == ["b"]
    failed = await soon(queue, "a")
    assert isinstance(failed, Failed)
    assert "read" in failed.message
    assert counts.dead_letters == 1


async def test_a_job_is_cancelled_from_another_host(open_queue: OpenQueue) -> None:
    api, other_api, worker = open_queue(), open_queue(), open_queue()
    await api.submit(job("running"))
    assert taken(worker) == ["running"]
    await api.submit(job("queued"))
    assert await other_api.cancel("running") == "running"
    assert await other_api.cancel("queued") == "queued"
    assert worker.cancelled(["running"]) == {"running"}
    assert taken(worker) == []
    for name in ("running", "queued"):
        outcome = await soon(api, name)
        assert isinstance(outcome, Failed)
        assert outcome.reason == "cancelled"
    assert not worker.settle("running", FINISHED)
    assert await other_api.cancel("running") is None


async def test_a_cancelled_job_of_a_dead_worker_is_not_run_again(
    open_queue: OpenQueue, counts: Counts, monkeypatch: pytest.MonkeyPatch
) -> None:
    api, silent, other = open_queue(), open_queue(), open_queue()
    mute(silent, monkeypatch)
    await api.submit(job("a"))
    assert taken(silent) == ["a"]
    assert await api.cancel("a") == "running"
    await asyncio.sleep(1.5 * SILENCE_S)
    assert taken(other) == []
    assert counts.redeliveries == 0


async def test_the_bound_holds_for_all_processes_together(open_queue: OpenQueue) -> None:
    first, second = open_queue(), open_queue()
    for k in range(4):
        await first.submit(job(f"first-{k}"))
        await second.submit(job(f"second-{k}"))
    for queue in (first, second):
        with pytest.raises(QueueFull):
            await queue.submit(job("one more"))
        stats = queue.stats()
        assert (stats.depth, stats.cost) == (8, 32)


async def test_nothing_is_left_for_ever(open_queue: OpenQueue, redis_server: RedisServer) -> None:
    queue = open_queue()
    for name in "abc":
        await queue.submit(job(name, left_s=1.0))
    taken(queue, 2)
    queue.settle("a", FINISHED)
    await soon(queue, "a")
    with redis_server.client() as client:
        left = {name: client.pttl(name) for name in client.scan_iter()}
        assert left
        assert 0 < left.pop(keys.speed(MODEL).encode()) <= 1000 * keys.SPEED_TTL_S
        assert all(0 < ttl_ms <= 1000 * max(keys.GRACE_S + 1, keys.RESULT_TTL_S) for ttl_ms in left.values()), left
        assert keys.record("a").encode() not in left
        assert keys.result("a").encode() not in left
        assert client.xlen(keys.jobs(MODEL, Priority.NORMAL)) == 2
        queue.settle("b", FINISHED)
        taken(queue)
        queue.settle("c", FINISHED)
        await queue.close()
        assert client.xlen(keys.jobs(MODEL, Priority.NORMAL)) == 0
        assert client.xinfo_consumers(keys.jobs(MODEL, Priority.NORMAL), "workers") == []


async def test_an_outcome_whose_reply_was_lost_is_found(open_queue: OpenQueue, redis_server: RedisServer) -> None:
    queue = open_queue()
    await queue.submit(job("a"))
    assert taken(queue) == ["a"]
    with redis_server.client() as client:
        # As if the worker's reply had gone to a server that failed over just then.
        client.hset(keys.record("a"), "replies", keys.replies("lost"))
        queue.settle("a", FINISHED)
        assert await soon(queue, "a") == FINISHED
        assert client.xlen(keys.replies("lost")) == 1


async def test_who_waits_for_a_job_that_redis_lost_is_told(open_queue: OpenQueue, redis_server: RedisServer) -> None:
    queue = open_queue()
    await queue.submit(job("a"))
    with redis_server.client() as client:
        client.flushall()
    failed = await soon(queue, "a")
    assert isinstance(failed, Failed)
    assert failed.retryable
    await queue.submit(job("b"))
    assert taken(queue) == ["b"]
