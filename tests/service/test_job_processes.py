"""Asynchronous jobs across processes: accepted by one, asked about at another, some of them killed."""

from __future__ import annotations

import asyncio
import signal
import threading
from pathlib import Path
from typing import Any

import httpx
import pytest

from service.queue import keys
from service.settings import Settings
from tests.service.asked import ask, events_of, look, over, state
from tests.service.helpers import running, until, wait_until
from tests.service.processes import Process, processes
from tests.service.redis_server import RedisServer

pytestmark = pytest.mark.anyio


def post(api: Process, headers: dict[str, str], **fields: Any) -> httpx.Response:
    return httpx.post(f"{api.url}/generate", json={"prompt": "a cat", **fields}, headers=headers, timeout=60)


def test_a_job_accepted_by_one_process_is_followed_at_another_when_the_first_is_killed(
    bundle_path: Path, redis_server: RedisServer
) -> None:
    apis = [Process("api", bundle_path, redis_server) for _ in range(2)]
    worker = Process("worker", bundle_path, redis_server, tick_s=0.3)
    with processes(*apis, worker) as (accepting, other, _):
        worker.send(signal.SIGSTOP)  # so that the job is not over before it is followed
        job_id = post(accepting, {"Prefer": "respond-async"}, seed=4).json()["id"]
        keyed = {"Idempotency-Key": "key"}
        second = post(accepting, {**keyed, "Prefer": "respond-async"}, seed=5, n=2).json()["id"]
        accepting.send(signal.SIGKILL)
        assert accepting.wait() == -signal.SIGKILL
        with httpx.stream("GET", f"{other.url}/jobs/{job_id}/events", timeout=60) as stream:
            worker.send(signal.SIGCONT)
            events = events_of(stream.read().decode())
        told = [data["progress"]["done"] for name, data in events if name == "progress"]
        assert told
        assert told == sorted(set(told))
        name, done = events[-1]
        assert (name, done["status"], done["result"]["images"][0]["seed"]) == ("done", "done", 4)
        answer = post(other, keyed, seed=5, n=2)
        assert (answer.status_code, answer.json()["id"]) == (200, second)
        assert other.get(f"/jobs/{second}").json()["result"]["images"] == answer.json()["images"]
        assert worker.metric("fewstep_images_total") == 3
        assert other.get("/jobs/nowhere").status_code == 404


def test_a_request_with_a_key_outlives_the_process_that_it_was_sent_to(
    bundle_path: Path, redis_server: RedisServer
) -> None:
    accepting, other = Process("api", bundle_path, redis_server), Process("api", bundle_path, redis_server)
    worker = Process("worker", bundle_path, redis_server, tick_s=0.3)
    with processes(accepting, other, worker), httpx.Client() as client:
        request = client.build_request(
            "POST", f"{accepting.url}/generate", json={"prompt": "a cat"}, headers={"Idempotency-Key": "key"}
        )
        failures: list[Exception] = []

        def send() -> None:
            try:
                client.send(request)
            except httpx.TransportError as error:
                failures.append(error)

        sending = threading.Thread(target=send)
        sending.start()
        wait_until(lambda: worker.metric("fewstep_tick_rows_count") > 0)
        accepting.send(signal.SIGKILL)
        sending.join(60)
        assert len(failures) == 1
        assert post(other, {"Idempotency-Key": "key"}).status_code == 200
        assert worker.metric("fewstep_images_total") == 1


def test_a_process_whose_queue_dies_with_it_finishes_its_jobs_on_sigterm_and_tells_who_follows(
    bundle_path: Path, redis_server: RedisServer
) -> None:
    alone = Process("all", bundle_path, redis_server, tick_s=0.2, queue="memory", max_batch=1)
    with processes(alone):
        jobs = [post(alone, {"Prefer": "respond-async"}).json()["id"] for _ in range(3)]
        with httpx.stream("GET", f"{alone.url}/jobs/{jobs[-1]}/events", timeout=60) as stream:
            alone.send(signal.SIGTERM)
            events = events_of(stream.read().decode())
        assert events[-1][0] == "done"
        assert alone.wait() == 0


def test_an_api_that_must_stop_tells_who_follows_to_the_end(bundle_path: Path, redis_server: RedisServer) -> None:
    api, worker = Process("api", bundle_path, redis_server), Process("worker", bundle_path, redis_server, tick_s=0.3)
    with processes(api, worker):
        job_id = post(api, {"Prefer": "respond-async"}, steps=4).json()["id"]
        with httpx.stream("GET", f"{api.url}/jobs/{job_id}/events", timeout=60) as stream:
            api.send(signal.SIGTERM)
            events = events_of(stream.read().decode())
        assert events[-1][0] == "done"
        assert api.wait() == 0


async def test_a_worker_that_must_stop_leaves_its_job_to_another(
    anyio_backend: str, settings: Settings, bundle_path: Path, redis_server: RedisServer
) -> None:
    shared = settings.model_copy(update={"queue": redis_server.url, "reclaim_after_s": 1.0})
    async with running(shared.model_copy(update={"role": "api"})) as api:
        worker = Process("worker", bundle_path, redis_server, tick_s=1.0, drain_timeout_s=0.1)
        with processes(worker):
            job_id = await ask(api)
            await state(api, job_id, "running")
            worker.send(signal.SIGTERM)
            assert await asyncio.to_thread(worker.wait) == 0
        assert (await look(api, job_id))["status"] == "running"
        assert (await api.client.get("/models")).json()["max_memory_bytes"] is None
        async with running(shared.model_copy(update={"role": "worker"})) as other:
            assert (await over(api, job_id))["status"] == "done"
            assert other.metric("fewstep_redeliveries_total") == 1


async def test_a_job_tried_again_counts_its_steps_anew(
    anyio_backend: str, settings: Settings, bundle_path: Path, redis_server: RedisServer
) -> None:
    shared = settings.model_copy(update={"queue": redis_server.url, "reclaim_after_s": 1.0})
    async with running(shared.model_copy(update={"role": "api"})) as api:
        with processes(Process("worker", bundle_path, redis_server, tick_s=0.4)) as [victim]:
            job_id = await ask(api)
            await until(lambda: victim.metric("fewstep_tick_rows_count") >= 2)
            victim.send(signal.SIGKILL)
            victim.wait()
        assert (await look(api, job_id))["progress"]["done"] >= 1
        async with running(shared.model_copy(update={"role": "worker"})):
            done = await over(api, job_id)
            assert (done["status"], done["progress"]) == ("done", {"done": 4, "total": 4})


async def test_jobs_leave_nothing_in_redis_for_ever(
    anyio_backend: str, settings: Settings, redis_server: RedisServer
) -> None:
    shared = settings.model_copy(update={"queue": redis_server.url, "keep_results_s": 60.0})
    async with running(shared) as both:
        for _ in range(3):
            await over(both, await ask(both))
        cancelled = await ask(both)
        await both.client.delete(f"/jobs/{cancelled}")
        with redis_server.client() as client:
            kept = {name: client.pttl(name) for name in client.scan_iter(f"{keys.PREFIX}*")}
            assert {name.encode() for name in (keys.KEPT, keys.KEPT_ENDS, keys.KEPT_BYTES)} <= kept.keys()
            results = {name: ttl for name, ttl in kept.items() if b":result:" in name or b":job:" in name}
            assert len(results) == 2 * 4
            assert all(0 < ttl <= 60_000 for ttl in results.values()), results
            assert all(ttl > 0 for ttl in kept.values()), kept
            assert not client.hexists(keys.record(cancelled), "message")
