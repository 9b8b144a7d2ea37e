"""What the queue in Redis promises beyond the contract: workers that die, a server that is away, several hosts."""

from __future__ import annotations

import asyncio
import shutil
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import redis

from engines.pipeline import Generate
from service.jobs import Failed, Finished, Job, Output, Timings
from service.queue import keys, leases
from service.queue.base import QueueFull, QueueStats, QueueUnavailable
from service.queue.leases import MAX_TRIES
from service.queue.redis import RedisQueue
from tests.service.helpers import wait_until
from tests.service.redis_server import RedisServer, Sentinel
from tests.service.tls import make_certificate, tls_door

pytestmark = pytest.mark.anyio

MODEL = "tiny@000000000000"
SILENCE_S = 0.4
FINISHED = Finished((b"image",), Timings(0, 0, 0, 0), (1,))
OTHER = Finished((b"other",), Timings(0, 0, 0, 0), (1,))

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


@asynccontextmanager
async def opened(url: str, reclaim_after_s: float = 60.0) -> AsyncIterator[RedisQueue]:
    """The queue at an address, closed whatever happens."""
    queue = RedisQueue(url, 96, reclaim_after_s=reclaim_after_s)
    try:
        yield queue
    finally:
        await queue.close()


@pytest.fixture
async def open_queue(anyio_backend: str, redis_server: RedisServer, counts: Counts) -> AsyncIterator[OpenQueue]:
    """Opens queues as processes of their own would have them."""
    async with AsyncExitStack() as closing:

        def open_queue() -> RedisQueue:
            queue = RedisQueue(
                redis_server.url,
                96,
                reclaim_after_s=SILENCE_S,
                on_redelivery=counts.redelivery,
                on_dead_letter=counts.dead_letter,
            )
            closing.push_async_callback(queue.close)
            return queue

        yield open_queue


def job(name: str, steps: int = 4, seconds: float = 60.0) -> Job:
    tasks = (Generate("a cat", steps, 0.0, 0),)
    now = time.monotonic()
    return Job(name, f"request-{name}", tasks, Output("png"), now, now + seconds, MODEL)


def taken(queue: RedisQueue, rows: int = 9, wait_s: float = 0.0) -> list[str]:
    return [job.id for job in queue.take({MODEL}, rows, wait_s)]


async def soon(queue: RedisQueue, job_id: str) -> Finished | Failed:
    return await asyncio.wait_for(queue.outcome(job_id), 60)


@contextmanager
def full(server: RedisServer) -> Iterator[None]:
    """Let a server have no memory left."""
    with redis.Redis.from_url(server.url) as client:
        client.config_set("maxmemory", 1)
        try:
            yield
        finally:
            client.config_set("maxmemory", 0)


def mute(queue: RedisQueue, monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on it renews nothing, as if its process stood still."""
    monkeypatch.setattr(queue._leases, "_renew", lambda: None)


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
        [came] = worker.take({MODEL}, 9, 0.0)
    assert came.submitted - ahead_s == pytest.approx(sent.submitted, abs=1)
    assert came.deadline - ahead_s == pytest.approx(sent.deadline, abs=1)


async def test_a_full_redis_takes_no_job_and_lets_go_of_those_it_has(
    open_queue: OpenQueue, redis_server: RedisServer
) -> None:
    api, worker = open_queue(), open_queue()
    for name in "ab":
        await api.submit(job(name))
    assert taken(worker, 1) == ["a"]
    with full(redis_server):
        for refused in (job("c"), replace(job("d"), model="other@000000000000")):
            with pytest.raises(QueueUnavailable):
                await api.submit(refused)
        assert worker.settle("a", FINISHED)
        assert await soon(api, "a") == FINISHED
        assert taken(worker) == ["b"]
        assert worker.settle("b", FINISHED)
        assert await soon(api, "b") == FINISHED
    await api.submit(job("c"))
    assert taken(worker) == ["c"]


async def test_a_slow_worker_that_lives_keeps_its_job(open_queue: OpenQueue, counts: Counts) -> None:
    api, slow, other = open_queue(), open_queue(), open_queue()
    await api.submit(job("a"))
    assert taken(slow) == ["a"]
    assert await asyncio.to_thread(taken, other, 9, 4 * SILENCE_S) == []
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
    assert await asyncio.to_thread(taken, other, 9, 10.0) == ["24"]


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
        assert client.xlen(keys.jobs(MODEL)) == 0


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
        await queue.submit(job(name, seconds=1.0))
    taken(queue, 2)
    queue.settle("a", FINISHED)
    await soon(queue, "a")
    with redis_server.client() as client:
        left = {name: client.pttl(name) for name in client.scan_iter()}
        assert left
        assert all(0 < ttl_ms <= 1000 * max(keys.GRACE_S + 1, keys.RESULT_TTL_S) for ttl_ms in left.values()), left
        assert keys.record("a").encode() not in left
        assert keys.result("a").encode() not in left
        assert client.xlen(keys.jobs(MODEL)) == 2
        queue.settle("b", FINISHED)
        taken(queue)
        queue.settle("c", FINISHED)
        await queue.close()
        assert client.xlen(keys.jobs(MODEL)) == 0
        assert client.xinfo_consumers(keys.jobs(MODEL), "workers") == []


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


@pytest.fixture
def durable(redis_path: str, tmp_path: Path) -> Iterator[RedisServer]:
    """A server that keeps what it was given through its own death."""
    with RedisServer(redis_path, tmp_path, "--appendonly", "yes", "--appendfsync", "always") as server:
        yield server


async def test_nothing_is_lost_while_the_server_is_away(anyio_backend: str, durable: RedisServer) -> None:
    async with opened(durable.url) as queue:
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
        assert queue.settle("done", FINISHED)
        assert not queue.settle("done", OTHER)
        outcomes = [asyncio.create_task(soon(queue, name)) for name in ("done", "waits")]
        await asyncio.sleep(0.1)
        durable.start()
        assert await outcomes[0] == FINISHED
        wait_until(lambda: taken(queue, wait_s=0.1) == ["waits"])
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


@pytest.mark.slow
async def test_a_server_that_hangs_is_away_too(anyio_backend: str, durable: RedisServer) -> None:
    async with opened(durable.url) as queue:
        await queue.submit(job("a"))
        assert taken(queue) == ["a"]
        hanging = asyncio.create_task(asyncio.to_thread(durable.pause, 14.0))
        await asyncio.sleep(0.1)
        with pytest.raises(QueueUnavailable):
            await queue.submit(job("refused"))
        assert await asyncio.to_thread(queue.cancelled, ["a"]) == set()
        assert queue.settle("a", FINISHED)
        assert not hanging.done()
        await hanging
        assert await soon(queue, "a") == FINISHED
        await queue.submit(job("b"))
        wait_until(lambda: "b" in taken(queue, wait_s=0.1))


async def test_a_server_that_was_never_there_is_no_crash(anyio_backend: str) -> None:
    async with opened("redis://127.0.0.1:1/0") as queue:
        with pytest.raises(QueueUnavailable):
            await queue.submit(job("a"))
        with pytest.raises(KeyError):
            await queue.outcome("a")
        assert taken(queue) == []


async def works(url: str, name: str) -> None:
    """Take a job through the queue at this address."""
    async with opened(url) as queue:
        await queue.submit(job(name))
        assert taken(queue, wait_s=0.1) == [name]
        assert queue.cancelled([name]) == set()
        assert queue.settle(name, FINISHED)
        assert await soon(queue, name) == FINISHED
        assert queue.stats() == QueueStats(0, 0, 0.0)


async def test_a_cluster(anyio_backend: str, redis_path: str, tmp_path: Path) -> None:
    with RedisServer(redis_path, tmp_path, "--cluster-enabled", "yes") as server:
        with server.client() as client:
            client.execute_command("CLUSTER", "ADDSLOTS", *range(16384))
            wait_until(lambda: client.cluster("info")["cluster_state"] == "ok")
        await works(f"redis+cluster://127.0.0.1:{server.port}", "a")


async def test_a_sentinel(anyio_backend: str, redis_path: str, redis_server: RedisServer, tmp_path: Path) -> None:
    with Sentinel(redis_path, tmp_path, redis_server) as sentinel:
        await works(sentinel.url, "a")


@pytest.mark.slow
async def test_a_failover(anyio_backend: str, redis_path: str, tmp_path: Path) -> None:
    master = RedisServer(redis_path, tmp_path)
    replica = RedisServer(redis_path, tmp_path, "--replicaof", "127.0.0.1", f"{master.port}")
    sentinel = Sentinel(redis_path, tmp_path, master)
    with master, replica, sentinel, replica.client() as client:
        wait_until(lambda: client.info("replication")["master_link_status"] == "up")
        async with opened(sentinel.url) as queue:
            await queue.submit(job("a"))
            wait_until(lambda: client.exists(keys.record("a")) == 1)
            # A sentinel asks a master for its replicas every ten seconds.
            with sentinel.client() as asking:
                wait_until(lambda: asking.execute_command("SENTINEL", "REPLICAS", "main") != [], 30)
            master.stop()
            with pytest.raises(QueueUnavailable):
                await queue.submit(job("refused"))
            wait_until(lambda: taken(queue, wait_s=0.2) == ["a"], 30)
            assert queue.settle("a", FINISHED)
            assert await soon(queue, "a") == FINISHED
            await works(sentinel.url, "b")


async def test_tls(anyio_backend: str, redis_server: RedisServer, tmp_path: Path) -> None:
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("no openssl to make a certificate with")
    certificate, key = make_certificate(openssl, tmp_path)
    with tls_door(redis_server.port, certificate, key) as port:
        await works(f"rediss://127.0.0.1:{port}/0?ssl_ca_certs={certificate}", "a")
        async with opened(f"rediss://127.0.0.1:{port}/0") as distrustful:
            with pytest.raises(QueueUnavailable):
                await distrustful.submit(job("b"))


async def test_a_password_and_a_socket(anyio_backend: str, redis_path: str, tmp_path: Path) -> None:
    socket = tmp_path / "redis.sock"
    options = ("--requirepass", "p@ss", "--unixsocket", str(socket))
    with RedisServer(redis_path, tmp_path, *options, password="p@ss") as server:
        async with opened(server.url.replace("p%40ss", "guess")) as wrong:
            with pytest.raises(QueueUnavailable):
                await wrong.submit(job("a"))
        await works(server.url, "b")
        await works(f"unix://:p%40ss@{socket}", "c")
