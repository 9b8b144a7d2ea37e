"""The seam of tracing: what the service tells of the time that requests take. Knows no library of traces.

A request has a span, and beneath it one for its wait in the queue, its encoding, each tick and its decoding, whichever
process they happen in: the job carries the W3C `traceparent` of its request.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Protocol

from starlette.applications import Starlette

from service.jobs import Job

Stage = Literal["queue", "encode", "tick", "decode"]


class Tracing(Protocol):
    """Where spans go. Its methods may be called from any thread, and do not fail."""

    def watch(self, app: Starlette) -> None:
        """Give each request of the app a span, within the trace that its caller names."""
        ...

    def current(self) -> str:
        """The `traceparent` of the request that is being served, "" for none."""
        ...

    def stage(self, name: Stage, jobs: Sequence[Job], begin: float, end: float, rows: int) -> None:
        """Tell of a stage that these jobs went through together, with ``rows`` images.

        ``begin`` and ``end`` are readings of the monotonic clock in seconds. The span of each job is linked to the
        requests of the others.
        """
        ...

    def close(self) -> None:
        """Send what is left."""
        ...


class Untraced:
    """Tells nobody, and costs nothing."""

    def watch(self, app: Starlette) -> None:
        """Nothing."""

    def current(self) -> str:
        """No trace."""
        return ""

    def stage(self, name: Stage, jobs: Sequence[Job], begin: float, end: float, rows: int) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""


def open_tracing(endpoint: str | None) -> Tracing:
    """Spans go to the OTLP collector at ``endpoint``, or nowhere for None."""
    if endpoint is None:
        return Untraced()
    # Imported late: only a service that is traced needs the extra.
    from service.telemetry.spans import Spans, exporter_to

    return Spans(exporter_to(endpoint))
