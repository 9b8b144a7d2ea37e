"""Asynchronous jobs: accepted at once, asked about, followed, cancelled, kept for a while."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import copy
import json
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

import httpx
import pytest

from engines.backends.base import EngineError
from engines.pipeline import Generate, Row
from service import tracker
from service.app import create_app
from service.finisher import encode_preview
from service.queue.base import QueueUnavailable, Status
from service.queue.memory import MemoryQueue
from service.runtime import State
from service.schemas import JobResponse
from service.settings import Settings
from tests.service.helpers import (
    Gate,
    Running,
    b64,
    error,
    listening,
    pipeline_of,
    png,
    random_image,
    read_pixels,
    running,
    until,
)
from tests.service.redis_server import RedisServer

pytestmark = pytest.mark.anyio

ASYNC = {"Prefer": "respond-async"}


@pytest.fixture(params=["memory", "redis"])
def any_queue(request: pytest.FixtureRequest, settings: Settings) -> Settings:
    if request.param == "memory":
        return settings
    server: RedisServer = request.getfixturevalue("redis_server")
    return settings.model_copy(update={"queue": server.url})


@pytest.fixture
async def app(anyio_backend: str, any_queue: Settings) -> AsyncIterator[Running]:
    async with running(any_queue) as this:
        yield this


async def ask(app: Running, path: str = "/generate", **fields: Any) -> str:
    """Have a job accepted; its id."""
    answer = await app.client.post(path, json={"prompt": "a cat", **fields}, headers=ASYNC)
    assert answer.status_code == 202, answer.text
    job_id: str = answer.json()["id"]
    return job_id


async def look(app: Running, job_id: str) -> dict[str, Any]:
    answer = await app.client.get(f"/jobs/{job_id}")
    assert answer.status_code == 200, answer.text
    return JobResponse.model_validate_json(answer.text).model_dump()


async def over(app: Running, job_id: str) -> dict[str, Any]:
    """The job once it is over."""
    async with asyncio.timeout(60):
        while (found := await look(app, job_id))["status"] in ("queued", "running"):
            await asyncio.sleep(0.01)
    return found


async def state(app: Running, job_id: str, wanted: str) -> None:
    async with asyncio.timeout(60):
        while (await look(app, job_id))["status"] != wanted:
            await asyncio.sleep(0.01)


def events_of(text: str) -> list[tuple[str, dict[str, Any]]]:
    """Names and data of server-sent events; comments are left out."""
    found = []
    for block in text.strip().split("\n\n"):
        if not block.startswith(":"):
            name, data = block.split("\n")
            assert name.startswith("event: ")
            assert data.startswith("data: ")
            found.append((name[7:], json.loads(data[6:])))
    return found


async def test_a_job_is_accepted_at_once_and_gives_the_same_images_later(app: Running, gate: Gate) -> None:
    answer = await app.client.post("/generate", json={"prompt": "a cat", "seed": 3, "n": 2}, headers=ASYNC)
    assert answer.status_code == 202
    body = answer.json()
    assert answer.headers["location"] == f"/jobs/{body['id']}"
    assert answer.headers["preference-applied"] == "respond-async"
    assert (body["status"], body["result"], body["error"]) == ("queued", None, None)
    assert body["progress"] == {"done": 0, "total": 8}
    await state(app, body["id"], "running")
    gate.opened.set()
    done = await over(app, body["id"])
    assert (done["status"], done["error"], done["position"]) == ("done", None, None)
    assert done["progress"] == {"done": 8, "total": 8}
    result = done["result"]
    assert (result["id"], result["model"], result["created"]) == (body["id"], "tiny", body["created"])
    assert [image["seed"] for image in result["images"]] == [3, 4]
    guidance = app.pipeline.manifest.guidance.default
    for image, seed in zip(result["images"], (3, 4), strict=True):
        [expected] = app.pipeline.run([Generate("a cat", 4, guidance, seed)])
        assert (read_pixels(base64.b64decode(image["b64_json"])) == expected).all()
    timings = result["timings"]
    assert timings["total_ms"] == pytest.approx(sum(timings.values()) - timings["total_ms"], abs=0.01)


@pytest.mark.parametrize(
    ("prefer", "status"),
    [("respond-async", 202), ("wait=5, Respond-Async;x=1", 202), ("wait=5", 200), ("respond-asynchronously", 200)],
)
async def test_a_header_asks_for_a_job(app: Running, prefer: str, status: int) -> None:
    answer = await app.client.post("/generate", json={"prompt": "a cat"}, headers={"Prefer": prefer})
    assert answer.status_code == status
    assert ("preference-applied" in answer.headers) == (status == 202)


@pytest.mark.parametrize("wanted", [True, False])
async def test_a_field_asks_for_a_job_in_both_forms(app: Running, wanted: bool) -> None:
    typed = await app.post("/generate", **{"prompt": "a cat", "async": wanted})
    files = {"image": ("a.png", png(random_image()), "image/png")}
    text = await app.client.post("/edit", data={"prompt": "a cat", "async": str(wanted).lower()}, files=files)
    assert [typed.status_code, text.status_code] == [202 if wanted else 200] * 2
    assert "preference-applied" not in typed.headers


async def test_a_bad_request_is_refused_at_once(app: Running) -> None:
    answer = await app.client.post("/generate", json={"prompt": "a cat", "steps": 3}, headers=ASYNC)
    error(answer, 422, "unsupported_steps", "steps")
    answer = await app.client.post("/generate", json={"prompt": "a cat", "async": "yes"})
    error(answer, 422, "invalid_value", "async")


async def test_an_image_is_raw_bytes_where_accept_asks_for_it(app: Running) -> None:
    headers = {**ASYNC, "Accept": "image/webp"}
    answer = await app.client.post("/generate", json={"prompt": "a cat", "seed": 5}, headers=headers)
    job_id = answer.json()["id"]
    await over(app, job_id)
    raw = await app.client.get(f"/jobs/{job_id}", headers={"Accept": "image/*"})
    assert (raw.headers["content-type"], raw.headers["x-seed"]) == ("image/webp", "5")
    assert raw.content[8:12] == b"WEBP"
    error(await app.client.get(f"/jobs/{job_id}", headers={"Accept": "image/png"}), 406, "not_acceptable", "accept")
    head = await app.client.head(f"/jobs/{job_id}")
    assert (head.status_code, head.headers["content-type"]) == (200, "application/json")


async def test_until_there_is_an_image_the_answer_is_json(app: Running, gate: Gate) -> None:
    job_id = await ask(app)
    answer = await app.client.get(f"/jobs/{job_id}", headers={"Accept": "image/*"})
    assert answer.json()["id"] == job_id


async def test_a_failed_job_tells_its_error_in_the_one_shape(app: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_: object) -> None:
        raise EngineError("broken")

    monkeypatch.setattr(app.pipeline, "tick", broken)
    headers = {**ASYNC, "X-Request-ID": "the-first"}
    accepted = await app.client.post("/generate", json={"prompt": "a cat"}, headers=headers)
    failed = await over(app, accepted.json()["id"])
    assert (failed["status"], failed["result"]) == ("failed", None)
    assert failed["error"].keys() == {"type", "code", "message", "param", "request_id", "retryable"}
    assert (failed["error"]["code"], failed["error"]["request_id"]) == ("generation_failed", "the-first")


async def test_unknown_jobs_and_options_are_refused(app: Running) -> None:
    sync = (await app.post("/generate", prompt="a cat")).json()["id"]
    for job_id in ("nowhere", sync, "%F0%9F%98%80", "x" * 500):
        for method, tail in (("GET", ""), ("DELETE", ""), ("GET", "/events")):
            error(await app.client.request(method, f"/jobs/{job_id}{tail}"), 404, "job_not_found", "job_id")
    known = await ask(app)
    for method, tail in (("GET", ""), ("DELETE", ""), ("GET", "/events")):
        answer = await app.client.request(method, f"/jobs/{known}{tail}?{'x' if tail else 'preview'}=true")
        error(answer, 422, "unknown_field", "query")


async def test_a_running_and_a_waiting_job_are_cancelled_and_again_is_no_error(
    any_queue: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running(any_queue.model_copy(update={"max_batch": 1})) as app:
        gate = Gate(app.pipeline, monkeypatch)
        held, waits, last = [await ask(app, n=2) for _ in range(3)]
        await state(app, held, "running")
        assert (await look(app, last))["position"] == 1
        for job_id in (held, waits, held):
            answer = await app.client.delete(f"/jobs/{job_id}")
            assert (answer.status_code, answer.json()["status"]) == (200, "cancelled")
        gate.opened.set()
        assert (await over(app, last))["status"] == "done"
        assert (await look(app, held))["error"]["code"] == "cancelled"
        assert (await app.client.delete(f"/jobs/{last}")).json()["status"] == "done"
        assert (await look(app, last))["result"] is not None
        for stage in ("queued", "running"):
            assert app.metric("fewstep_cancelled_total", stage=stage) == 1
        assert app.metric("fewstep_images_total") == 2


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
    error(await app.client.get(f"/jobs/{plain}/events?preview=perhaps"), 422, "invalid_value", "query")


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


async def test_results_are_kept_within_bounds(settings: Settings) -> None:
    async with running(settings.model_copy(update={"max_results": 2, "keep_results_s": 0.5})) as app:
        first, second, third = [await ask(app) for _ in range(3)]
        await over(app, third)
        error(await app.client.get(f"/jobs/{first}"), 404, "job_not_found", "job_id")
        assert (await look(app, second))["status"] == "done"
        await asyncio.sleep(0.6)
        error(await app.client.get(f"/jobs/{second}"), 404, "job_not_found", "job_id")


async def test_jobs_have_a_time_limit_of_their_own(app: Running, gate: Gate) -> None:
    limits = (await app.client.get("/capabilities")).json()["limits"]
    assert limits["job_timeout_ms"] > limits["max_timeout_ms"]
    fields = {"prompt": "a cat", "timeout_ms": limits["max_timeout_ms"] + 1}
    error(await app.client.post("/generate", json=fields), 422, "invalid_value", "timeout_ms")
    assert (await app.client.post("/generate", json=fields, headers=ASYNC)).status_code == 202
    fields["timeout_ms"] = limits["job_timeout_ms"] + 1
    error(await app.client.post("/generate", json=fields, headers=ASYNC), 422, "invalid_value", "timeout_ms")
    short = await ask(app, timeout_ms=300)
    await asyncio.sleep(1.0)
    gate.opened.set()
    assert (await over(app, short))["error"]["code"] == "deadline_exceeded"


async def test_a_job_that_no_worker_ends_is_over_soon_after_its_time(
    settings: Settings, redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracker, "_LATE_S", 0.2)
    async with running(settings.model_copy(update={"role": "api", "queue": redis_server.url})) as api:
        job_id = await ask(api, timeout_ms=1500)
        name, data = events_of((await api.client.get(f"/jobs/{job_id}/events")).text)[-1]
        assert (name, data["error"]["code"]) == ("failed", "deadline_exceeded")


async def test_a_service_that_drains_does_what_it_accepted_and_still_tells(app: Running, gate: Gate) -> None:
    job_id = await ask(app)
    following = asyncio.create_task(app.client.get(f"/jobs/{job_id}/events"))
    await until(gate.reached.is_set)
    app.service.drain()
    error(await app.client.post("/generate", json={"prompt": "a cat"}, headers=ASYNC), 503, "draining")
    assert not app.service.drained()
    assert (await look(app, job_id))["status"] == "running"
    gate.opened.set()
    assert events_of((await following).text)[-1][0] == "done"
    await until(app.service.drained)


async def test_a_draining_service_whose_queue_dies_with_it_empties_it(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running(settings.model_copy(update={"max_batch": 1})) as app:
        gate = Gate(app.pipeline, monkeypatch)
        jobs = [await ask(app) for _ in range(4)]
        await until(gate.reached.is_set)
        app.service.drain()
        assert not app.service.drained()
        gate.opened.set()
        await until(app.service.drained)
        await until(lambda: app.metric("fewstep_images_total") == 4)
        assert [(await over(app, job_id))["status"] for job_id in jobs] == ["done"] * 4


async def test_while_the_queue_is_away_jobs_are_asked_about_in_vain(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Away(MemoryQueue):
        away = False

        async def status(self, job_id: str, preview: bool = False) -> Status:
            if self.away:
                raise QueueUnavailable
            return await super().status(job_id, preview)

    queue = Away(100)
    async with running(settings, queue=queue) as app:
        gate = Gate(app.pipeline, monkeypatch)
        job_id = await ask(app)
        following = asyncio.create_task(app.client.get(f"/jobs/{job_id}/events"))
        await until(lambda: app.service.tracker.following == 1)
        queue.away = True
        for method, tail in (("GET", ""), ("DELETE", ""), ("GET", "/events")):
            answer = await app.client.request(method, f"/jobs/{job_id}{tail}")
            error(answer, 503, "queue_unavailable")
            assert int(answer.headers["retry-after"]) >= 1
        gate.opened.set()
        queue.away = False
        assert events_of((await following).text)[-1][0] == "done"


async def test_a_service_that_stops_ends_its_streams(settings: Settings, redis_server: RedisServer) -> None:
    async with running(settings.model_copy(update={"role": "api", "queue": redis_server.url})) as api:
        job_id = await ask(api)
        following = asyncio.create_task(api.client.get(f"/jobs/{job_id}/events"))
        await until(lambda: api.service.tracker.following == 1)
        api.service.abandon()
        assert [name for name, _ in events_of((await asyncio.wait_for(following, 60)).text)] == ["status"]
        assert api.service.state is State.READY


async def test_an_edit_is_a_job_too(app: Running) -> None:
    job_id = await ask(app, "/edit", image=b64(png(random_image())), strength=0.5, n=2)
    done = await over(app, job_id)
    assert done["progress"] == {"done": 4, "total": 4}
