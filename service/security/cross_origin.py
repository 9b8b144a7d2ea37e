"""Origins of pages, names of hosts, and which of them are the service's own. Knows nothing of requests."""

from __future__ import annotations

import ipaddress
import re

_ORIGIN = re.compile(r"(?P<scheme>https?)://(\[[0-9a-f:.]+\]|[a-z0-9.-]+)(:(?P<port>[0-9]{1,5}))?")
_AUTHORITY = re.compile(r"(\[[^\]]*\]|[^:]*)(?::([0-9]*))?")
_PORTS = {"http": "80", "https": "443"}
_LAST_PORT = 65535


def read_origins(text: str) -> tuple[str, ...]:
    """The origins of a list with commas: scheme, host and perhaps a port each. Raises ValueError."""
    origins = tuple(origin.strip() for origin in text.split(",") if origin.strip())
    for origin in origins:
        found = _ORIGIN.fullmatch(origin)
        if found is None or not 0 < int(found["port"] or 1) <= _LAST_PORT:
            raise ValueError(f"{origin[:100]!r} is not an origin, such as https://example.org or http://localhost:3000")
        if found["port"] == _PORTS[found["scheme"]]:
            raise ValueError(f"{origin[:100]!r}: browsers leave the port {found['port']} out, so leave it out here too")
    return origins


def is_own(origin: str, host: str) -> bool:
    """Whether an Origin header names the service as its Host header does.

    Whether either says http or https does not matter: a proxy in front may end TLS.
    """
    scheme, _, authority = origin.lower().partition("://")
    port = _PORTS.get(scheme)
    return port is not None and _split(authority, port) == _split(host.lower(), port)


def name_of(host: str) -> str:
    """The name or address in a Host header or behind an origin's scheme, without its port, in lower case."""
    return _split(host.lower(), "")[0]


def is_loopback(name: str) -> bool:
    """Whether a name or an address always is that of the host itself."""
    name = name.removesuffix(".")
    if name == "localhost" or name.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(name.strip("[]")).is_loopback
    except ValueError:
        return False


def _split(authority: str, port: str) -> tuple[str, str]:
    """Name and port, which is ``port`` where none is said."""
    found = _AUTHORITY.fullmatch(authority)
    return (found[1], found[2] or port) if found else (authority, "")
