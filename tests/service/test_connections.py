"""Connections that say nothing, or only half, and more of them than there may be."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import re
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, cast

import httpx
import pytest
import uvicorn
from fastapi import FastAPI, Response
from fastapi.responses import StreamingResponse

from service.app import create_app
from service.connections import Connection, bound_connections
from service.middleware import SECURITY_HEADERS
from service.runtime import State
from service.settings import Settings
from service.telemetry import logs
from tests.service.helpers import Gate, pipeline_of, wait_until

HALF = b"GET /livez HTTP/1.1\r\nHost: localhost\r\n"
TIMEOUT_S = 0.5


@contextmanager
def bounded(app: FastAPI, max_connections: int = 100, timeout_s: float = TIMEOUT_S) -> Iterator[uvicorn.Server]:
    """The app behind such connections, on a real port."""
    metrics = app.state.service.metrics
    connection = partial(Connection, metrics=metrics, max_connections=max_connections, timeout_s=timeout_s)
    kind = cast(type[asyncio.Protocol], connection)
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_config=None, lifespan="on", ws="none", http=kind))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    wait_until(lambda: server.started and app.state.service.state is State.READY)
    try:
        yield server
    finally:
        server.should_exit = True
        thread.join()


def port_of(server: uvicorn.Server) -> int:
    port: int = server.servers[0].sockets[0].getsockname()[1]
    return port


def connect(port: int, sent: bytes = b"") -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", port), timeout=60)
    connection.sendall(sent)
    return connection


def read(connection: socket.socket) -> bytes:
    """All that comes until the other side closes."""
    return b"".join(iter(partial(connection.recv, 65536), b""))


def rejected(port: int) -> dict[str, float]:
    """How many were turned away for each reason, by the metrics."""
    text = httpx.get(f"http://127.0.0.1:{port}/metrics", timeout=60).text
    return {reason: float(count) for reason, count in re.findall(r'fewstep_rejected_total{reason="(\w+)"} (\S+)', text)}


def refusal(answer: bytes) -> tuple[int, dict[str, Any]]:
    """The status and the error of the last answer."""
    head, _, body = answer.rpartition(b"\r\n\r\n")
    status = re.findall(rb"HTTP/1.1 (\d+) ", head)[-1]
    assert b"connection: close" in head.lower()
    found: dict[str, Any] = json.loads(body)["error"]
    headers = dict(re.findall(r"([\w-]+): (.*)", head.rpartition(b"HTTP/1.1")[2].decode().lower()))
    assert headers["x-request-id"].strip() == found["request_id"]
    assert all(headers[name.lower()].strip() == value.lower() for name, value in SECURITY_HEADERS.items())
    assert found.keys() == {"type", "code", "message", "param", "request_id", "retryable"}
    return int(status), found


def test_half_a_head_is_told_that_it_is_late_and_silence_is_just_closed(settings: Settings) -> None:
    with bounded(create_app(settings)) as server:
        port = port_of(server)
        with connect(port, HALF) as half, connect(port) as silent, connect(port, HALF + b"\r\n" + HALF) as second:
            status, found = refusal(read(half))
            assert (status, found["code"], found["retryable"]) == (408, "head_timeout", True)
            assert read(silent) == b""
            answers = read(second)
            assert answers.startswith(b"HTTP/1.1 200 OK")
            assert refusal(answers)[0] == 408
        wait_until(lambda: not server.server_state.connections)


def test_who_offers_another_protocol_is_served_in_this_one_without_a_word(
    settings: Settings, caplog: pytest.LogCaptureFixture
) -> None:
    offer = b"GET /livez HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\n\r\n"
    with bounded(create_app(settings)) as server, connect(port_of(server), offer) as connection:
        assert connection.recv(65536).startswith(b"HTTP/1.1 200 OK")
    assert not [record for record in caplog.records if "pgrade" in record.message or "WebSocket" in record.message]


@pytest.mark.parametrize("target", ["http://localhost/livez", "HTTP://localhost:80/livez?a=b", "http://[/livez"])
def test_a_whole_url_is_a_target_too(settings: Settings, target: str) -> None:
    ask = f"GET {target} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode()
    with bounded(create_app(settings)) as server, connect(port_of(server), ask) as connection:
        assert connection.recv(65536).startswith(b"HTTP/1.1 200 OK")


def test_bytes_that_come_one_by_one_gain_no_time(settings: Settings) -> None:
    with bounded(create_app(settings)) as server, connect(port_of(server)) as slow:
        sender = threading.Thread(target=drip, args=(slow,))
        sender.start()
        # Where a byte comes after the end, the system drops with it what was not read.
        with contextlib.suppress(ConnectionResetError):
            assert refusal(read(slow))[0] == 408
        sender.join()


def drip(connection: socket.socket) -> None:
    try:
        for _ in range(600):
            connection.sendall(b"G")
            time.sleep(0.1)
    except OSError:
        pass


def test_an_answer_may_take_longer_than_a_head(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    app = create_app(settings)
    with bounded(app) as server:
        gate = Gate(pipeline_of(app.state.service), monkeypatch)
        body = b'{"prompt": "a cat", "steps": 1}'
        head = b"POST /generate HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
        with connect(port_of(server), head % len(body) + body) as connection:
            assert gate.reached.wait(60)
            time.sleep(3 * TIMEOUT_S)
            gate.opened.set()
            assert connection.recv(100).startswith(b"HTTP/1.1 200 OK")


ANSWER_BYTES = 32 * 2**20  # more than the system takes for a client that does not read


def test_an_answer_that_is_not_read_is_dropped_and_its_connection_cut_off(settings: Settings) -> None:
    app = create_app(settings)
    app.add_route("/large", lambda _: Response(bytes(ANSWER_BYTES)))
    with bounded(app) as server:
        port = port_of(server)
        ask = b"GET /large HTTP/1.1\r\nHost: localhost\r\n"
        with connect(port, ask + b"\r\n") as stays, connect(port, ask + b"Connection: close\r\n\r\n") as last:
            wait_until(lambda: server.server_state.total_requests == 2)
            assert len(server.server_state.connections) == 2
            wait_until(lambda: not server.server_state.connections, 20)
            for connection in (stays, last):
                assert len(read(connection)) < ANSWER_BYTES


def test_events_that_are_not_read_end(settings: Settings) -> None:
    ended = threading.Event()

    async def events() -> AsyncIterator[bytes]:
        try:
            while True:
                yield bytes(2**20)
                await asyncio.sleep(0)
        finally:
            ended.set()

    app = create_app(settings)
    app.add_route("/events", lambda _: StreamingResponse(events()))
    with bounded(app) as server, connect(port_of(server), b"GET /events HTTP/1.1\r\nHost: localhost\r\n\r\n"):
        assert ended.wait(20)
        wait_until(lambda: not server.server_state.connections)


def test_an_answer_that_is_read_late_but_in_time_is_whole(settings: Settings) -> None:
    app = create_app(settings)
    app.add_route("/large", lambda _: Response(bytes(ANSWER_BYTES), headers={"Connection": "close"}))
    ask = b"GET /large HTTP/1.1\r\nHost: localhost\r\n\r\n"
    with bounded(app, timeout_s=20) as server, connect(port_of(server), ask) as connection:
        time.sleep(0.5)
        assert len(read(connection)) > ANSWER_BYTES


def test_what_is_no_http_is_refused_in_the_one_shape(settings: Settings) -> None:
    with bounded(create_app(settings)) as server:
        with connect(port_of(server), b"\x16\x03\x01\r\n\r\n") as connection:
            status, found = refusal(read(connection))
        assert (status, found["code"]) == (400, "invalid_http")
        assert rejected(port_of(server)).items() >= {"invalid_http": 1}.items()


def test_one_connection_too_many_is_turned_away(settings: Settings) -> None:
    with bounded(create_app(settings), max_connections=3, timeout_s=600) as server:
        port = port_of(server)
        with connect(port), connect(port), connect(port):
            wait_until(lambda: len(server.server_state.connections) == 3)
            with connect(port) as surplus:
                answer = read(surplus)
        status, found = refusal(answer)
        assert (status, found["code"], found["retryable"]) == (503, "too_many_connections", True)
        assert b"retry-after: 1" in answer.lower()
        wait_until(lambda: alive(port))
        assert rejected(port).items() >= {"too_many_connections": 1}.items()


@pytest.mark.parametrize(
    ("hard", "raised_to", "connections", "warned"),
    [
        (resource.RLIM_INFINITY, 7424, 7168, False),
        (1_048_576, 7424, 7168, False),
        (6500, 6500, 6244, False),
        (1024, 1024, 768, True),
        (100, 100, 50, True),
    ],
)
def test_open_files_bound_the_connections(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    hard: int,
    raised_to: int,
    connections: int,
    warned: bool,
) -> None:
    raised = []
    monkeypatch.setattr(resource, "getrlimit", lambda _: (100 if hard == 100 else 1024, hard))
    monkeypatch.setattr(resource, "setrlimit", lambda _, limits: raised.append(limits))
    assert bound_connections(max_inflight=3072) == connections
    assert raised == [(raised_to, hard)]
    assert any("ulimit -n" in record.message for record in caplog.records) is warned


def test_files_that_the_system_does_not_grant_are_not_counted_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def deny(*_: object) -> None:
        raise ValueError("not allowed to raise maximum limit")

    monkeypatch.setattr(resource, "getrlimit", lambda _: (5000, 1_000_000_000))
    monkeypatch.setattr(resource, "setrlimit", deny)
    assert bound_connections(max_inflight=10) == 1044
    assert bound_connections(max_inflight=3072) == 4744


def test_what_each_connection_would_log_is_logged_once_a_second(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    root, asyncios = logging.getLogger(), logging.getLogger("asyncio")
    monkeypatch.setattr(root, "handlers", root.handlers[:])
    monkeypatch.setattr(root, "level", root.level)
    monkeypatch.setattr(asyncios, "filters", [])
    logs.configure("text", "info")
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    for _ in range(100):
        asyncios.error("socket.accept() out of system resource\nsocket: <a socket>")
        asyncios.error("Task exception was never retrieved")
    now += 1
    asyncios.error("socket.accept() out of system resource\nsocket: <a socket>")
    lines = capsys.readouterr().err
    assert lines.count("out of system resource") == 2
    assert lines.count("never retrieved") == 100


def test_a_process_with_few_files_outlives_more_connections_than_it_has_files(
    bundle_path: Path, tmp_path: Path
) -> None:
    command = [
        sys.executable,
        "-m",
        "service.commands",
        "--port",
        "0",
        "--backend",
        "fake",
        "--bundle",
        str(bundle_path),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "FEWSTEP_BODY_TIMEOUT_S": "2"}
    log = tmp_path / "log"
    with log.open("w") as stderr, ExitStack() as stack:
        limited = ["sh", "-c", 'ulimit -n 400; exec "$@"', "sh", *command]
        process = stack.enter_context(subprocess.Popen(limited, stderr=stderr, env=environment))
        stack.callback(process.kill)
        wait_until(lambda: "running on" in log.read_text() or process.poll() is not None)
        port = int(re.findall(r"http://127.0.0.1:(\d+)", log.read_text())[0])
        process.send_signal(signal.SIGSTOP)
        half = [stack.enter_context(connect(port, HALF)) for _ in range(600)]  # All at once, as it seems to it.
        process.send_signal(signal.SIGCONT)
        wait_until(lambda: alive(port))
        assert "head_timeout" in read(half[0]).decode()
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
    text = log.read_text()
    assert "ulimit -n" in text
    assert "too many connections" in text
    assert len(text.splitlines()) < 300


def alive(port: int) -> bool:
    try:
        return httpx.get(f"http://127.0.0.1:{port}/livez", timeout=60).status_code == 200
    except httpx.TransportError:
        return False


HUGE = 4 * 2**20


def post_head(length: int, *headers: str, version: str = "1.1") -> bytes:
    lines = [f"POST /generate HTTP/{version}", "Host: localhost", "Content-Type: application/json", *headers]
    return "\r\n".join([*lines, f"Content-Length: {length}", "\r\n"]).encode()


def test_who_sends_all_of_a_body_that_is_refused_still_reads_why(settings: Settings) -> None:
    limits = {"max_body_bytes": 2**20, "max_inflight_bytes": 2**20}
    with bounded(create_app(settings.model_copy(update=limits)), timeout_s=60) as server:
        for _ in range(3):
            with connect(port_of(server), post_head(HUGE)) as client:
                client.sendall(b" " * HUGE)
                status, found = refusal(read(client))
                assert (status, found["code"], found["retryable"]) == (413, "body_too_large", False)


@pytest.mark.parametrize(
    "head",
    [post_head(HUGE, "Connection: close"), post_head(HUGE, "Connection: TE, Close"), post_head(HUGE, version="1.0")],
)
def test_who_wants_the_connection_closed_still_reads_an_early_refusal(
    head: bytes, settings: Settings, tmp_path: Path
) -> None:
    (tmp_path / "keys").touch()
    closed = settings.model_copy(update={"api_keys_file": tmp_path / "keys"})
    with bounded(create_app(closed), timeout_s=60) as server:
        for _ in range(3):
            with connect(port_of(server), head) as client:
                client.sendall(b" " * HUGE)
                status, found = refusal(read(client))
                assert (status, found["code"]) == (401, "unauthorized")


@pytest.mark.parametrize("length", [HUGE, 100 * HUGE])
def test_a_body_that_is_refused_is_read_neither_for_long_nor_without_end(
    length: int, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("service.middleware._LINGER_S", 0.3 if length == HUGE else 60)
    limits = {"max_body_bytes": 2**20, "max_inflight_bytes": 2**20}
    with bounded(create_app(settings.model_copy(update=limits)), timeout_s=60) as server:
        with connect(port_of(server), post_head(length)) as client:
            with contextlib.suppress(ConnectionError):
                client.sendall(b" " * (length - 1))
            with contextlib.suppress(ConnectionError):
                read(client)
        wait_until(lambda: not server.server_state.connections)


def test_who_asks_before_it_sends_a_body_is_told_at_once(settings: Settings) -> None:
    limits = {"max_body_bytes": 2**20, "max_inflight_bytes": 2**20}
    with bounded(create_app(settings.model_copy(update=limits)), timeout_s=60) as server:
        began = time.monotonic()
        with connect(port_of(server), post_head(HUGE, "Expect: 100-continue")) as client:
            assert refusal(read(client))[0] == 413
        assert time.monotonic() - began < 5
