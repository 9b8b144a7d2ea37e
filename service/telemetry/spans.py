"""Tracing by OpenTelemetry. The only module that imports its SDK, of the extra `tracing`."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import OTELResourceDetector, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter
from opentelemetry.trace import Link, Span, SpanKind, Status, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from engines.provenance import package_version
from service.desk import ClientGone
from service.jobs import Job
from service.telemetry.collector import traces_address
from service.telemetry.tracing import Stage

_EXPORT_TIMEOUT_S = 5.0
_QUIET = frozenset({"/livez", "/readyz", "/metrics"})
_PROPAGATOR = TraceContextTextMapPropagator()


class Spans:
    """See Tracing. Spans go out in batches, from a thread; those that cannot be sent are dropped.

    The standard variables of OpenTelemetry say more: OTEL_SERVICE_NAME, OTEL_RESOURCE_ATTRIBUTES, OTEL_TRACES_SAMPLER
    and OTEL_EXPORTER_OTLP_HEADERS among them. No span holds a prompt or anything of an image.
    """

    def __init__(self, exporter: SpanExporter) -> None:
        own = Resource({"service.name": "fewstep", "service.version": package_version()})
        resource = own.merge(OTELResourceDetector().detect())
        # Not the provider of the whole process, which is for other code to set.
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("fewstep")

    def watch(self, app: Starlette) -> None:
        """See Tracing.watch."""
        app.add_middleware(_Requests, tracer=self._tracer)

    def current(self) -> str:
        """See Tracing.current."""
        carrier: dict[str, str] = {}
        _PROPAGATOR.inject(carrier)
        return carrier.get("traceparent", "")

    def stage(self, name: Stage, jobs: Sequence[Job], begin: float, end: float, rows: int) -> None:
        """See Tracing.stage."""
        to_epoch_ns = time.time_ns() - time.monotonic_ns()
        begin_ns, end_ns = (round(seconds * 1e9) + to_epoch_ns for seconds in (begin, end))
        contexts = [_context({"traceparent": job.trace}) for job in jobs if job.trace]
        requests = [trace.get_current_span(context).get_span_context() for context in contexts]
        for context, own in zip(contexts, requests, strict=True):
            span = self._tracer.start_span(
                name,
                context,
                links=[Link(other) for other in requests if other is not own],
                attributes={"fewstep.rows": rows},
                start_time=begin_ns,
            )
            span.end(max(begin_ns, end_ns))

    def close(self) -> None:
        """See Tracing.close."""
        self._provider.shutdown()


class _Requests:
    """A span for each request but those of orchestrators and scrapers."""

    def __init__(self, app: ASGIApp, tracer: trace.Tracer) -> None:
        self.app = app
        self._tracer = tracer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http" or scope["path"] in _QUIET:
            await self.app(scope, receive, send)
            return
        with self._tracer.start_as_current_span(
            scope["method"],
            _context(Headers(scope=scope)),
            SpanKind.SERVER,
            {"http.request.method": scope["method"], "fewstep.request_id": scope["state"]["request_id"]},
            # An exception may quote what the client sent.
            record_exception=False,
            set_status_on_exception=False,
        ) as span:

            async def noted(message: Message) -> None:
                if message["type"] == "http.response.start":
                    _note_status(span, message["status"])
                await send(message)

            try:
                await self.app(scope, receive, noted)
            except (ClientDisconnect, ClientGone):
                raise
            except Exception:
                _note_status(span, 500)
                raise
            finally:
                # The path as it is routed: one that is not may hold anything.
                if route := getattr(scope.get("route"), "path", None):
                    span.update_name(f"{scope['method']} {route}")
                    span.set_attribute("http.route", route)


def exporter_to(endpoint: str) -> SpanExporter:
    """To a collector of OTLP over HTTP: its whole URL, or without a path where it is the standard one."""
    return OTLPSpanExporter(traces_address(endpoint), timeout=_EXPORT_TIMEOUT_S)


def _context(headers: Mapping[str, str]) -> Context:
    """The context that a caller's headers name; an empty one where they name none or name it wrongly."""
    return _PROPAGATOR.extract(headers, Context())


def _note_status(span: Span, status: int) -> None:
    span.set_attribute("http.response.status_code", status)
    if status >= 500:
        span.set_status(Status(StatusCode.ERROR))
