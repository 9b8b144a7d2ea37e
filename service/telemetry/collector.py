"""The address of a collector of traces: where it is named, and checked before anything is traced."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from urllib.parse import urlsplit

_PACKAGES = ("opentelemetry.sdk", "opentelemetry.exporter.otlp.proto.http")
_TRACES_PATH = "/v1/traces"


def standard_collector(environment: Mapping[str, str]) -> str | None:
    """The URL that OpenTelemetry's own variables name for traces; None where they name none, or want no traces.

    Raises ValueError where they want a protocol that is not spoken here.
    """
    off = (
        environment.get("OTEL_SDK_DISABLED", "").lower() == "true" or environment.get("OTEL_TRACES_EXPORTER") == "none"
    )
    whole = environment.get("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
    base = environment.get("OTEL_EXPORTER_OTLP_ENDPOINT")
    if off or not (whole or base):
        return None
    protocol = environment.get("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL") or environment.get("OTEL_EXPORTER_OTLP_PROTOCOL")
    if protocol and protocol != "http/protobuf":
        raise ValueError("spans are sent as http/protobuf, and by no other OTEL_EXPORTER_OTLP_PROTOCOL")
    return whole or f"{base}".rstrip("/") + _TRACES_PATH


def traces_address(endpoint: str) -> str:
    """The whole URL of a collector that may be given without its path, where that is the standard one."""
    parts = urlsplit(endpoint)
    return parts._replace(path=_TRACES_PATH).geturl() if parts.path in ("", "/") else endpoint


def check_collector(endpoint: str) -> None:
    """Raise ValueError, which quotes nothing of the address, unless spans can be sent to it."""
    parts = urlsplit(endpoint)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError("tracing is the URL of a collector, such as http://localhost:4318")
    if parts.query:  # which libraries quote in their messages
        raise ValueError("the collector's URL takes no query: a token belongs in OTEL_EXPORTER_OTLP_HEADERS")
    try:
        there = all(find_spec(package) for package in _PACKAGES)
    except ModuleNotFoundError:
        there = False
    if not there:
        raise ValueError("tracing needs the tracing extra: pip install 'fewstep[tracing]'")
