"""The command line, and the server's manners on a signal."""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
import uvicorn
from click.testing import CliRunner

from service.app import create_app
from service.commands import serve
from service.runtime import State
from service.server import Server
from service.settings import Settings, unknown_settings
from tests.service.helpers import Gate, error, pipeline_of, wait_until


def test_help_lists_the_options() -> None:
    result = CliRunner().invoke(serve, ["--help"])
    assert result.exit_code == 0
    for option in ("--host", "--port", "--bundle", "--backend", "--threads", "--log-format"):
        assert option in result.output


@pytest.mark.parametrize(
    ("options", "environment", "says"),
    [
        (["--port", "70000"], {}, "port"),
        (["--backend", "abacus"], {}, "abacus"),
        ([], {"FEWSTEP_MAX_BATCH": "many"}, "max_batch"),
        (["--timeout-ms", "999999"], {}, "Error: timeout_ms must not exceed max_timeout_ms"),
        (["--models", "nowhere"], {}, "Error: models: there is no such folder"),
        (["--plans", "plans"], {}, "ort keeps no plans; trt,"),
        ([], {"FEWSTEP_KEEP_RESULTS_S": "0.0004"}, "keep_results_s"),
        ([], {"FEWSTEP_KEEP_RESULTS_S": "1e14"}, "keep_results_s"),
        ([], {"FEWSTEP_JOB_TIMEOUT_MS": "100000000000000000"}, "job_timeout_ms"),
        ([], {"FEWSTEP_RECLAIM_AFTER_S": "1e16"}, "reclaim_after_s"),
    ],
)
def test_wrong_settings_end_at_once(options: list[str], environment: dict[str, str], says: str) -> None:
    result = CliRunner().invoke(serve, options, env=environment)
    assert result.exit_code == 2
    assert says in result.output


@pytest.mark.parametrize("name", ["HOST", "BUNDLE", "MODELS", "BACKEND", "PLANS", "QUEUE", "API_KEYS_FILE"])
def test_what_is_set_to_nothing_is_refused(name: str) -> None:
    result = CliRunner().invoke(serve, env={f"FEWSTEP_{name}": ""})
    assert result.exit_code == 2
    assert name.lower() in result.output


def test_variables_that_are_no_settings_are_named() -> None:
    given = ["FEWSTEP_API_KEY_FILE", "FEWSTEP_PORT", "fewstep_host", "PATH", "FEWSTEP_"]
    assert unknown_settings(given) == ["FEWSTEP_", "FEWSTEP_API_KEY_FILE"]


def test_options_go_before_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEWSTEP_PORT", "1234")
    monkeypatch.setenv("FEWSTEP_HOST", "0.0.0.0")
    assert (Settings(port=4321).port, Settings(port=4321).host) == (4321, "0.0.0.0")


def test_the_service_imports_no_torch() -> None:
    program = "import sys, service.commands, service.server; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def test_an_address_that_is_taken_is_no_start(settings: Settings) -> None:
    options = ["--bundle", settings.bundle, "--backend", "fake", "--log-level", "warning"]
    with socket.create_server(("127.0.0.1", 0)) as taken:
        command = [sys.executable, "-m", "fewstep", "serve", "--port", f"{taken.getsockname()[1]}", *options]
        ended = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 1
    assert "address already in use" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_sigterm_drains(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    app = create_app(settings)
    service = app.state.service
    server = Server(uvicorn.Config(app, port=0, log_config=None, ws="none"), service)
    thread = threading.Thread(target=server.run)
    thread.start()
    wait_until(lambda: server.started and service.state is State.READY)
    port = server.servers[0].sockets[0].getsockname()[1]
    gate = Gate(pipeline_of(service), monkeypatch)
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client, ThreadPoolExecutor() as pool:
        in_flight = pool.submit(client.post, "/generate", json={"prompt": "a cat"})
        assert gate.reached.wait(60)
        server.handle_exit(signal.SIGTERM, None)
        assert client.get("/readyz").json() == {"status": "draining"}
        assert client.get("/livez").status_code == 200
        error(client.post("/generate", json={"prompt": "a dog"}), 503, "draining")
        assert thread.is_alive()
        gate.opened.set()
        assert in_flight.result().status_code == 200
    thread.join(60)
    assert not thread.is_alive()
    assert not server.failed


def test_a_second_signal_gives_up_what_is_in_flight(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    app = create_app(settings)
    service = app.state.service
    server = Server(uvicorn.Config(app, port=0, log_config=None, ws="none", timeout_graceful_shutdown=5), service)
    thread = threading.Thread(target=server.run)
    thread.start()
    wait_until(lambda: server.started and service.state is State.READY)
    port = server.servers[0].sockets[0].getsockname()[1]
    gate = Gate(pipeline_of(service), monkeypatch)
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client, ThreadPoolExecutor() as pool:
        in_flight = pool.submit(client.post, "/generate", json={"prompt": "a cat"})
        assert gate.reached.wait(60)
        server.handle_exit(signal.SIGTERM, None)
        server.handle_exit(signal.SIGTERM, None)
        error(in_flight.result(), 503, "shutting_down")
        gate.opened.set()
    thread.join(60)
    assert not thread.is_alive()


def test_an_end_before_the_bundle_is_loaded_is_no_failure(settings: Settings, caplog: pytest.LogCaptureFixture) -> None:
    service = create_app(settings).state.service
    service.models.cancel_loads()
    service.start()
    asyncio.run(service.stop())
    assert service.failure is None
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_draining_has_an_end(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    app = create_app(settings.model_copy(update={"drain_timeout_s": 0.2}))
    service = app.state.service
    server = Server(uvicorn.Config(app, port=0, log_config=None, ws="none"), service)
    thread = threading.Thread(target=server.run)
    thread.start()
    wait_until(lambda: server.started and service.state is State.READY)
    port = server.servers[0].sockets[0].getsockname()[1]
    gate = Gate(pipeline_of(service), monkeypatch)
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client, ThreadPoolExecutor() as pool:
        in_flight = pool.submit(client.post, "/generate", json={"prompt": "a cat"})
        assert gate.reached.wait(60)
        server.handle_exit(signal.SIGTERM, None)
        error(in_flight.result(), 503, "shutting_down")
        gate.opened.set()
    thread.join(60)
    assert not thread.is_alive()
