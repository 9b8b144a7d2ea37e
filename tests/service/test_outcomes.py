"""Every job is counted once, by what became of it, wherever it is settled; a 202 is not an answer with images."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator
from functools import partial
from typing import Any

import pytest

from engines.backends.base import EngineError
from service.batching import finisher
from service.queue import keys, submissions
from service.queue.base import LATE_S
from service.roles import open_queue
from service.settings import Settings
from service.telemetry.metrics import Metrics
from tests.service.asked import ask, over, state
from tests.service.bench import MAX_ROWS, Bench, task
from tests.service.helpers import Gate, Running, error, running, until
from tests.service.queues import FINISHED, KEEP, ROOM, job, taken
from tests.service.redis_server import RedisServer

pytestmark = pytest.mark.anyio


@pytest.fixture
async def app(anyio_backend: str, any_queue: Settings) -> AsyncIterator[Running]:
    async with running(any_queue) as this:
        yield this


def outcomes(app: Running | Bench) -> dict[str, float]:
    """How many jobs had each outcome."""
    metrics = app.service.metrics if isinstance(app, Running) else app.metrics
    samples = [sample for family in metrics.jobs.collect() for sample in family.samples]
    return {sample.labels["outcome"]: sample.value for sample in samples if sample.name == "fewstep_jobs_total"}


async def test_a_job_that_was_accepted_and_fails_is_seen(app: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_: object) -> None:
        raise EngineError("broken")

    await over(app, await ask(app))
    monkeypatch.setattr(app.pipeline, "tick", broken)
    assert (await over(app, await ask(app)))["status"] == "failed"
    await until(lambda: outcomes(app) == {"done": 1, "engine": 1})
    assert app.metric("fewstep_requests_total", endpoint="generate", outcome="accepted") == 2
    assert app.metric("fewstep_requests_total", endpoint="generate", outcome="ok") == 0
    assert app.metric("fewstep_request_duration_seconds_count", endpoint="generate") == 0


async def test_a_cancelled_job_is_counted_once(app: Running, gate: Gate) -> None:
    job_id = await ask(app)
    await state(app, job_id, "running")
    for _ in range(2):
        assert (await app.client.delete(f"/jobs/{job_id}")).json()["status"] == "cancelled"
    gate.opened.set()
    assert (await app.post("/generate", prompt="a cat")).status_code == 200
    await until(lambda: outcomes(app) == {"cancelled": 1, "done": 1})


async def test_a_job_whose_time_is_over_is_counted_once(app: Running, gate: Gate) -> None:
    error(await app.post("/generate", prompt="a cat", timeout_ms=1500), 504, "deadline_exceeded")
    gate.opened.set()
    assert (await app.post("/generate", prompt="a cat")).status_code == 200
    await until(lambda: outcomes(app) == {"expired": 1, "done": 1})


async def test_a_job_that_the_service_gives_up_is_counted_so(app: Running, gate: Gate) -> None:
    asked = asyncio.create_task(app.post("/generate", prompt="a cat"))
    await until(gate.reached.is_set)
    app.service.abandon()
    error(await asked, 503, "shutting_down")
    gate.opened.set()
    assert outcomes(app) == {"stopped": 1}


async def test_a_dead_letter_is_counted_among_the_failures(
    anyio_backend: str, settings: Settings, redis_server: RedisServer
) -> None:
    metrics = Metrics()
    queue = open_queue(settings.model_copy(update={"queue": redis_server.url}), metrics)
    await queue.submit(job("a"))
    with redis_server.client() as client:
        client.hset(keys.record("a"), "message", b"{}")
    assert taken(queue) == []
    await queue.close()
    assert metrics.registry.get_sample_value("fewstep_dead_letter_total") == 1
    assert metrics.registry.get_sample_value("fewstep_jobs_total", {"outcome": "engine"}) == 1


async def test_jobs_that_no_worker_takes_in_time_are_counted_once_and_make_room(
    anyio_backend: str, any_queue: Settings
) -> None:
    metrics = Metrics()
    queue = open_queue(any_queue.model_copy(update={"max_queue_cost": ROOM}), metrics)

    def expired() -> float | None:
        return metrics.registry.get_sample_value("fewstep_jobs_total", {"outcome": "expired"})

    for k in range(25):
        await queue.submit(job(f"dead-{k}", steps=1, left_s=0.3 - LATE_S), KEEP if k % 2 else None)
    await asyncio.sleep(0.35)
    await queue.ask(job("waits", images=8), KEEP)
    await queue.submit(job("waits", images=8), KEEP)
    assert (queue.stats().depth, queue.stats().cost, expired()) == (1, ROOM / 2, 25)
    assert taken(queue) == ["waits"]
    await queue.submit(job("late", left_s=1 - LATE_S), KEEP)
    await queue.submit(job("dead", left_s=-1 - LATE_S), KEEP)
    assert (queue.stats().depth, queue.stats().cost, expired()) == (1, 4, 26)
    assert taken(queue) == ["late"]
    assert not queue.settle("dead", FINISHED)
    assert (await queue.status("dead")).left_s < -LATE_S
    await queue.close()


async def test_jobs_that_a_redis_lost_are_counted_by_who_waits_for_them(
    anyio_backend: str, settings: Settings, redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(submissions, "_POLL_S", 0.05)
    async with running(settings.model_copy(update={"queue": redis_server.url})) as app:
        gate = Gate(app.pipeline, monkeypatch)
        for headers in ({}, {"Idempotency-Key": "a"}):
            asked = asyncio.create_task(app.client.post("/generate", json={"prompt": "a cat"}, headers=headers))
            with redis_server.client() as client:
                await until(lambda: bool(client.keys(keys.record("*"))))
                client.flushall()
            error(await asked, 500, "generation_failed")
        gate.opened.set()
        assert (await app.post("/generate", prompt="a cat")).status_code == 200
        await until(lambda: outcomes(app) == {"engine": 2, "done": 1})


async def test_a_lost_job_that_several_follow_is_one(
    anyio_backend: str, settings: Settings, redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(submissions, "_POLL_S", 0.05)
    async with running(settings.model_copy(update={"queue": redis_server.url})) as app:
        gate, headers = Gate(app.pipeline, monkeypatch), {"Idempotency-Key": "a"}
        ask = partial(app.client.post, "/generate", json={"prompt": "a cat"}, headers=headers)
        asked = [asyncio.create_task(ask()) for _ in range(3)]
        await until(lambda: app.service.inflight == 3)
        with redis_server.client() as client:
            await until(lambda: bool(client.keys(keys.record("*"))))
            await asyncio.sleep(0.3)
            client.flushall()
        for each in asked:
            error(await each, 500, "generation_failed")
        gate.opened.set()
        assert outcomes(app) == {"engine": 1}


async def test_the_worker_counts_what_it_settles(bench: Bench) -> None:
    await bench.submit("late", task(1), seconds=-1)
    await bench.submit("untrained", task(1, steps=3))
    await bench.submit("good", task(2, steps=1))
    bench.steps(1)
    await bench.finished("good")
    await until(lambda: outcomes(bench) == {"expired": 1, "invalid": 1, "done": 1})
    for k in range(MAX_ROWS):
        await bench.submit(f"{k}", task(k))
    bench.steps(1)
    bench.worker.stop()
    assert outcomes(bench) == {"expired": 1, "invalid": 1, "done": 1, "stopped": MAX_ROWS}


async def test_what_nobody_waits_for_any_more_is_not_finished(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """While the first image is encoded the others wait behind it: one is given up, and the time of one passes."""
    encoding, go, encode = threading.Event(), threading.Event(), finisher.encode_image

    def slow(*arguments: Any, **others: Any) -> bytes:
        encoding.set()
        assert go.wait(60)
        return encode(*arguments, **others)

    monkeypatch.setattr(finisher, "encode_image", slow)
    for name, seconds in (("first", 600.0), ("given up", 600.0), ("late", 60.0), ("behind", 600.0)):
        await bench.submit(name, task(1, steps=1), seconds=seconds)
    bench.steps(1)
    await asyncio.to_thread(encoding.wait, 60)
    await bench.queue.cancel("given up")
    monkeypatch.setattr(bench.worker._finisher, "_clock", lambda: time.monotonic() + 60.0)
    go.set()
    assert (await bench.failed("late")).reason == "expired"
    await bench.finished("behind")
    await until(lambda: outcomes(bench) == {"done": 2, "expired": 1})
    assert not bench.queue.owes(bench.model)
    assert bench.count("fewstep_images_total") == 2


@pytest.mark.parametrize(("waited_s", "bound"), [(20.0, 0.1), (20.0 * 15, 0.6)])
async def test_waits_are_measured_by_the_jobs_own_limit(bench: Bench, waited_s: float, bound: float) -> None:
    await bench.submit("a", task(1, steps=1), age_s=waited_s, seconds=600 - waited_s)
    bench.steps(1)
    await bench.finished("a")

    def up_to(part: float) -> float:
        return bench.count("fewstep_queue_wait_ratio_bucket", le=f"{part}")

    assert (up_to(round(bound - 0.1, 1)), up_to(bound)) == (0, 1)
