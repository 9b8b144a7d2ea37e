"""The address of a Redis -> clients for it. Knows nothing of jobs.

    redis://[[user]:password@]host:6379/0                      one server
    unix://[[user]:password@]/path/to/socket?db=0              one server on this host
    redis+sentinel://[[user]:password@]host:26379,.../name/0   the server that sentinels call the master of a name
    redis+cluster://[[user]:password@]host:6379,...            a cluster

rediss://, rediss+sentinel:// and rediss+cluster:// are the same with TLS.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self
from urllib.parse import unquote, urlsplit

if TYPE_CHECKING:
    import redis
    import redis.asyncio

_ONE = ("redis", "rediss", "unix")
_MANY = ("redis+sentinel", "rediss+sentinel", "redis+cluster", "rediss+cluster")
_PORTS = {"sentinel": 26379, "cluster": 6379}
# The first is longer than any command blocks, so that only a silent server runs into it.
_SOCKETS: dict[str, Any] = {"socket_timeout": 5.0, "socket_connect_timeout": 2.0, "protocol": 2}
# A connection that the server closed meanwhile is opened anew; more patience is the callers' affair.
_RETRIES = 1
# After some redirections the client of a cluster would close all its connections, also those in use. As all keys are
# in one slot, each redirection teaches it all there is to know.
_CLUSTER: dict[str, Any] = {"reinitialize_steps": 0}

LONGEST_BLOCK_S = 1.0
"""The longest that one command may wait for something to happen."""


def check_address(url: str) -> None:
    """Raise ValueError, which quotes nothing of the address, unless it is one of those above."""
    scheme = url.partition("://")[0]
    if scheme in _MANY:
        _Many.of(url)
    elif scheme in _ONE:
        _check_one(url)
    else:
        raise ValueError(f"the queue is memory, or a URL that begins with {'://, '.join((*_ONE, *_MANY))}://")


def open_for_threads(url: str) -> redis.Redis:
    """A client whose calls block. Raises redis-py's errors where no seed of a cluster answers."""
    import redis
    import redis.cluster
    import redis.retry
    import redis.sentinel
    from redis.backoff import NoBackoff

    options = _SOCKETS | {"retry": redis.retry.Retry(NoBackoff(), _RETRIES, (redis.ConnectionError,))}
    if url.partition("://")[0] in _ONE:
        return redis.Redis.from_url(url, **options)
    many = _Many.of(url)
    client: Any
    if many.kind == "cluster":
        nodes = [redis.cluster.ClusterNode(host, port) for host, port in many.hosts]
        client = redis.cluster.RedisCluster(startup_nodes=nodes, **_CLUSTER, **options, **many.access)
    else:
        sentinel = redis.sentinel.Sentinel(many.hosts, **_SOCKETS)
        client = sentinel.master_for(many.name, db=many.database, **options, **many.access)
    opened: redis.Redis = client
    return opened


def open_for_coroutines(url: str) -> redis.asyncio.Redis:
    """A client for one event loop."""
    import redis.asyncio
    import redis.asyncio.cluster
    import redis.asyncio.retry
    import redis.asyncio.sentinel
    from redis.backoff import NoBackoff

    options = _SOCKETS | {"retry": redis.asyncio.retry.Retry(NoBackoff(), _RETRIES, (redis.ConnectionError,))}
    if url.partition("://")[0] in _ONE:
        return redis.asyncio.Redis.from_url(url, **options)
    many = _Many.of(url)
    client: Any
    if many.kind == "cluster":
        nodes = [redis.asyncio.cluster.ClusterNode(host, port) for host, port in many.hosts]
        client = redis.asyncio.cluster.RedisCluster(startup_nodes=nodes, **_CLUSTER, **options, **many.access)
    else:
        sentinel = redis.asyncio.sentinel.Sentinel(many.hosts, **_SOCKETS)
        client = sentinel.master_for(many.name, db=many.database, **options, **many.access)
    opened: redis.asyncio.Redis = client
    return opened


async def close_for_coroutines(client: redis.asyncio.Redis) -> None:
    """Close the client, and what redis-py leaves open: clients of sentinels, and nodes of a cluster after an error."""
    await client.aclose()
    if (nodes := getattr(client, "nodes_manager", None)) is not None:
        await nodes.aclose()
        await nodes.aclose("startup_nodes")
    pool = getattr(client, "connection_pool", None)
    manager = getattr(pool, "sentinel_manager", None)
    for sentinel in manager.sentinels if manager else ():
        await sentinel.aclose()


def _check_one(url: str) -> None:
    from redis.connection import parse_url

    try:
        parse_url(url)
        parts = urlsplit(url)
        database = "0" if parts.scheme == "unix" else parts.path.strip("/") or "0"
    except ValueError:
        raise ValueError("the URL of the queue cannot be read") from None
    if not database.isdecimal():
        raise ValueError("the path of the queue's URL is the number of a database")
    if parts.scheme == "unix" and not parts.path:
        raise ValueError("the path of the queue's URL is that of a socket")


@dataclass(frozen=True)
class _Many:
    """An address of several hosts."""

    kind: str
    hosts: list[tuple[str, int]]
    name: str
    database: int
    access: dict[str, Any]

    @classmethod
    def of(cls, url: str) -> Self:
        """Read it. Raises ValueError, which quotes nothing of it."""
        parts = urlsplit(url)
        base, kind = parts.scheme.split("+")
        if parts.query or parts.fragment:
            raise ValueError("a queue's URL of several hosts has no options")
        credentials, _, listed = parts.netloc.rpartition("@")
        user, _, password = credentials.partition(":")
        access: dict[str, Any] = {"ssl": True} if base == "rediss" else {}
        access |= {key: unquote(text) for key, text in (("username", user), ("password", password)) if text}
        name, _, database = parts.path.strip("/").partition("/")
        if (kind == "sentinel") != bool(name) or not (database or "0").isdecimal():
            raise ValueError("the path of the queue's URL is /name or /name/database with sentinels, none in a cluster")
        return cls(kind, [_host(text, _PORTS[kind]) for text in listed.split(",")], name, int(database or 0), access)


def _host(text: str, default_port: int) -> tuple[str, int]:
    host, colon, port = text.rpartition(":")
    if not colon:
        host, port = text, str(default_port)
    if not host or not port.isdecimal():
        raise ValueError("each host of the queue's URL is host or host:port")
    return host, int(port)
