"""Traces: one span a request, its stages beneath it wherever they happen, and nothing at all without the setting."""

from __future__ import annotations

import asyncio
import gzip
import subprocess
import sys
import threading
from collections.abc import Sequence
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from opentelemetry import trace
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode
from pydantic import ValidationError

from engines.backends.base import EngineError
from engines.pipeline import Generate
from service.jobs import Job, Output
from service.queue.memory import MemoryQueue
from service.settings import Settings
from service.telemetry.spans import Spans
from tests.service.helpers import Gate, b64, png, random_image, running, until
from tests.service.redis_server import RedisServer

pytestmark = pytest.mark.anyio

TRACE = "0af7651916cd43dd8448eb211c80319c"
CALLER = "b7ad6b7169203331"
TRACEPARENT = f"00-{TRACE}-{CALLER}-01"
PROMPT = "a cat of the zanzibar"


def by_name(spans: Sequence[ReadableSpan], name: str) -> list[ReadableSpan]:
    return [span for span in spans if span.name == name]


def request_of(spans: Sequence[ReadableSpan], name: str = "POST /generate") -> ReadableSpan:
    [span] = by_name(spans, name)
    return span


def children(spans: Sequence[ReadableSpan], parent: ReadableSpan) -> list[ReadableSpan]:
    return [span for span in spans if span.parent is not None and span.parent.span_id == id_of(parent)]


def id_of(span: ReadableSpan) -> int:
    assert span.context is not None
    return span.context.span_id


def seconds(span: ReadableSpan) -> tuple[float, float]:
    assert span.start_time is not None
    assert span.end_time is not None
    return span.start_time / 1e9, span.end_time / 1e9


async def traced(settings: Settings, *bodies: dict[str, object], headers: dict[str, str]) -> list[ReadableSpan]:
    """What requests leave behind, one after the other."""
    exporter = InMemorySpanExporter()
    async with running(settings, tracing=Spans(exporter)) as app:
        for body in bodies:
            path = "/edit" if "image" in body else "/generate"
            await app.client.post(path, json=body, headers=headers)
        await app.client.get("/livez")
    return list(exporter.get_finished_spans())


async def test_a_request_and_its_stages_are_one_tree_in_the_callers_trace(
    anyio_backend: str, settings: Settings
) -> None:
    body = {"prompt": PROMPT, "image": b64(png(random_image())), "strength": 0.5}
    spans = await traced(settings, body, headers={"traceparent": TRACEPARENT, "X-Request-ID": "mine"})
    request = request_of(spans, "POST /edit")
    assert request.kind is SpanKind.SERVER
    assert request.parent is not None
    assert f"{request.parent.span_id:016x}" == CALLER
    assert dict(request.attributes or {}) == {
        "http.request.method": "POST",
        "http.route": "/edit",
        "http.response.status_code": 200,
        "fewstep.request_id": "mine",
    }
    assert [span.name for span in children(spans, request)] == ["queue", "encode", "tick", "tick", "decode"]
    assert len(spans) == 6, "and nothing of /livez"
    assert {f"{span.context.trace_id:032x}" for span in spans if span.context} == {TRACE}
    assert spans[0].resource.attributes["service.name"] == "fewstep"
    assert PROMPT not in "".join(span.to_json() for span in spans)


async def test_the_frameworks_own_spans_are_off(
    anyio_backend: str, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the process has a provider that is global: they would hold what the client sent."""
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(trace, "get_tracer_provider", lambda: provider)
    async with running(settings) as app:
        assert (await app.client.post("/generate", json={"prompt": PROMPT})).status_code == 200
    assert exporter.get_finished_spans() == ()
    with provider.get_tracer("other").start_as_current_span("of other code"):
        pass
    assert len(exporter.get_finished_spans()) == 1


async def test_the_stages_follow_one_another_within_the_request(anyio_backend: str, settings: Settings) -> None:
    spans = await traced(settings, {"prompt": "a cat", "steps": 2}, headers={})
    request = request_of(spans)
    assert request.parent is None
    begin, end = seconds(request)
    stages = [seconds(span) for span in children(spans, request)]
    assert stages == sorted(stages)
    # Two clocks are read, which are not set to each other exactly.
    assert begin - 0.05 <= stages[0][0]
    assert stages[-1][1] <= end + 0.05


async def test_a_tick_is_linked_to_all_requests_in_it(
    anyio_backend: str, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    exporter = InMemorySpanExporter()
    async with running(settings, tracing=Spans(exporter)) as app:
        gate = Gate(app.pipeline, monkeypatch)
        first = asyncio.create_task(app.post("/generate", prompt="a cat", steps=1))
        await asyncio.to_thread(gate.reached.wait, 20)
        others = [asyncio.create_task(app.post("/generate", prompt="a cat", n=2, steps=1)) for _ in range(3)]
        await until(lambda: app.metric("fewstep_queue_depth") == 3)
        gate.opened.set()
        answers = [await request for request in (first, *others)]
        assert answers[1].json()["batch"]["ticks"] == [6]
    spans = exporter.get_finished_spans()
    requests = {id_of(span) for span in by_name(spans, "POST /generate")}
    ticks = by_name(spans, "tick")
    assert len(requests) == len(ticks) == 4
    [alone] = [tick for tick in ticks if not tick.links]
    together = [tick for tick in ticks if tick is not alone]
    assert alone.parent is not None
    for tick in together:
        assert tick.parent is not None
        assert {tick.parent.span_id, *(link.context.span_id for link in tick.links)} == requests - {
            alone.parent.span_id
        }
        assert dict(tick.attributes or {}) == {"fewstep.rows": 6}
        assert seconds(tick) == pytest.approx(seconds(together[0]), abs=0.001)


async def test_through_a_redis_the_workers_spans_join_the_requests_trace(
    anyio_backend: str, settings: Settings, redis_server: RedisServer
) -> None:
    apart = settings.model_copy(update={"queue": redis_server.url})
    at_front, at_back = InMemorySpanExporter(), InMemorySpanExporter()
    front = running(apart.model_copy(update={"role": "api"}), tracing=Spans(at_front))
    back = running(apart.model_copy(update={"role": "worker"}), tracing=Spans(at_back))
    async with front as api, back:
        body = {"prompt": "a cat", "steps": 2}
        answer = await api.client.post("/generate", json=body, headers={"traceparent": TRACEPARENT})
        assert answer.status_code == 200, answer.text
    [request] = at_front.get_finished_spans()
    stages = at_back.get_finished_spans()
    assert [span.name for span in stages] == ["queue", "encode", "tick", "tick", "decode"]
    assert children(stages, request) == list(stages)
    assert {f"{span.context.trace_id:032x}" for span in (request, *stages) if span.context} == {TRACE}


async def test_what_the_caller_does_not_sample_is_not_sent(anyio_backend: str, settings: Settings) -> None:
    headers = {"traceparent": TRACEPARENT.removesuffix("01") + "00"}
    assert await traced(settings, {"prompt": "a cat"}, headers=headers) == []


@pytest.mark.parametrize("traceparent", ["", "x", f"00-{'0' * 32}-{CALLER}-01", f"{TRACEPARENT}-x", "\x00" * 55])
async def test_a_trace_that_is_named_wrongly_is_not_joined(
    anyio_backend: str, settings: Settings, traceparent: str
) -> None:
    spans = await traced(settings, {"prompt": "a cat"}, headers={"traceparent": traceparent})
    assert request_of(spans).parent is None


async def test_failures_are_marked_and_quote_nothing(
    anyio_backend: str, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    exporter = InMemorySpanExporter()
    async with running(settings, tracing=Spans(exporter)) as app:

        def broken(_: object) -> None:
            raise EngineError(PROMPT)

        async def fault(_: object) -> None:
            raise RuntimeError(PROMPT)

        assert (await app.post("/generate", prompt="", steps=1)).status_code == 422
        with monkeypatch.context() as once:
            once.setattr(app.pipeline, "tick", broken)
            assert (await app.post("/generate", prompt=PROMPT)).status_code == 500
        monkeypatch.setattr(MemoryQueue, "submit", lambda *_: fault(None))
        assert (await app.post("/generate", prompt=PROMPT)).status_code == 500
        assert (await app.client.get(f"/{PROMPT}")).status_code == 404
    spans = exporter.get_finished_spans()
    codes = [span.status.status_code for span in by_name(spans, "POST /generate")]
    assert codes == [StatusCode.UNSET, StatusCode.ERROR, StatusCode.ERROR]
    assert "zanzibar" not in "".join(span.to_json() for span in spans)


def test_a_job_that_is_not_traced_leaves_no_span() -> None:
    exporter = InMemorySpanExporter()
    spans = Spans(exporter)
    job = Job("a", "a", (Generate("a cat", 4, 0.0, 0),), Output("png"), 0.0, 1.0)
    spans.stage("tick", [job, replace(job, trace=TRACEPARENT)], 0.0, 1.0, 2)
    spans.close()
    [span] = exporter.get_finished_spans()
    assert span.parent is not None
    assert f"{span.parent.span_id:016x}" == CALLER
    assert not span.links


def test_without_the_setting_nothing_of_the_sdk_is_imported() -> None:
    program = """
import sys
from service.app import create_app
create_app()
sys.exit(any(name.startswith(("opentelemetry.sdk", "opentelemetry.exporter")) for name in sys.modules))
"""
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


class Collector(BaseHTTPRequestHandler):
    """Takes traces as a collector of OTLP does."""

    got: list[tuple[str, ExportTraceServiceRequest]]

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        data = gzip.decompress(body) if self.headers["Content-Encoding"] == "gzip" else body
        self.got.append((self.path, ExportTraceServiceRequest.FromString(data)))
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


async def test_spans_arrive_at_the_collector_that_the_setting_names(anyio_backend: str, settings: Settings) -> None:
    got: list[tuple[str, ExportTraceServiceRequest]] = []
    handler = type("OneCollector", (Collector,), {"got": got})
    with HTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            address = f"http://127.0.0.1:{server.server_port}"
            async with running(settings.model_copy(update={"tracing": address})) as app:
                assert (await app.post("/generate", prompt="a cat", steps=1)).status_code == 200
        finally:
            server.shutdown()
            thread.join()
    assert {path for path, _ in got} == {"/v1/traces"}
    names = [
        span.name
        for _, message in got
        for resource in message.resource_spans
        for scope in resource.scope_spans
        for span in scope.spans
    ]
    assert sorted(names) == ["POST /generate", "decode", "encode", "queue", "tick"]


async def test_a_collector_that_is_away_holds_up_nothing(anyio_backend: str, settings: Settings) -> None:
    async with running(settings.model_copy(update={"tracing": "http://127.0.0.1:9"})) as app:
        assert (await app.post("/generate", prompt="a cat", steps=1)).status_code == 200


@pytest.mark.parametrize(
    "endpoint", ["", "collector:4318", "grpc://user:secret@collector", "http://", "http://collector?t=secret"]
)
def test_what_is_no_collector_is_refused_and_not_quoted(endpoint: str) -> None:
    with pytest.raises(ValidationError, match="collector") as caught:
        Settings(tracing=endpoint)
    assert "secret" not in str(caught.value)


ENDPOINT = "OTEL_EXPORTER_OTLP_ENDPOINT"


@pytest.mark.parametrize(
    ("environment", "collector"),
    [
        ({}, None),
        ({ENDPOINT: ""}, None),
        ({ENDPOINT: "http://a:4318"}, "http://a:4318/v1/traces"),
        ({ENDPOINT: "http://a:4318/otlp/"}, "http://a:4318/otlp/v1/traces"),
        ({ENDPOINT: "http://a:4318", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://b/in"}, "http://b/in"),
        ({ENDPOINT: "http://a:4318", "FEWSTEP_TRACING": "http://c:4318"}, "http://c:4318"),
        ({ENDPOINT: "http://a:4318", "OTEL_EXPORTER_OTLP_PROTOCOL": "http/protobuf"}, "http://a:4318/v1/traces"),
        ({ENDPOINT: "http://a:4318", "OTEL_SDK_DISABLED": "true"}, None),
        ({ENDPOINT: "http://a:4318", "OTEL_TRACES_EXPORTER": "none"}, None),
    ],
)
def test_the_standard_variables_name_the_collector(
    environment: dict[str, str], collector: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert Settings().tracing == collector


def test_a_protocol_that_is_not_spoken_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ENDPOINT, "http://collector:4317")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc")
    with pytest.raises(ValidationError, match="http/protobuf"):
        Settings()
