"""The queue in Redis where something is lost: an answer on its way, or what had its time."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest

from engines.pipeline import Edit
from service.jobs import EXPIRED, Failed, Outcome, Priority
from service.queue import keys, leases
from service.queue.base import Keep
from service.queue.clients import _script
from service.queue.leases import Lease
from service.queue.redis import RedisQueue
from tests.service.cutting import Door, cutting_door
from tests.service.helpers import random_image
from tests.service.queues import FINISHED, KEEP, MODEL, job, opened, soon, taken
from tests.service.redis_server import RedisServer

pytestmark = pytest.mark.anyio


@pytest.fixture
def door(redis_server: RedisServer) -> Iterator[Door]:
    """In front of a Redis with nothing in it."""
    with cutting_door(redis_server.port) as door:
        yield door


@pytest.fixture
async def api(anyio_backend: str, redis_server: RedisServer) -> AsyncIterator[RedisQueue]:
    async with opened(redis_server.url) as queue:
        yield queue


@pytest.fixture
async def worker(anyio_backend: str, door: Door) -> AsyncIterator[RedisQueue]:
    """One whose answers may get lost, as in a connection that breaks. Nobody else takes its jobs in time."""
    async with opened(f"redis://127.0.0.1:{door.port}/0") as queue:
        yield queue


@contextmanager
def forgotten(server: RedisServer) -> Iterator[None]:
    """Let a server know nothing of what happens, as after a power cut or a failover to a replica that lags."""
    with server.client() as client:
        before = {name: (client.dump(name), client.pttl(name)) for name in client.scan_iter()}
        yield
        client.flushall()
        for name, (value, ttl) in before.items():
            client.restore(name, max(0, ttl), value)


async def test_an_outcome_that_redis_never_takes_costs_no_other_job_its_lease(
    anyio_backend: str, redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And its own job has expired, when its time is over."""
    monkeypatch.setattr(leases, "LATE_S", 0.2)
    with redis_server.client() as client:
        before = client.config_get("proto-max-bulk-len")
        client.config_set("proto-max-bulk-len", "1mb")
        try:
            async with opened(redis_server.url, 1.0) as queue, opened(redis_server.url, 1.0) as other:
                await queue.submit(job("large", left_s=4.0), KEEP)
                await queue.submit(job("small"))
                assert sorted(taken(queue)) == ["large", "small"]
                assert queue.settle("large", replace(FINISHED, images=(bytes(2 << 20),))) is None
                until = time.monotonic() + 3.5
                while time.monotonic() < until:
                    assert taken(other, wait_s=0.2) == []
                async with asyncio.timeout(30):
                    while queue._leases._unsent:
                        await asyncio.sleep(0.1)
                assert (await queue.status("large")).outcome == EXPIRED
                assert queue.settle("small", FINISHED)
        finally:
            client.config_set("proto-max-bulk-len", before["proto-max-bulk-len"])


async def test_replies_are_heard_where_ids_begin_anew(api: RedisQueue, redis_server: RedisServer) -> None:
    """As where Redis lost the stream, and its clock goes after that of before."""
    replies = api._submissions._replies
    with redis_server.client() as client:
        await api.submit(job("before"))
        assert taken(api) == ["before"]
        client.xadd(replies, {"id": "before"}, id=f"{int(time.time() + 3600) * 1000}-0")
        async with asyncio.timeout(30):
            while client.xlen(replies):
                await asyncio.sleep(0.05)
        client.delete(replies)
        monotonic = time.monotonic()
        for name in "abcd":
            await api.submit(job(name))
            assert taken(api) == [name]
            assert api.settle(name, FINISHED)
            assert await soon(api, name) == FINISHED
        assert time.monotonic() - monotonic < 2.0, "each would take a second until they are looked for unasked"
        async with asyncio.timeout(30):
            while client.xlen(replies):
                await asyncio.sleep(0.05)


async def test_times_that_cannot_be_read_are_a_dead_letter(
    api: RedisQueue, redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = api._threads.run

    def odd(name: str, *given: Any) -> Any:
        answer = run(name, *given)
        if name == "take":
            for each in answer[1]:
                each[5] = b"1.0e+17"
        return answer

    monkeypatch.setattr(api._threads, "run", odd)
    await api.submit(job("odd"))
    assert taken(api) == []
    outcome = await soon(api, "odd")
    assert isinstance(outcome, Failed)
    assert "cannot read" in outcome.message


async def test_what_was_given_in_an_answer_that_got_lost_is_given_again_at_once(
    api: RedisQueue, worker: RedisQueue, door: Door
) -> None:
    await api.submit(job("held"))
    assert taken(worker) == ["held"]
    for name in "abc":
        await api.submit(job(name))
    door.lose(worker._threads.client.register_script(_script("take")).sha.encode())
    assert taken(worker) == ["a", "b", "c"]
    assert len(door.lost) == 1
    assert taken(worker) == []
    assert all(worker.settle(name, FINISHED) for name in ("held", *"abc"))


async def test_jobs_whose_images_cannot_be_had_now_are_given_again_at_once(
    api: RedisQueue, worker: RedisQueue, door: Door, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(leases, "_AFTER_ERROR_S", 0.0)
    edit = Edit("a cat", 4, 0.0, 0, random_image(), strength=0.5)
    for name in "abc":
        await api.submit(replace(job(name), tasks=(edit,)))
    door.lose(keys.images("b").encode(), times=2)  # Once more than it is asked for again.
    assert taken(worker) == ["a"]
    assert len(door.lost) == 2
    assert taken(worker) == ["b", "c"]
    assert taken(worker) == []
    assert all(worker.settle(name, FINISHED) for name in "abc")


@pytest.mark.parametrize("keep", [None, KEEP])
@pytest.mark.parametrize("times", [1, 2])
async def test_an_outcome_whose_receipt_got_lost_counts_once(
    api: RedisQueue, redis_server: RedisServer, door: Door, keep: Keep | None, times: int
) -> None:
    """Once redis-py asks again by itself, and once more when Redis is left alone for a moment."""
    late: list[Outcome] = []
    async with opened(f"redis://127.0.0.1:{door.port}/0", on_late_outcome=late.append) as worker:
        await api.submit(job("a"), keep)
        assert taken(worker) == ["a"]
        door.lose(worker._threads.client.register_script(_script("settle")).sha.encode(), times)
        told = worker.settle("a", FINISHED)
        async with asyncio.timeout(30):
            while worker._leases._unsent:
                await asyncio.sleep(0.05)
        assert ([told] if told else late) == [FINISHED]
        assert len(door.lost) == times
    async with opened(redis_server.url) as other:
        other._leases._held["a"] = Lease("a", MODEL, keys.jobs(MODEL, Priority.NORMAL), b"1-1", 1, keep is not None)
        assert not other.settle("a", FINISHED)


@pytest.mark.parametrize("told", [True, False])
async def test_a_receipt_that_got_lost_is_of_what_was_there_first(
    api: RedisQueue, door: Door, monkeypatch: pytest.MonkeyPatch, told: bool
) -> None:
    """The images, or else that the time of their job was over when they could be sent at last."""
    monkeypatch.setattr(leases, "_AFTER_ERROR_S", 0.0)
    late: list[Outcome] = []
    async with opened(f"redis://127.0.0.1:{door.port}/0", on_late_outcome=late.append) as worker:
        await api.submit(job("a"))
        assert taken(worker) == ["a"]
        own = worker._leases
        settle = worker._threads.client.register_script(_script("settle"))
        worker._threads.client.script_load(_script("settle"))
        with own._changed:
            lease = own._held["a"]
        if told:
            door.lose(settle.sha.encode(), 2)
            assert own.settle("a", FINISHED) is None
        else:
            door.lose(settle.sha.encode())
        with own._changed:
            own._unsent["a"] = replace(lease, deadline=time.monotonic() - 100.0), FINISHED, ""
        async with asyncio.timeout(30):
            while not late:
                await asyncio.sleep(0.05)
        assert late == [FINISHED if told else EXPIRED]
        assert await soon(api, "a") == late[0]


async def test_a_dead_letter_whose_receipt_got_lost_is_counted(
    api: RedisQueue, redis_server: RedisServer, door: Door, monkeypatch: pytest.MonkeyPatch
) -> None:
    dead: list[None] = []
    monkeypatch.setattr(leases, "unpack_job", lambda *given: 1 / 0)
    async with opened(f"redis://127.0.0.1:{door.port}/0", on_dead_letter=lambda: dead.append(None)) as worker:
        await api.submit(job("a"))
        door.lose(worker._threads.client.register_script(_script("settle")).sha.encode(), 2)
        assert taken(worker) == []
        async with asyncio.timeout(30):
            while not dead:
                await asyncio.sleep(0.05)
    with redis_server.client() as client:
        assert (len(dead), client.xlen(keys.DEAD)) == (1, 1)


@pytest.mark.parametrize("keep", [None, KEEP])
async def test_a_redis_that_comes_back_without_a_take_loses_no_job(
    api: RedisQueue, redis_server: RedisServer, keep: Keep | None
) -> None:
    """The worker has it, and Redis says that it waits."""
    async with opened(redis_server.url) as worker:
        await api.submit(job("a"), keep) if keep else await api.submit(job("a"))
        with forgotten(redis_server):
            assert taken(worker) == ["a"]
        assert worker.cancelled(["a"]) == set()
        assert worker.stats().depth == 1
        assert worker.settle("a", FINISHED)
        assert (await api.status("a")).outcome == FINISHED if keep else await soon(api, "a") == FINISHED
        assert (worker.stats().depth, worker.stats().cost, taken(worker)) == (0, 0, [])
        assert not worker.settle("a", FINISHED)


async def test_a_job_that_redis_gives_again_to_who_has_it_is_not_begun_twice(
    api: RedisQueue, redis_server: RedisServer
) -> None:
    async with opened(redis_server.url) as worker:
        await api.submit(job("a"))
        with forgotten(redis_server):
            assert taken(worker) == ["a"]
        await api.submit(job("b"))
        assert taken(worker) == ["b"]
        assert all(worker.settle(name, FINISHED) for name in "ab")
        assert await soon(api, "a") == FINISHED


async def test_a_job_at_which_reading_breaks_is_given_up_and_the_next_is_taken(
    api: RedisQueue, worker: RedisQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in "ab":
        await api.submit(job(name))
    unpack_job = leases.unpack_job

    def unpack(message: bytes, *rest: Any) -> Any:
        if b"request-a" in message:
            raise AttributeError("whatever it is")
        return unpack_job(message, *rest)

    monkeypatch.setattr(leases, "unpack_job", unpack)
    assert taken(worker) == ["b"]
    assert isinstance(await soon(api, "a"), Failed)


async def test_cancelling_a_job_whose_stream_had_its_time_takes_no_cost_from_others(
    api: RedisQueue, redis_server: RedisServer
) -> None:
    for name in "ab":
        await api.submit(job(name), KEEP)
    with redis_server.client() as client:
        client.delete(keys.load(MODEL), *(keys.jobs(MODEL, priority) for priority in Priority))
        assert await api.cancel("a") == "queued"
        assert not client.exists(keys.load(MODEL))
        await api.submit(job("new"))
        assert await api.cancel("b") == "queued"
        load = client.hgetall(keys.load(MODEL))
        assert (load[b"waiting:0"], load[b"outstanding"]) == (b"4", b"4")
    assert (api.stats().depth, api.stats().cost) == (1, 4)
    for name in "ab":
        assert (await api.status(name)).state == "cancelled"
