"""The queue in Redis while its server is away, hangs, or was never there."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from threading import Barrier
from typing import Any

import pytest

from service.jobs import Outcome
from service.queue import clients, leases, submissions
from service.queue.base import QueueStats, QueueUnavailable
from service.queue.redis import RedisQueue
from tests.service.helpers import wait_until
from tests.service.queues import FINISHED, OTHER, job, mute, opened, soon, taken
from tests.service.redis_cluster import redis_cluster
from tests.service.redis_server import RedisServer

pytestmark = pytest.mark.anyio


@pytest.fixture
def durable(redis_path: str, tmp_path: Path) -> Iterator[RedisServer]:
    """A server that keeps what it was given through its own death."""
    with RedisServer(redis_path, tmp_path, "--appendonly", "yes", "--appendfsync", "always") as server:
        yield server


async def test_nothing_is_lost_while_the_server_is_away(anyio_backend: str, durable: RedisServer) -> None:
    late: list[Outcome] = []
    async with opened(durable.url, on_late_outcome=late.append) as queue:
        await queue.submit(job("done"))
        await queue.submit(job("waits"))
        assert taken(queue, 1) == ["done"]
        durable.stop()
        with pytest.raises(QueueUnavailable):
            await queue.submit(job("refused"))
        with pytest.raises(QueueUnavailable):
            await queue.cancel("refused")
        with pytest.raises(QueueUnavailable):
            queue.stats()
        begin = time.monotonic()
        assert taken(queue, wait_s=0.2) == []
        assert time.monotonic() - begin >= 0.2
        assert queue.cancelled(["done"]) == set()
        assert not queue.settle("done", FINISHED)
        assert not queue.settle("done", OTHER)
        outcomes = [asyncio.create_task(soon(queue, name)) for name in ("done", "waits")]
        await asyncio.sleep(0.1)
        durable.start()
        assert await outcomes[0] == FINISHED
        wait_until(lambda: taken(queue, wait_s=0.1) == ["waits"])
        wait_until(lambda: late == [FINISHED])  # Told once Redis has it: who waits may know before.
        assert queue.settle("waits", OTHER)
        assert await outcomes[1] == OTHER
        assert queue.stats() == QueueStats(0, 0, 0.0)


async def test_an_outage_is_no_silence(
    anyio_backend: str, durable: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with opened(durable.url, 1.5) as holder, opened(durable.url, 1.5) as other:
        await holder.submit(job("a"))
        assert taken(holder) == ["a"]
        assert taken(other) == []
        mute(holder, monkeypatch)
        durable.stop()
        assert taken(other, wait_s=1.6) == []
        durable.start()
        # Who could say nothing gets his time anew, and then was silent indeed.
        assert taken(other, wait_s=1.0) == []
        assert taken(other, wait_s=10.0) == ["a"]


@contextmanager
def read_only(server: RedisServer) -> Iterator[None]:
    """Let a server take no writes, as one that became a replica."""
    with server.client() as client:
        client.execute_command("REPLICAOF", "127.0.0.1", "1")
        try:
            yield
        finally:
            client.execute_command("REPLICAOF", "NO", "ONE")


async def test_a_server_that_takes_no_writes_is_away(
    anyio_backend: str, redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    monkeypatch.setattr(submissions, "_POLL_S", 0.01)
    for module in (leases, submissions):
        monkeypatch.setattr(module, "_AFTER_ERROR_S", 0.0)
    async with opened(redis_server.url) as queue:
        await queue.submit(job("a"))
        assert taken(queue) == ["a"]
        with read_only(redis_server):
            assert not there(queue)
            with pytest.raises(QueueUnavailable):
                await queue.submit(job("b"))
            for _ in range(3):
                await queue.ask(job("b"))
                assert taken(queue, wait_s=0.01) == []
                assert queue.cancelled(["a"]) == set()
                await asyncio.sleep(0.03)
            assert caplog.messages.count("the queue is away") == 2  # To those who submit, and to the worker.
            assert "the queue is back" not in caplog.messages
        assert there(queue)
        assert queue.settle("a", FINISHED)
        assert await soon(queue, "a") == FINISHED
        assert caplog.messages.count("the queue is away") == caplog.messages.count("the queue is back") == 2


async def test_a_server_that_hangs_is_away_too(anyio_backend: str, durable: RedisServer) -> None:
    async with opened(durable.url) as queue:
        await queue.submit(job("a"))
        assert taken(queue) == ["a"]
        hanging = asyncio.create_task(asyncio.to_thread(durable.pause, 14.0))
        await asyncio.sleep(0.1)
        with pytest.raises(QueueUnavailable):
            await queue.submit(job("refused"))
        assert await asyncio.to_thread(queue.cancelled, ["a"]) == set()
        assert queue.settle("a", FINISHED) is None
        assert not hanging.done()
        await hanging
        assert await soon(queue, "a") == FINISHED
        await queue.submit(job("b"))
        wait_until(lambda: "b" in taken(queue, wait_s=0.1))


async def test_who_gets_no_turn_for_too_long_is_told_so(
    anyio_backend: str, redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(clients, "_AT_ONCE", 1)
    async with opened(redis_server.url) as queue:
        with monkeypatch.context() as patched:
            patched.setattr(clients, "_TURN_WITHIN_S", 0.1)
            async with queue._coroutines.turn():
                with pytest.raises(QueueUnavailable):
                    await queue.submit(job("refused"))
        await queue.submit(job("a"))
        assert taken(queue) == ["a"]


async def test_a_server_that_was_never_there_is_no_crash(anyio_backend: str) -> None:
    async with opened("redis://127.0.0.1:1/0") as queue:
        with pytest.raises(QueueUnavailable):
            await queue.submit(job("a"))
        with pytest.raises(KeyError):
            await queue.outcome("a")
        assert taken(queue) == []


async def test_who_has_nothing_to_say_does_not_take_the_server_for_back(
    anyio_backend: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    async with opened("redis://127.0.0.1:1/0", reclaim_after_s=0.5) as queue:
        assert taken(queue) == []
        await asyncio.sleep(1.0)  # Beats that have nothing to renew.
    assert caplog.messages.count("the queue is away") == 1
    assert "the queue is back" not in caplog.messages


async def test_threads_that_find_the_queue_away_at_once_say_so_once(
    anyio_backend: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    together = Barrier(8)
    warning = leases.logger.warning

    def find_out(queue: RedisQueue) -> None:
        together.wait()
        assert queue.owes("tiny")

    def warn_slowly(*arguments: Any, **named: Any) -> None:
        time.sleep(0.05)
        warning(*arguments, **named)

    monkeypatch.setattr(leases.logger, "warning", warn_slowly)
    async with opened("redis://127.0.0.1:1/0") as queue:
        with ThreadPoolExecutor(together.parties) as threads:
            for found in [threads.submit(find_out, queue) for _ in range(together.parties)]:
                found.result()
    assert caplog.messages.count("the queue is away") == 1


async def test_an_answer_from_before_a_failure_does_not_say_that_the_queue_is_back(
    anyio_backend: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    async with opened("redis://127.0.0.1:1/0") as queue:
        # What another thread finds out while an answer is on its way.
        assert queue._leases._reach(lambda: queue.owes("tiny"), False)
    assert caplog.messages == ["the queue is away"]


async def test_a_node_of_a_cluster_is_away(anyio_backend: str, redis_path: str, tmp_path: Path) -> None:
    with redis_cluster(redis_path, tmp_path) as cluster:
        owner = cluster.owner
        async with opened(cluster.url) as queue:
            await queue.submit(job("lost"))
            owner.stop()
            with pytest.raises(QueueUnavailable):
                await queue.submit(job("refused"))
            assert taken(queue) == []
            owner.start()
            wait_until(lambda: there(queue))
            await queue.submit(job("a"))
            wait_until(lambda: taken(queue, wait_s=0.1) == ["a"])
            assert queue.settle("a", FINISHED)
            assert await soon(queue, "a") == FINISHED
            owner.stop()
            # With this it closes: nothing of it must stay open.
            with pytest.raises(QueueUnavailable):
                await queue.submit(job("refused"))


def there(queue: RedisQueue) -> bool:
    try:
        queue.stats()
    except QueueUnavailable:
        return False
    return True
