"""The address of a Redis -> clients for it. Knows nothing of jobs.

    redis://[[user]:password@]host:6379/0                      one server
    unix://[[user]:password@]/path/to/socket?db=0              one server on this host
    redis+sentinel://[[user]:password@]host:26379,.../name/0   the server that sentinels call the master of a name
    redis+cluster://[[user]:password@]host:6379,...            a cluster

rediss://, rediss+sentinel:// and rediss+cluster:// are the same with TLS, to the sentinels too. The user and the
password are those of the servers that hold the queue; the options sentinel_username and sentinel_password are those of
the sentinels. An IPv6 address stands in brackets, as in redis+cluster://[::1]:6379. The address of one server may have
options of redis-py, those in `_OPTIONS`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from ipaddress import IPv6Address
from typing import TYPE_CHECKING, Any, Self
from urllib.parse import parse_qsl, unquote, urlsplit

if TYPE_CHECKING:
    import redis
    import redis.asyncio

_ONE = ("redis", "rediss", "unix")
_MANY = ("redis+sentinel", "rediss+sentinel", "redis+cluster", "rediss+cluster")
_PORTS = {"sentinel": 26379, "cluster": 6379}
# What a URL may say besides: nothing that would change how the queue speaks to Redis.
_OPTIONS = ("db", "client_name", "health_check_interval")
_TLS_OPTIONS = (
    "ssl_ca_certs",
    "ssl_ca_path",
    "ssl_certfile",
    "ssl_keyfile",
    "ssl_password",
    "ssl_cert_reqs",
    "ssl_check_hostname",
)
# What sentinels ask for, by the names that redis-py gives it.
_SENTINEL_OPTIONS = {"sentinel_username": "username", "sentinel_password": "password"}
_HOST = re.compile(r"(?:\[(?P<address>[^\[\]]+)\]|(?P<name>[^\[\]:]+))(?::(?P<port>[0-9]{1,5}))?")
# The first is longer than any command blocks, so that only a silent server runs into it.
_SOCKETS: dict[str, Any] = {"socket_timeout": 5.0, "socket_connect_timeout": 2.0, "protocol": 2}
# A connection that the server closed meanwhile is opened anew; more patience is the callers' affair.
_RETRIES = 1
# After some redirections the client of a cluster would close all its connections, also those in use. As all keys are
# in one slot, each redirection teaches it all there is to know.
_CLUSTER: dict[str, Any] = {"reinitialize_steps": 0}

_UNREADABLE = "the URL of the queue cannot be read"

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
    import redis.cluster
    import redis.retry
    import redis.sentinel

    client: redis.Redis = _open(url, redis)
    return client


def open_for_coroutines(url: str) -> redis.asyncio.Redis:
    """A client for one event loop."""
    import redis.asyncio.cluster
    import redis.asyncio.retry
    import redis.asyncio.sentinel

    client: redis.asyncio.Redis = _open(url, redis.asyncio)
    return client


def _open(url: str, library: Any) -> Any:
    """A client of redis-py, or of its part for coroutines, which has all of it by the same names."""
    from redis.backoff import NoBackoff

    options = _SOCKETS | {"retry": library.retry.Retry(NoBackoff(), _RETRIES, (library.ConnectionError,))}
    if url.partition("://")[0] in _ONE:
        return library.Redis.from_url(url, **options)
    many = _Many.of(url)
    options |= many.tls | many.access
    if many.kind == "cluster":
        nodes = [library.cluster.ClusterNode(host, port) for host, port in many.hosts]
        return library.cluster.RedisCluster(startup_nodes=nodes, **_CLUSTER, **options)
    of_sentinels = _SOCKETS | many.tls | many.sentinel_access
    sentinel = library.sentinel.Sentinel(many.hosts, sentinel_kwargs=of_sentinels)
    return sentinel.master_for(many.name, db=many.database, **options)


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
    import redis

    try:
        parts = urlsplit(url)
        options = {name for name, _ in parse_qsl(parts.query, keep_blank_values=True)}
        database = "0" if parts.scheme == "unix" else parts.path.strip("/") or "0"
    except ValueError:
        raise ValueError(_UNREADABLE) from None
    known = (*_OPTIONS, *_TLS_OPTIONS) if parts.scheme == "rediss" else _OPTIONS
    if parts.fragment or not options <= set(known):
        raise ValueError(f"the options of this queue's URL are {', '.join(known)}, and no others")
    if not database.isdecimal():
        raise ValueError("the path of the queue's URL is the number of a database")
    if parts.scheme == "unix" and not parts.path:
        raise ValueError("the path of the queue's URL is that of a socket")
    try:
        # Made, not opened: so all values are looked at.
        redis.ConnectionPool.from_url(url, **_SOCKETS).make_connection()
    except (ValueError, TypeError, redis.RedisError):
        raise ValueError(_UNREADABLE) from None


@dataclass(frozen=True)
class _Many:
    """An address of several hosts. ``tls`` is for all of them, ``access`` for those that hold the queue."""

    kind: str
    hosts: list[tuple[str, int]]
    name: str
    database: int
    tls: dict[str, Any]
    access: dict[str, Any]
    sentinel_access: dict[str, Any]

    @classmethod
    def of(cls, url: str) -> Self:
        """Read it. Raises ValueError, which quotes nothing of it."""
        scheme, _, rest = url.partition("://")
        base, kind = scheme.split("+")
        rest, _, options = rest.partition("?")
        if "#" in url:
            raise ValueError("a queue's URL of several hosts has no fragment: write # as %23")
        authority, _, path = rest.partition("/")
        credentials, _, listed = authority.rpartition("@")
        user, _, password = credentials.partition(":")
        tls: dict[str, Any] = {"ssl": True} if base == "rediss" else {}
        access: dict[str, Any] = {
            key: unquote(text) for key, text in (("username", user), ("password", password)) if text
        }
        name, _, database = path.strip("/").partition("/")
        if (kind == "sentinel") != bool(name) or not (database or "0").isdecimal():
            raise ValueError("the path of the queue's URL is /name or /name/database with sentinels, none in a cluster")
        hosts = [_host(text, _PORTS[kind]) for text in listed.split(",")]
        return cls(kind, hosts, name, int(database or 0), tls, access, _sentinel_access(kind, options))


def _sentinel_access(kind: str, options: str) -> dict[str, str]:
    # A plus is a plus here, as it is in the other password.
    given = dict(parse_qsl(options.replace("+", "%2B"), keep_blank_values=True))
    known = _SENTINEL_OPTIONS if kind == "sentinel" else {}
    if bool(options) != bool(given) or not given.keys() <= known.keys():
        names = f"no options but {' and '.join(known)}" if known else "no options"
        raise ValueError(f"a queue's URL of a {kind} has {names}")
    return {known[name]: text for name, text in given.items() if text}


def _host(text: str, default_port: int) -> tuple[str, int]:
    found = _HOST.fullmatch(text)
    if found is None or not (found["address"] is None or _is_ipv6(found["address"])):
        raise ValueError("each host of the queue's URL is host or host:port, an IPv6 address in brackets")
    return found["address"] or found["name"], int(found["port"] or default_port)


def _is_ipv6(text: str) -> bool:
    try:
        IPv6Address(text)
    except ValueError:
        return False
    return True
