"""The queue on every kind of Redis that an address can name: sockets, passwords, TLS, sentinels, clusters."""

from __future__ import annotations

import asyncio
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from engines.pipeline import Edit
from service.queue import keys
from service.queue.base import QueueStats, QueueUnavailable
from tests.service.helpers import random_image, wait_until
from tests.service.queues import FINISHED, job, opened, soon, taken
from tests.service.redis_cluster import RedisCluster
from tests.service.redis_server import RedisServer, Sentinel, free_port
from tests.service.tls import make_certificate, tls_door

pytestmark = pytest.mark.anyio


def has_ipv6() -> bool:
    """Whether there is a loopback address of the newer kind."""
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
    except OSError:
        return False
    return True


async def works(url: str, name: str) -> None:
    """Take a job through the queue at this address."""
    async with opened(url) as queue:
        await queue.submit(job(name))
        assert taken(queue, wait_s=0.1) == [name]
        assert queue.cancelled([name]) == set()
        assert queue.settle(name, FINISHED)
        assert await soon(queue, name) == FINISHED
        assert queue.stats() == QueueStats(0, 0, 0.0)


async def works_for_many(url: str) -> None:
    """Hand hundreds of jobs with images to the queue at this address, all at once."""
    names = [f"{k}" for k in range(500)]
    edit = Edit("a cat", 2, 0.0, 0, random_image(), strength=0.5)
    async with opened(url, max_cost=4 * len(names)) as queue:
        await asyncio.gather(*(queue.submit(replace(job(name), tasks=(edit,))) for name in names))
        assert sorted(taken(queue, len(names))) == sorted(names)


@contextmanager
def cluster_of_one(redis_path: str, folder: Path, *options: str) -> Iterator[RedisServer]:
    """A node that has every slot."""
    with RedisServer(redis_path, folder, "--cluster-enabled", "yes", *options) as server:
        with server.client() as client:
            client.execute_command("CLUSTER", "ADDSLOTS", *range(16384))
            wait_until(lambda: client.cluster("info")["cluster_state"] == "ok")
        yield server


async def test_a_cluster_of_one_node(anyio_backend: str, redis_path: str, tmp_path: Path) -> None:
    with cluster_of_one(redis_path, tmp_path) as server:
        await works(f"redis+cluster://127.0.0.1:{server.port}", "a")


@pytest.mark.skipif(not has_ipv6(), reason="no IPv6 on this host")
async def test_ipv6_addresses(anyio_backend: str, redis_path: str, tmp_path: Path) -> None:
    both = ("--bind", "127.0.0.1", "::1")
    with cluster_of_one(redis_path, tmp_path, *both) as server:
        await works(f"redis+cluster://[::1]:{server.port}", "a")
    with RedisServer(redis_path, tmp_path, *both) as server, Sentinel(redis_path, tmp_path, server) as sentinel:
        await works(f"redis://[::1]:{server.port}/0", "b")
        await works(f"redis+sentinel://[::1]:{sentinel.port}/main", "c")


async def test_hundreds_at_once_are_no_outage(
    anyio_backend: str, redis_path: str, redis_server: RedisServer, cluster: RedisCluster, tmp_path: Path
) -> None:
    await works_for_many(redis_server.url)
    await works_for_many(cluster.url)
    with redis_server.client() as client:
        client.flushall()
    with Sentinel(redis_path, tmp_path, redis_server) as sentinel:
        await works_for_many(sentinel.url)


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


async def test_a_sentinel_that_wants_a_password(
    anyio_backend: str, redis_path: str, redis_server: RedisServer, tmp_path: Path
) -> None:
    with Sentinel(redis_path, tmp_path, redis_server, "for: sentinels?") as sentinel:
        await works(f"{sentinel.url}?sentinel_password=for%3A%20sentinels%3F", "a")
        with pytest.raises(QueueUnavailable):
            await works(sentinel.url, "b")


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


@pytest.fixture
def certificate(tmp_path: Path) -> tuple[Path, Path]:
    """A certificate and its key."""
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("no openssl to make a certificate with")
    return make_certificate(openssl, tmp_path)


async def test_tls(anyio_backend: str, redis_server: RedisServer, certificate: tuple[Path, Path]) -> None:
    with tls_door(redis_server.port, *certificate) as port:
        await works(f"rediss://127.0.0.1:{port}/0?ssl_ca_certs={certificate[0]}", "a")
        async with opened(f"rediss://127.0.0.1:{port}/0") as distrustful:
            with pytest.raises(QueueUnavailable):
                await distrustful.submit(job("b"))


async def test_a_sentinel_with_tls_and_the_password_of_its_master(
    anyio_backend: str,
    redis_path: str,
    certificate: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with (
        RedisServer(redis_path, tmp_path, "--requirepass", "p@ss", password="p@ss") as server,
        Sentinel(redis_path, tmp_path, server) as sentinel,
        tls_door(server.port, *certificate) as port,
        tls_door(sentinel.port, *certificate, instead=(server.port, port)) as asked,
    ):
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate[0]))
        await works(f"rediss+sentinel://:p%40ss@127.0.0.1:{asked}/main", "a")


async def test_a_cluster_with_tls(
    anyio_backend: str,
    redis_path: str,
    certificate: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate[0]))
    door = free_port()
    announced = ("--cluster-announce-port", f"{door}")
    with cluster_of_one(redis_path, tmp_path, *announced) as server, tls_door(server.port, *certificate, door=door):
        await works(f"rediss+cluster://127.0.0.1:{door}", "a")


async def test_a_password_and_a_socket(anyio_backend: str, redis_path: str, tmp_path: Path) -> None:
    socket = tmp_path / "redis.sock"
    options = ("--requirepass", "p@ss", "--unixsocket", str(socket))
    with RedisServer(redis_path, tmp_path, *options, password="p@ss") as server:
        async with opened(server.url.replace("p%40ss", "guess")) as wrong:
            with pytest.raises(QueueUnavailable):
                await wrong.submit(job("a"))
        await works(server.url, "b")
        await works(f"unix://:p%40ss@{socket}", "c")
