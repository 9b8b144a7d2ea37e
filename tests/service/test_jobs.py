"""Asynchronous jobs: accepted at once, asked about, followed, cancelled, kept for a while."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import AsyncIterator

import pytest

from engines.backends.base import EngineError
from engines.pipeline import Generate
from service import tracker
from service.queue.base import FRESH_S, QueueUnavailable, Status
from service.queue.memory import MemoryQueue
from service.settings import Settings
from tests.service.asked import ASYNC, ask, events_of, look, over, state
from tests.service.helpers import (
    Gate,
    Running,
    b64,
    error,
    png,
    random_image,
    read_pixels,
    running,
    until,
)
from tests.service.redis_server import RedisServer

pytestmark = pytest.mark.anyio


@pytest.fixture
async def app(anyio_backend: str, any_queue: Settings) -> AsyncIterator[Running]:
    async with running(any_queue) as this:
        yield this


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
        cancelled = (await look(app, held))["error"]
        assert (cancelled["code"], cancelled["retryable"]) == ("cancelled", False)
        assert (await app.client.delete(f"/jobs/{last}")).json()["status"] == "done"
        assert (await look(app, last))["result"] is not None
        for stage in ("queued", "running"):
            assert app.metric("fewstep_cancelled_total", stage=stage) == 1
        assert app.metric("fewstep_images_total") == 2


async def test_results_are_kept_within_bounds(settings: Settings) -> None:
    async with running(settings.model_copy(update={"max_results": 2, "keep_results_s": 2.0})) as app:
        first, second = await ask(app), await ask(app)
        await over(app, second)
        await asyncio.sleep(FRESH_S)
        await over(app, await ask(app))
        error(await app.client.get(f"/jobs/{first}"), 404, "job_not_found", "job_id")
        assert (await look(app, second))["status"] == "done"
        await asyncio.sleep(2.0 - FRESH_S)
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
    monkeypatch.setattr(tracker, "LATE_S", 0.2)
    async with running(settings.model_copy(update={"role": "api", "queue": redis_server.url})) as api:
        job_id = await ask(api, timeout_ms=1500)
        name, data = events_of((await api.client.get(f"/jobs/{job_id}/events")).text)[-1]
        assert (name, data["error"]["code"]) == ("failed", "deadline_exceeded")
        # Who gives it up now changes nothing.
        given_up = (await api.client.delete(f"/jobs/{job_id}")).json()
        for found in (given_up, await look(api, job_id)):
            assert (found["status"], found["error"]["code"]) == ("failed", "deadline_exceeded")
        assert api.metric("fewstep_cancelled_total", stage="queued") == 0


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
    async with running(settings.model_copy(update={"max_batch": 1, "drain_timeout_s": 0.5})) as app:
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


async def test_an_edit_is_a_job_too(app: Running) -> None:
    job_id = await ask(app, "/edit", image=b64(png(random_image())), strength=0.5, n=2)
    done = await over(app, job_id)
    assert done["progress"] == {"done": 4, "total": 4}
