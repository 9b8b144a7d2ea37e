"""The address of a collector of traces, checked before anything is traced."""

from __future__ import annotations

from importlib.util import find_spec
from urllib.parse import urlsplit

_PACKAGES = ("opentelemetry.sdk", "opentelemetry.exporter.otlp.proto.http")


def check_collector(endpoint: str) -> None:
    """Raise ValueError, which quotes nothing of the address, unless spans can be sent to it."""
    parts = urlsplit(endpoint)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError("tracing is the URL of a collector, such as http://localhost:4318")
    try:
        there = all(find_spec(package) for package in _PACKAGES)
    except ModuleNotFoundError:
        there = False
    if not there:
        raise ValueError("tracing needs the tracing extra: pip install 'fewstep[tracing]'")
