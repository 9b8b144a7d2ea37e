"""From start to stop: loading, readiness, overload, deadlines, clients that leave, draining."""

from __future__ import annotations

import asyncio
import io
import json
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, Literal

import httpx
import pytest
from starlette.types import Message

from engines.bundle import BundleError
from engines.pipeline import Pipeline
from service.app import create_app
from service.batching import worker as batching_worker
from service.errors import ApiError
from service.models.catalogue import ModelError
from service.models.opening import open_pipeline
from service.queue.base import Job, Keep, QueueStats, QueueUnavailable
from service.runtime import State
from service.settings import Settings
from service.telemetry.logs import Formatter
from tests.service.helpers import (
    Gate,
    Running,
    b64,
    error,
    listening,
    pipeline_of,
    png,
    random_image,
    running,
    until,
    wait_until,
)

pytestmark = pytest.mark.anyio


async def test_it_lives_at_once_and_is_ready_when_the_bundle_is_warm(anyio_backend: str, settings: Settings) -> None:
    go = threading.Event()

    def slow(settings: Settings, path: Path) -> Pipeline:
        assert go.wait(60)
        return open_pipeline(settings, path)

    async with running(settings, opener=slow, wait=False) as app:
        assert (await app.client.get("/livez")).json() == {"status": "ok"}
        ready = await app.client.get("/readyz")
        assert (ready.status_code, ready.json()) == (503, {"status": "loading"})
        found = error(await app.post("/generate", prompt="a cat"), 503, "not_ready")
        assert found["retryable"]
        refused = await app.client.get("/capabilities")
        error(refused, 503, "not_ready")
        assert int(refused.headers["retry-after"]) >= 1
        assert (await app.client.get("/")).status_code == 200
        assert app.metric("fewstep_rejected_total", reason="not_ready") == 1
        go.set()
        await until(lambda: app.service.state is State.READY)
        ready = await app.client.get("/readyz")
        assert (ready.status_code, ready.json()) == (200, {"status": "ready"})
        assert (await app.post("/generate", prompt="a cat")).status_code == 200


async def test_a_bundle_that_does_not_load_is_never_ready(
    anyio_backend: str, settings: Settings, bundle_path: Path, tmp_path: Path
) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in bundle_path.iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    with (broken / "step-4.onnx").open("r+b") as graph:
        graph.seek(40)
        graph.write(b"\x00\x01")
    async with running(settings.model_copy(update={"bundle": str(broken)}), wait=False) as app:
        await until(lambda: app.service.state is State.FAILED)
        assert isinstance(app.service.failure, ModelError)
        assert "step-4.onnx" in str(app.service.failure)
        assert (await app.client.get("/readyz")).json() == {"status": "failed"}
        assert (await app.client.get("/livez")).status_code == 200
        error(await app.post("/generate", prompt="a cat"), 503, "failed")


async def test_a_deadline_is_a_504_and_the_row_is_dropped(app: Running, gate: Gate) -> None:
    late = await app.post("/generate", prompt="a cat", timeout_ms=50)
    found = error(late, 504, "deadline_exceeded")
    assert (found["type"], found["retryable"]) == ("timeout_error", True)
    gate.opened.set()
    assert (await app.post("/generate", prompt="a cat", steps=1)).json()["batch"]["ticks"] == [1]
    assert app.metric("fewstep_requests_total", endpoint="generate", outcome="timeout") == 1
    assert app.metric("fewstep_images_total") == 1
    # The late row ran one tick, or none where even that came too late; never its four.
    assert app.metric("fewstep_tick_rows_sum") <= 2


async def test_a_request_of_high_priority_goes_before_those_of_low(
    anyio_backend: str, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running(settings.model_copy(update={"max_batch": 1})) as app:
        gate, done = Gate(app.pipeline, monkeypatch), list[str]()

        async def ask(priority: str) -> None:
            answer = await app.post("/generate", prompt="a cat", steps=1, priority=priority)
            assert answer.status_code == 200
            done.append(priority)

        requests = [asyncio.create_task(ask("normal"))]
        await asyncio.to_thread(gate.reached.wait, 20)
        requests += [asyncio.create_task(ask(priority)) for priority in ("low", "low", "high")]
        await until(lambda: app.metric("fewstep_queue_depth") == 3)
        gate.opened.set()
        await asyncio.gather(*requests)
    assert done == ["normal", "high", "low", "low"]


async def test_waiting_for_the_decoder_counts_too(app: Running) -> None:
    started, busy, image = threading.Event(), threading.Event(), b64(png(random_image()))

    def occupy() -> bool:
        started.set()
        return busy.wait(20)

    blocking = asyncio.create_task(app.service.decoded(occupy, time.monotonic() + 30, asyncio.Event().wait))
    await asyncio.to_thread(started.wait, 20)
    late = await app.post("/edit", prompt="a cat", image=image, timeout_ms=50)
    error(late, 504, "deadline_exceeded")
    long = await app.post("/generate", prompt="a cat", model="x" * 100_000)
    error(long, 404, "model_not_found", "model")
    busy.set()
    await blocking
    assert (await app.post("/edit", prompt="a cat", image=image)).status_code == 200


async def test_a_full_queue_is_a_429_that_says_when_to_come_back(
    anyio_backend: str, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running(settings.model_copy(update={"max_batch": 1, "max_queue_cost": 16})) as app:
        gate = Gate(app.pipeline, monkeypatch)
        accepted = [asyncio.create_task(app.post("/generate", prompt="a cat"))]
        await asyncio.to_thread(gate.reached.wait, 20)
        accepted += [asyncio.create_task(app.post("/generate", prompt="a cat")) for _ in range(2)]
        await until(lambda: app.metric("fewstep_queue_cost") == 8)
        refused = await app.post("/generate", prompt="a cat")
        found = error(refused, 429, "queue_full")
        assert (found["type"], found["retryable"]) == ("overloaded_error", True)
        assert 1 <= int(refused.headers["retry-after"]) <= 60
        assert app.metric("fewstep_rejected_total", reason="queue_full") == 1
        # The queue is asked before an image is decoded.
        error(await app.post("/edit", prompt="a cat", image=b64(b"no image")), 429, "queue_full")
        gate.opened.set()
        assert {answer.status_code for answer in await asyncio.gather(*accepted)} == {200}
        assert (await app.post("/generate", prompt="a cat")).status_code == 200


async def test_too_many_requests_at_once_are_turned_away(
    anyio_backend: str, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running(settings.model_copy(update={"max_inflight": 1})) as app:
        gate = Gate(app.pipeline, monkeypatch)
        first = asyncio.create_task(app.post("/generate", prompt="a cat"))
        await until(lambda: app.service.inflight == 1)
        error(await app.post("/generate", prompt="a cat"), 429, "too_many_requests")
        gate.opened.set()
        assert (await first).status_code == 200


async def test_too_many_bytes_at_once_are_turned_away(anyio_backend: str, settings: Settings) -> None:
    low = settings.model_copy(update={"max_body_bytes": 2000, "max_inflight_bytes": 3000})
    first_arrived, go = asyncio.Event(), asyncio.Event()

    async def slow() -> AsyncIterator[bytes]:
        yield b'{"prompt": "a cat"'
        yield b" " * 1900
        first_arrived.set()
        await go.wait()
        yield b"}"

    async with running(low) as app:
        headers = {"Content-Type": "application/json"}
        first = asyncio.create_task(app.client.post("/generate", content=slow(), headers=headers))
        await first_arrived.wait()
        padded = b'{"prompt": "a cat"}' + b" " * 1900
        refused = await app.client.post("/generate", content=padded, headers=headers)
        error(refused, 429, "too_many_bytes")
        assert app.metric("fewstep_rejected_total", reason="too_many_bytes") == 1
        assert (await app.client.post("/generate", content=padded[:1000], headers=headers)).status_code == 200
        go.set()
        assert (await first).status_code == 200
        assert (await app.client.post("/generate", content=padded, headers=headers)).status_code == 200


async def test_draining_finishes_what_is_in_flight_and_takes_nothing_new(app: Running, gate: Gate) -> None:
    first = asyncio.create_task(app.post("/generate", prompt="a cat"))
    await asyncio.to_thread(gate.reached.wait, 10)
    app.service.drain()
    refused = await app.post("/generate", prompt="a cat")
    error(refused, 503, "draining")
    assert "retry-after" in refused.headers
    assert (await app.client.get("/readyz")).json() == {"status": "draining"}
    assert (await app.client.get("/livez")).status_code == 200
    gate.opened.set()
    assert (await first).status_code == 200


async def test_draining_waits_for_who_asks_what_became_of_a_job(
    app: Running, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer = await app.client.post("/generate", json={"prompt": "a cat"}, headers={"Prefer": "respond-async"})
    place = answer.headers["location"]
    app.service.drain()
    gate.opened.set()
    await until(lambda: app.metric("fewstep_images_total") == 1)
    assert not app.service.drained()
    await until_over(app, place)
    await until(app.service.drained)


async def test_draining_waits_as_long_as_it_may_for_who_asks_no_more(settings: Settings) -> None:
    async with running(settings.model_copy(update={"drain_timeout_s": 0.5})) as app:
        await app.client.post("/generate", json={"prompt": "a cat"}, headers={"Prefer": "respond-async"})
        app.service.drain()
        await until(lambda: app.metric("fewstep_images_total") == 1)
        assert not app.service.drained()
        await until(app.service.drained)


async def until_over(app: Running, place: str) -> None:
    while (await app.client.get(place)).json()["status"] != "done":
        await asyncio.sleep(0.01)


async def test_a_queue_that_gives_no_answer_costs_no_more_than_the_time_limit(
    app: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def hangs(*_: object) -> str:
        await asyncio.sleep(60)
        return ""

    monkeypatch.setattr(app.service._queue, "submit", hangs)
    begin = time.monotonic()
    error(await app.post("/generate", prompt="a cat", timeout_ms=200), 504, "deadline_exceeded")
    assert 0.2 <= time.monotonic() - begin < 20


async def test_abandoned_requests_get_a_503(app: Running, gate: Gate) -> None:
    first = asyncio.create_task(app.post("/generate", prompt="a cat"))
    await asyncio.to_thread(gate.reached.wait, 10)
    app.service.abandon()
    found = error(await first, 503, "shutting_down")
    assert found["retryable"]


async def test_abandoned_uploads_get_a_503_too(app: Running) -> None:
    busy = threading.Event()
    occupy = asyncio.create_task(
        app.service.decoded(lambda: busy.wait(20), time.monotonic() + 30, asyncio.Event().wait)
    )
    waiting = asyncio.create_task(app.post("/edit", prompt="a cat", image=b64(png(random_image()))))
    await asyncio.sleep(0.1)
    app.service.abandon()
    error(await waiting, 503, "shutting_down")
    busy.set()
    await asyncio.gather(occupy, return_exceptions=True)


async def test_a_decoder_that_hangs_does_not_hold_up_the_end(anyio_backend: str, settings: Settings) -> None:
    begun, go, ended = threading.Event(), threading.Event(), threading.Event()

    def hang() -> None:
        begun.set()
        go.wait(20)
        ended.set()

    async with running(settings) as app:
        waiting = asyncio.create_task(app.service.decoded(hang, time.monotonic() + 60, asyncio.Event().wait))
        await until(begun.is_set)
    assert not app.service._worker.alive
    assert not ended.is_set()
    go.set()
    with pytest.raises(ApiError, match="shutting down"):
        await waiting


@pytest.mark.parametrize("body", [b"", b'{"prompt": "a cat"}'], ids=["while it uploads", "while it waits"])
async def test_a_request_that_the_server_cancels_gets_a_503(app: Running, gate: Gate, body: bytes) -> None:
    sent: list[Message] = []
    messages: list[Message] = [{"type": "http.request", "body": body}] if body else []

    async def receive() -> Message:
        if messages:
            return messages.pop()
        await asyncio.Event().wait()
        raise AssertionError

    async def send(message: Message) -> None:
        sent.append(message)

    scope = {"type": "http", "http_version": "1.1", "method": "POST", "path": "/generate", "query_string": b""}
    headers = [(b"content-type", b"application/json")]
    request = asyncio.create_task(app.app({**scope, "app": app.app, "headers": headers}, receive, send))
    await until(gate.reached.is_set if body else lambda: app.service.inflight == 1)
    request.cancel()
    await asyncio.wait([request])
    assert sent[0]["status"] == 503
    assert json.loads(sent[1]["body"])["error"]["code"] == "shutting_down"
    gate.opened.set()
    assert (await app.post("/generate", prompt="a cat", steps=1)).status_code == 200
    assert app.metric("fewstep_images_total") == 1, "the cancelled job was not made"


@pytest.mark.parametrize("end", ["cancelled", "stopped", "late"])
async def test_a_job_whose_request_ends_while_it_is_queued_is_not_made(
    app: Running, gate: Gate, monkeypatch: pytest.MonkeyPatch, end: str
) -> None:
    submit, says_so = app.service._queue.submit, asyncio.Event()

    async def slow_to_say_so(job: Job, keep: Keep | None = None) -> str:
        accepted = await submit(job, keep)
        await says_so.wait()
        return accepted

    monkeypatch.setattr(app.service._queue, "submit", slow_to_say_so)
    patience = {"timeout_ms": 1000} if end == "late" else {}
    request = asyncio.create_task(app.post("/generate", prompt="a cat", **patience))
    await until(gate.reached.is_set)
    if end == "cancelled":
        request.cancel()
    elif end == "stopped":
        app.service.abandon()
    await asyncio.wait([request])
    outcome = {"cancelled": "stopped", "stopped": "stopped", "late": "expired"}[end]
    says_so.set()
    await until(lambda: app.metric("fewstep_jobs_total", outcome=outcome) == 1)
    gate.opened.set()
    worker = app.service._worker
    await until(lambda: not worker._held)
    assert app.metric("fewstep_images_total") == 0
    if end != "cancelled":
        assert request.result().status_code == (503 if end == "stopped" else 504)


def request_bytes(body: dict[str, Any]) -> bytes:
    data = json.dumps(body).encode()
    head = (
        f"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
    )
    return head.encode() + data


def test_a_client_that_leaves_takes_its_rows_along(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    app = create_app(settings)
    service = app.state.service
    with listening(app) as port:
        gate = Gate(pipeline_of(service), monkeypatch)
        with socket.create_connection(("127.0.0.1", port)) as client:
            client.sendall(request_bytes({"prompt": "a cat", "n": 2}))
            assert gate.reached.wait(60)
        wait_until(lambda: service.inflight == 0)
        gate.opened.set()
        answer = httpx.post(f"http://127.0.0.1:{port}/generate", json={"prompt": "a dog"}, timeout=60)
        assert answer.json()["batch"]["ticks"] == [1, 1, 1, 1]
        value = service.metrics.registry.get_sample_value
        assert value("fewstep_cancelled_total", {"stage": "running"}) == 1
        assert value("fewstep_requests_total", {"endpoint": "generate", "outcome": "cancelled"}) == 1
        # One tick of the two rows ran before anyone could know; then four of the one row.
        assert value("fewstep_tick_rows_sum") == 6
        assert value("fewstep_images_total") == 1


def test_a_body_that_does_not_come_is_a_408(settings: Settings) -> None:
    app = create_app(settings.model_copy(update={"body_timeout_s": 0.1}))
    with listening(app) as port:
        with socket.create_connection(("127.0.0.1", port)) as client:
            client.sendall(request_bytes({"prompt": "a cat"})[:-5])
            answer = b"".join(iter(lambda: client.recv(65536), b""))
        assert b" 408 " in answer.split(b"\r\n")[0]
        assert b"body_timeout" in answer
        value = app.state.service.metrics.registry.get_sample_value
        assert value("fewstep_rejected_total", {"reason": "body_timeout"}) == 1


@pytest.mark.parametrize("form", ["json", "text"])
async def test_log_lines_have_the_request_id_and_no_prompt(
    app: Running, caplog: pytest.LogCaptureFixture, form: Literal["json", "text"]
) -> None:
    caplog.set_level(logging.DEBUG)
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(Formatter(form))
    logging.getLogger().addHandler(handler)
    try:
        headers = {"X-Request-ID": "from-me"}
        answer = await app.client.post("/generate", json={"prompt": "a secret cat"}, headers=headers)
    finally:
        logging.getLogger().removeHandler(handler)
    assert answer.status_code == 200
    assert "secret" not in stream.getvalue()
    [text] = [line for line in stream.getvalue().splitlines() if "generate" in line and "service.access" in line]
    if form == "text":
        assert 'request_id="from-me"' in text
        assert "status=200" in text
    else:
        line = json.loads(text)
        assert (line["event"], line["status"], line["level"]) == ("request", 200, "info")
        assert line["request_id"] == "from-me"


def test_log_lines_show_messages_of_our_own_exceptions_only() -> None:
    def line(error: Exception) -> str:
        try:
            raise error
        except Exception:
            info = sys.exc_info()
            record = logging.LogRecord("x", logging.ERROR, __file__, 1, "failed", None, info)
        return Formatter("json").format(record)

    assert "a cat" not in line(ValueError("a cat"))
    assert "step.onnx" in line(BundleError("step.onnx is damaged"))
    assert "ValueError" in line(ValueError("a cat"))
    assert "test_lifecycle" in line(ValueError("a cat"))


def spawn(*options: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "service.commands", "--port", "0", "--log-format", "json", *options],
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )


def read_until(process: subprocess.Popen[str], event: str) -> dict[str, Any]:
    assert process.stderr is not None
    for text in process.stderr:
        line: dict[str, Any] = json.loads(text)
        if re.search(event, line["event"]):
            return line
    raise AssertionError(f"no line {event!r}")


def test_a_real_process_is_light_serves_and_drains_on_sigterm(bundle_path: Path) -> None:
    with spawn("--bundle", str(bundle_path), "--backend", "ort", "--threads", "1") as process:
        try:
            address = re.search(r"http://\S+", read_until(process, "running on")["event"])
            assert address is not None
            url = address.group()
            assert httpx.get(f"{url}/livez").status_code == 200
            wait_until(lambda: httpx.get(f"{url}/readyz").status_code == 200)
            answer = httpx.post(f"{url}/generate", json={"prompt": "a cat", "seed": 1}, timeout=60)
            assert answer.status_code == 200, answer.text
            with pytest.raises((httpx.HTTPStatusError, httpx.TransportError)):
                httpx.get(f"{url}/livez", headers={"X-Long": "a" * 10_000_000}).raise_for_status()
            resident = re.search(r"^process_resident_memory_bytes (\S+)", httpx.get(f"{url}/metrics").text, re.M)
            assert resident is not None
            assert float(resident.group(1)) < 300e6
            maps = Path(f"/proc/{process.pid}/maps").read_text()
            assert "onnxruntime" in maps
            assert "torch" not in maps
            process.send_signal(signal.SIGTERM)
            assert process.wait(60) == 0
        finally:
            process.kill()


def test_a_real_process_drains_when_its_terminal_is_closed(bundle_path: Path) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # What nohup began ignores it, and so do its children.
    with spawn("--bundle", str(bundle_path), "--backend", "fake") as process:
        signal.signal(signal.SIGHUP, before)
        try:
            read_until(process, "^ready$")
            process.send_signal(signal.SIGHUP)
            read_until(process, "^draining$")
            assert process.wait(60) == 0
        finally:
            process.kill()


def test_a_real_process_ends_with_an_error_when_its_bundle_does_not_load(tmp_path: Path) -> None:
    with spawn("--bundle", str(tmp_path)) as process:
        try:
            assert "not a bundle" in read_until(process, "does not load")["detail"]
            assert process.stderr is not None
            process.stderr.read()
            assert process.wait(60) == 1
        finally:
            process.kill()


@pytest.mark.parametrize("stage", ["prepare", "finish"])
async def test_what_hangs_beside_the_ticks_is_a_lost_worker_and_does_not_hold_up_the_end(
    anyio_backend: str, settings: Settings, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    monkeypatch.setattr(batching_worker, "_LAST_BATCH_S", 0.2)
    begun, go_on = threading.Event(), threading.Event()
    async with running(settings.model_copy(update={"stall_s": 2.0})) as app:
        whole, tick = getattr(app.pipeline, stage), app.pipeline.tick

        def hangs(*given: Any) -> Any:
            assert go_on.wait(60)
            return whole(*given)

        def slow(rows: Any) -> None:
            begun.set()
            time.sleep(0.3)
            tick(rows)

        monkeypatch.setattr(app.pipeline, "tick", slow)
        first = asyncio.create_task(app.post("/generate", prompt="a cat", steps=4))
        await until(begun.is_set)
        monkeypatch.setattr(app.pipeline, stage, hangs)
        second = asyncio.create_task(app.post("/generate", prompt="a dog", steps=1))

        def lost() -> bool:
            app.service.watch()
            return app.service.worker_lost

        await until(lost)
        stopping = asyncio.create_task(app.service.stop())
        async with asyncio.timeout(15):
            await stopping
        go_on.set()
        await asyncio.gather(first, second)


async def test_what_has_nothing_to_do_does_not_hang(anyio_backend: str, settings: Settings) -> None:
    async with running(settings.model_copy(update={"stall_s": 0.3})) as app:
        assert (await app.post("/generate", prompt="a cat", steps=1)).status_code == 200
        until_then = time.monotonic() + 1.0
        while time.monotonic() < until_then:
            app.service.watch()
            await asyncio.sleep(0.02)
        assert not app.service.worker_lost


async def test_a_queue_that_does_not_answer_is_looked_at_once_at_a_time(
    app: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks: list[int] = []
    go_on = threading.Event()

    def hangs() -> QueueStats:
        looks.append(1)
        assert go_on.wait(60)
        raise QueueUnavailable

    monkeypatch.setattr(app.service._queue, "stats", hangs)
    probes = [asyncio.create_task(app.client.get("/readyz")) for _ in range(20)]
    await until(lambda: len(looks) == 1)
    await asyncio.sleep(0.1)
    probes[0].cancel()
    go_on.set()
    answers = await asyncio.gather(*probes[1:])
    assert {answer.status_code for answer in answers} == {503}
    assert len(looks) == 1
    monkeypatch.undo()
    assert (await app.client.get("/readyz")).status_code == 200
