"""The addresses of a Redis: what they lead to, and that a wrong one is refused without being quoted."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import redis
from click.testing import CliRunner
from pydantic import ValidationError

from service.commands import serve
from service.queue.addresses import check_address, open_for_coroutines, open_for_threads
from service.settings import Settings

SECRET = "hunter2"
GOOD = [
    "redis://localhost",
    f"redis://:{SECRET}@redis.example:6380/3",
    f"rediss://user:{SECRET}@redis.example/0",
    f"unix://user:{SECRET}@/run/redis.sock?db=2",
    f"redis+sentinel://user:{SECRET}@one,two:26380/main/1",
    "redis+sentinel://one/main",
    f"redis+sentinel://one/main/1?sentinel_password={SECRET}&sentinel_username=watch",
    "rediss+cluster://one:7000,two:7001",
    "redis://[::1]:6380/0",
    f"redis+sentinel://:{SECRET}@[::1],one,[fe80::1%eth0]:26380/main",
    f"rediss://:{SECRET}@localhost/0?ssl_ca_certs=/ca.pem&ssl_check_hostname=false&health_check_interval=30",
]
BAD = [
    "Memory",
    "amqp://localhost",
    f"redis://:{SECRET}@localhost:port/0",
    f"redis://:{SECRET}@localhost/zero",
    f"redis://:{SECRET}@localhost/0?socket_timeout=soon",
    f"redis://:{SECRET}@localhost/0?foo=bar",
    f"redis://:{SECRET}@localhost/0?foo",
    f"redis://localhost/0?password={SECRET}",
    f"redis://localhost/0#{SECRET}",
    f"redis://:{SECRET}@localhost/0?ssl_ca_certs=/ca.pem",
    f"rediss://:{SECRET}@localhost/0?ssl_cert_reqs=perhaps",
    f"redis://:{SECRET}@localhost/0?health_check_interval=often",
    f"redis://:{SECRET}@[::1/0",
    f"unix://:{SECRET}@",
    f"redis+sentinel://:{SECRET}@one,two",
    f"redis+sentinel://:{SECRET}@one/main/zero",
    f"redis+sentinel://:{SECRET}@one:port/main",
    f"redis+sentinel://one/main?password={SECRET}",
    f"redis+sentinel://one/main?sentinel_password={SECRET}&db=1",
    f"redis+sentinel://one/main?{SECRET}",
    f"redis+sentinel://one/main#{SECRET}",
    f"redis+cluster://one?sentinel_password={SECRET}",
    f"redis+cluster://:{SECRET}@one,,two",
    f"redis+cluster://:{SECRET}@one/0",
    f"redis+cluster://:{SECRET}@one?db=1",
    f"rediss+cluster://:{SECRET}@one#1",
    f"redis+cluster://:{SECRET}@::1:7000",
    f"redis+cluster://:{SECRET}@[::1",
    f"redis+cluster://:{SECRET}@[one]:7000",
    f"redis+sentinel://:{SECRET}@[::1]26379/main",
    f"redis+sentinel://:{SECRET}@one:999999/main",
]


pytestmark = pytest.mark.anyio


@pytest.mark.parametrize("url", GOOD)
def test_good_addresses_are_taken(url: str) -> None:
    check_address(url)
    assert SECRET not in repr(Settings(queue=url))


@pytest.mark.parametrize("url", BAD)
def test_bad_addresses_end_at_once_and_are_not_quoted(url: str) -> None:
    with pytest.raises(ValidationError) as caught:
        Settings(queue=url)
    assert SECRET not in str(caught.value)
    result = CliRunner().invoke(serve, ["--queue", url])
    assert result.exit_code == 2
    assert "queue" in result.output
    assert SECRET not in result.output


def test_an_unknown_option_is_answered_with_those_that_there_are() -> None:
    with pytest.raises(ValueError, match=r"are db, client_name, health_check_interval, and no others"):
        check_address("redis://localhost/0?foo=bar")
    with pytest.raises(ValueError, match="ssl_ca_certs"):
        check_address("rediss://localhost/0?foo=bar")


@pytest.mark.parametrize("role", ["api", "worker"])
def test_roles_that_are_apart_need_a_queue_between_them(role: str) -> None:
    result = CliRunner().invoke(serve, ["--role", role])
    assert result.exit_code == 2
    assert "Redis" in result.output


@contextlib.contextmanager
def opened(url: str) -> Iterator[dict[str, Any]]:
    """What a client of one server, or of sentinels, connects with."""
    with open_for_threads(url) as client:
        settings = dict(client.connection_pool.connection_kwargs)
        assert settings.items() >= {"socket_timeout": 5.0}.items()
        yield settings


def test_one_server() -> None:
    with opened(f"redis://user:{SECRET}@redis.example:6380/3") as found:
        assert (found["host"], found["port"], found["db"]) == ("redis.example", 6380, 3)
        assert (found["username"], found["password"]) == ("user", SECRET)


def test_tls() -> None:
    with open_for_threads("rediss://redis.example") as client:
        assert client.connection_pool.connection_class is redis.SSLConnection


def test_a_socket() -> None:
    with opened("unix:///run/redis.sock?db=2") as found:
        assert (found["path"], found["db"]) == ("/run/redis.sock", 2)


def sentinels_of(client: Any) -> list[Any]:
    """The pools of connections to the sentinels of a client."""
    return [one.connection_pool for one in client.connection_pool.sentinel_manager.sentinels]


def places(pools: list[Any]) -> list[tuple[str, int]]:
    return [(pool.connection_kwargs["host"], pool.connection_kwargs["port"]) for pool in pools]


def test_sentinels() -> None:
    with open_for_threads("redis+sentinel://user:p%40ss@one,two:26380/main/1") as client:
        assert places(sentinels_of(client)) == [("one", 26379), ("two", 26380)]
        pool: Any = client.connection_pool
        found = pool.connection_kwargs
        assert (pool.service_name, found["db"], found["username"], found["password"]) == ("main", 1, "user", "p@ss")


def test_sentinels_have_a_password_of_their_own() -> None:
    url = "redis+sentinel://user:pass@one,two/main?sentinel_username=watch&sentinel_password=p%40s+s"
    for client in (open_for_threads(url), open_for_coroutines(url)):
        for pool in sentinels_of(client):
            found = pool.connection_kwargs
            assert (found["username"], found["password"], found["socket_timeout"]) == ("watch", "p@s+s", 5.0)
        servers: Any = client.connection_pool
        assert (servers.connection_kwargs["username"], servers.connection_kwargs["password"]) == ("user", "pass")


async def test_sentinels_get_tls_and_no_password(anyio_backend: str) -> None:
    url = "rediss+sentinel://user:p%40ss@one,two/main"
    blocking, awaited = open_for_threads(url), open_for_coroutines(url)
    for client, secure in ((blocking, redis.SSLConnection), (awaited, redis.asyncio.SSLConnection)):
        assert issubclass(client.connection_pool.connection_class, secure)
        for pool in sentinels_of(client):
            assert pool.connection_class is secure
            found = pool.connection_kwargs
            assert (found["username"], found["password"], found["socket_timeout"]) == (None, None, 5.0)


def test_ipv6_addresses() -> None:
    with open_for_threads("redis+sentinel://:p%40ss@[::1],[2001:db8::2]:26380,one/main") as client:
        assert places(sentinels_of(client)) == [("::1", 26379), ("2001:db8::2", 26380), ("one", 26379)]
    cluster: Any = open_for_coroutines("redis+cluster://[::1]:7000")
    [node] = cluster.nodes_manager.startup_nodes.values()
    assert (node.host, node.port) == ("::1", 7000)


def test_a_cluster() -> None:
    client: Any = open_for_coroutines("redis+cluster://:secret@10.0.0.1:7000,10.0.0.2")
    assert set(client.nodes_manager.startup_nodes) == {"10.0.0.1:7000", "10.0.0.2:6379"}
    assert client.connection_kwargs["password"] == "secret"
