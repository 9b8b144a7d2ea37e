"""Jobs followed by server-sent events."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import copy
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

import httpx
import pytest
from starlette.types import Message

from engines.pipeline import Row
from service import tracker
from service.app import create_app
from service.batching.finisher import encode_preview
from service.queue.base import Status
from service.runtime import State
from service.schemas import JobResponse
from service.settings import Settings
from tests.service.asked import ASYNC, ask, events_of, over
from tests.service.helpers import (
    Gate,
    Running,
    error,
    listening,
    pipeline_of,
    running,
    until,
)
from tests.service.redis_server import RedisServer

pytestmark = pytest.mark.anyio


@pytest.fixture
async def app(anyio_backend: str, any_queue: Settings) -> AsyncIterator[Running]:
    async with running(any_queue) as this:
        yield this


async def test_events_tell_of_every_tick_and_end_by_themselves(app: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    tick = app.pipeline.tick
    reached = asyncio.Semaphore(0)
    loop = asyncio.get_running_loop()

    def paced(rows: Any) -> None:
        asyncio.run_coroutine_threadsafe(reached.acquire(), loop).result(60)
        tick(rows)

    monkeypatch.setattr(app.pipeline, "tick", paced)
    job_id = await ask(app, seed=1)
    following = asyncio.create_task(app.client.get(f"/jobs/{job_id}/events"))
    await until(lambda: app.service.tracker.following == 1)
    seen = []
    async for status in app.service.tracker.follow(job_id):
        assert status is not None
        if status.state == "running" and status.done not in seen:
            seen.append(status.done)
            reached.release()
    assert seen[:4] == [0, 1, 2, 3]
    answer = await asyncio.wait_for(following, 60)
    assert answer.headers["content-type"].startswith("text/event-stream")
    events = events_of(answer.text)
    assert all(JobResponse.model_validate(data).id == job_id for _, data in events)
    # Who is slow to read is told of the newest.
    told = [data["progress"]["done"] for name, data in events if name == "progress"]
    assert told == sorted(set(told))
    assert events[-1][1]["progress"] == {"done": 4, "total": 4}
    names = [name for name, _ in events]
    assert names[0] == "status"
    assert names.count("done") == 1
    assert names[-1] == "done"
    assert events[-1][1] == (await app.client.get(f"/jobs/{job_id}")).json()
    assert app.service.tracker.following == 0


async def test_who_follows_may_see_the_image_in_the_making(app: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    tick = app.pipeline.tick
    moved: list[Row] = []

    def slow(rows: Sequence[Row]) -> None:
        time.sleep(0.5)
        tick(rows)
        moved.extend(copy.copy(row) for row in rows)

    monkeypatch.setattr(app.pipeline, "tick", slow)
    job_id = await ask(app, n=2)
    events = events_of((await app.client.get(f"/jobs/{job_id}/events?preview=true")).text)
    shown = dict.fromkeys(data["preview"] for _, data in events if data["preview"])
    firsts = [row.estimate for row in moved if not row.done and row.task.seed == moved[0].task.seed]
    # One that comes late may be followed by the next before it is told.
    expected = list(map(encode_preview, app.pipeline.decode(firsts)))
    assert shown
    assert {base64.b64decode(text) for text in shown} <= set(expected)
    assert len(set(expected)) == 3
    assert events[-1][0] == "done"
    assert events[-1][1]["preview"] is None
    plain = await ask(app)
    events = events_of((await app.client.get(f"/jobs/{plain}/events?preview=false")).text)
    assert all(data["preview"] is None for _, data in events)
    error(await app.client.get(f"/jobs/{plain}/events?preview=perhaps"), 422, "invalid_value", "preview")


async def test_events_of_a_job_that_is_over_are_one(app: Running) -> None:
    job_id = await ask(app)
    await over(app, job_id)
    [(name, data)] = events_of((await app.client.get(f"/jobs/{job_id}/events")).text)
    assert (name, data["status"]) == ("done", "done")


async def test_events_of_a_job_that_is_cancelled(app: Running, gate: Gate) -> None:
    job_id = await ask(app)
    following = asyncio.create_task(app.client.get(f"/jobs/{job_id}/events"))
    await until(lambda: app.service.tracker.following == 1)
    await app.client.delete(f"/jobs/{job_id}")
    name, data = events_of((await asyncio.wait_for(following, 60)).text)[-1]
    assert (name, data["error"]["code"]) == ("cancelled", "cancelled")


async def test_a_silent_line_has_heartbeats(app: Running, gate: Gate, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracker, "HEARTBEAT_S", 0.05)
    job_id = await ask(app)
    following = asyncio.create_task(app.client.get(f"/jobs/{job_id}/events"))
    await asyncio.sleep(1.0)
    gate.opened.set()
    text = (await asyncio.wait_for(following, 60)).text
    assert ": still here\n\n" in text
    assert events_of(text)[-1][0] == "done"


async def test_as_many_follow_as_there_may_be_requests(any_queue: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    async with running(any_queue.model_copy(update={"max_inflight": 1})) as app:
        gate = Gate(app.pipeline, monkeypatch)
        job_id = await ask(app)
        following = asyncio.create_task(app.client.get(f"/jobs/{job_id}/events"))
        await until(lambda: app.service.tracker.following == 1)
        error(await app.client.get(f"/jobs/{job_id}/events"), 429, "too_many_requests")
        gate.opened.set()
        assert (await following).status_code == 200


async def test_a_burst_is_given_no_more_places(app: Running, gate: Gate, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app.service, "settings", app.service.settings.model_copy(update={"max_inflight": 2}))
    job_id = await ask(app)
    asked = asyncio.Event()

    async def slow(*arguments: Any) -> Status:
        await asked.wait()
        return await look(*arguments)

    look = app.service.tracker.status
    monkeypatch.setattr(app.service.tracker, "status", slow)
    burst = [asyncio.create_task(app.client.get(f"/jobs/{job_id}/events")) for _ in range(5)]
    await until(lambda: sum(task.done() for task in burst) == 3)
    asked.set()
    gate.opened.set()
    assert sorted([answer.status_code for answer in await asyncio.gather(*burst)]) == [200, 200, 429, 429, 429]
    assert app.service.tracker.following == 0
    assert app.metric("fewstep_rejected_total", reason="too_many_requests") == 3


async def test_who_leaves_before_the_first_event_gives_up_a_place(app: Running, gate: Gate) -> None:
    job_id = await ask(app)

    async def gone() -> Message:
        return {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        raise AssertionError(message)

    scope = {"type": "http", "http_version": "1.1", "method": "GET", "path": f"/jobs/{job_id}/events"}
    await app.app({**scope, "query_string": b"", "headers": [], "app": app.app}, gone, send)
    assert app.service.tracker.following == 0
    error(await app.client.get("/jobs/nowhere/events"), 404, "job_not_found", "job_id")
    assert app.service.tracker.following == 0


async def test_who_waits_for_a_keyed_request_takes_nobodys_place(
    any_queue: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running(any_queue.model_copy(update={"max_inflight": 1})) as app:
        gate = Gate(app.pipeline, monkeypatch)
        job_id = await ask(app)
        fields, headers = {"prompt": "a cat"}, {"Idempotency-Key": "key"}
        waiting = asyncio.create_task(app.client.post("/generate", json=fields, headers=headers))
        await until(lambda: app.metric("fewstep_inflight_requests") == 1)
        await asyncio.sleep(0.1)
        following = asyncio.create_task(app.client.get(f"/jobs/{job_id}/events"))
        await until(lambda: app.service.tracker.following == 1 or following.done())
        gate.opened.set()
        assert ((await following).status_code, (await waiting).status_code) == (200, 200)


async def test_whoever_follows_may_leave_and_the_job_goes_on(
    any_queue: Settings, anyio_backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    app = create_app(any_queue)
    with listening(app) as port:
        gate = Gate(pipeline_of(app.state.service), monkeypatch)
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
            job_id = (await client.post("/generate", json={"prompt": "a cat"}, headers=ASYNC)).json()["id"]
            async with client.stream("GET", f"/jobs/{job_id}/events") as stream:
                assert stream.headers["x-accel-buffering"] == "no"
                async with contextlib.aclosing(stream.aiter_lines()) as lines:
                    assert await anext(lines) == "event: status"
                assert app.state.service.tracker.following == 1
            await until(lambda: app.state.service.tracker.following == 0)
            gate.opened.set()
            async with client.stream("GET", f"/jobs/{job_id}/events") as stream:
                text = (await stream.aread()).decode()
            assert events_of(text)[-1][0] == "done"


async def test_a_service_that_stops_ends_its_streams(settings: Settings, redis_server: RedisServer) -> None:
    async with running(settings.model_copy(update={"role": "api", "queue": redis_server.url})) as api:
        job_id = await ask(api)
        following = asyncio.create_task(api.client.get(f"/jobs/{job_id}/events"))
        await until(lambda: api.service.tracker.following == 1)
        api.service.abandon()
        assert [name for name, _ in events_of((await asyncio.wait_for(following, 60)).text)] == ["status"]
        assert api.service.state is State.READY
