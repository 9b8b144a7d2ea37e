"""The queue on every kind of Redis that an address can name: sockets, passwords, TLS, sentinels, clusters."""

from __future__ import annotations

import asyncio
import shutil
from pathlib import Path

import pytest

from service.queue import keys
from service.queue.base import QueueStats, QueueUnavailable
from tests.service.helpers import wait_until
from tests.service.queues import FINISHED, job, opened, soon, taken
from tests.service.redis_cluster import RedisCluster
from tests.service.redis_server import RedisServer, Sentinel
from tests.service.tls import make_certificate, tls_door

pytestmark = pytest.mark.anyio


async def works(url: str, name: str) -> None:
    """Take a job through the queue at this address."""
    async with opened(url) as queue:
        await queue.submit(job(name))
        assert taken(queue, wait_s=0.1) == [name]
        assert queue.cancelled([name]) == set()
        assert queue.settle(name, FINISHED)
        assert await soon(queue, name) == FINISHED
        assert queue.stats() == QueueStats(0, 0, 0.0)


async def test_a_cluster_of_one_node(anyio_backend: str, redis_path: str, tmp_path: Path) -> None:
    with RedisServer(redis_path, tmp_path, "--cluster-enabled", "yes") as server:
        with server.client() as client:
            client.execute_command("CLUSTER", "ADDSLOTS", *range(16384))
            wait_until(lambda: client.cluster("info")["cluster_state"] == "ok")
        await works(f"redis+cluster://127.0.0.1:{server.port}", "a")


async def test_a_cluster_is_asked_at_the_right_node_from_the_first_command_on(
    anyio_backend: str, cluster: RedisCluster
) -> None:
    before = cluster.redirections()
    async with opened(cluster.url) as queue:
        await asyncio.gather(*(queue.submit(job(f"{k}", steps=1)) for k in range(20)))
        assert len(taken(queue, 20)) == 20
    assert cluster.redirections() == before


async def test_a_cluster_whose_slots_move(anyio_backend: str, cluster: RedisCluster) -> None:
    async with opened(cluster.url) as queue:
        for name in "ab":
            await queue.submit(job(name))
        assert taken(queue, 1) == ["a"]
        new = cluster.begin_move()
        assert queue.stats() == QueueStats(1, 4, pytest.approx(0, abs=60))
        cluster.end_move(new)
        assert cluster.owner is new
        assert queue.settle("a", FINISHED)
        assert await soon(queue, "a") == FINISHED
        await queue.submit(job("c"))
        assert taken(queue) == ["b", "c"]
    await works(cluster.url, "d")


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
