"""API processes, workers and a Redis as in production: each a process of its own, some of them killed."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import time
from http.client import HTTPConnection
from pathlib import Path

import httpx
import pytest

from service.jobs import Priority
from service.queue import keys
from service.runtime import State
from service.server import LOST
from service.settings import Settings
from tests.service.helpers import b64, error, pixels, png, random_image, running, until, wait_until
from tests.service.processes import Process, processes
from tests.service.redis_server import RedisServer
from tests.service.slow_service import DEADLY, ENDLESS, ILLEGAL, START_ANEW

pytestmark = pytest.mark.anyio


@pytest.fixture
def api_settings(settings: Settings, redis_server: RedisServer) -> Settings:
    return settings.model_copy(update={"role": "api", "queue": redis_server.url})


async def test_an_api_that_opens_no_engine_and_a_worker_without_endpoints_make_the_same_image(
    anyio_backend: str, settings: Settings, api_settings: Settings, bundle_path: Path, redis_server: RedisServer
) -> None:
    fields = {"prompt": "a cat", "seed": 5, "image": b64(png(random_image())), "strength": 0.5}
    async with running(settings) as alone:
        expected = pixels(await alone.post("/edit", **fields))
    async with running(api_settings.model_copy(update={"backend": "no engine is opened"})) as api:
        with processes(Process("worker", bundle_path, redis_server)) as [worker]:
            answer = await api.post("/edit", **fields)
            assert (pixels(answer) == expected).all()
            assert answer.json()["batch"]["ticks"] == [1, 1]
            assert (await api.client.get("/capabilities")).json()["model"] == "tiny"
            error(await api.post("/generate", prompt="the", steps=3), 422, "unsupported_steps", "steps")
            for path in ("/capabilities", "/", "/openapi.json"):
                assert worker.get(path).status_code == 404
            assert httpx.post(f"{worker.url}/generate", json={"prompt": "a cat"}).status_code == 404
            assert worker.get("/livez").status_code == 200
            assert worker.metric("fewstep_images_total") == 1
            assert api.metric("fewstep_images_total") == 0
            assert api.metric("fewstep_requests_total", endpoint="edit", outcome="ok") == 1


async def test_a_worker_that_is_killed_in_the_middle_leaves_its_job_to_another(
    anyio_backend: str, api_settings: Settings, bundle_path: Path, redis_server: RedisServer
) -> None:
    async with running(api_settings) as api:
        with processes(Process("worker", bundle_path, redis_server, tick_s=0.3)) as [victim]:
            request = asyncio.create_task(api.post("/generate", prompt="a cat", seed=1))
            await until(lambda: victim.metric("fewstep_tick_rows_count") > 0)
            victim.send(signal.SIGKILL)
            assert victim.wait() == -signal.SIGKILL
        async with running(api_settings.model_copy(update={"role": "worker", "reclaim_after_s": 1.0})) as other:
            assert (await request).status_code == 200
            assert other.metric("fewstep_redeliveries_total") == 1
            assert other.metric("fewstep_images_total") == 1
        assert api.metric("fewstep_queue_depth") == 0
        with redis_server.client() as client:
            assert client.xlen(keys.jobs(api.pipeline.manifest.model, Priority.NORMAL)) == 0


async def test_a_worker_whose_device_is_lost_exits_and_leaves_what_it_held_to_the_next(
    anyio_backend: str, api_settings: Settings, bundle_path: Path, redis_server: RedisServer
) -> None:
    async with running(api_settings) as api:
        with processes(Process("worker", bundle_path, redis_server, tick_s=0.3)) as [victim]:
            held = asyncio.create_task(api.post("/generate", prompt="a cat", steps=4))
            await until(lambda: victim.metric("fewstep_tick_rows_count") > 0)
            found = error(await api.post("/generate", prompt=ILLEGAL, steps=1), 500, "generation_failed")
            assert found["retryable"]
            assert await asyncio.to_thread(victim.wait) == LOST
        assert not held.done()
        async with running(api_settings.model_copy(update={"role": "worker", "reclaim_after_s": 1.0})) as other:
            assert (await held).status_code == 200
            assert other.metric("fewstep_redeliveries_total") == 1


def test_a_service_whose_device_is_lost_starts_anew(bundle_path: Path, redis_server: RedisServer) -> None:
    alone = Process("all", bundle_path, redis_server, queue="memory", environment={START_ANEW: "1"})
    with processes(alone) as [service]:
        pid, before = service.pid, service.url
        lost = httpx.post(f"{before}/generate", json={"prompt": ILLEGAL}, timeout=60)
        assert error(lost, 500, "generation_failed")["retryable"]
        wait_until(lambda: service.url != before and service.ready(), 60)
        assert (service.pid, service.alive) == (pid, True)
        again = httpx.post(f"{service.url}/generate", json={"prompt": "a cat"}, timeout=60)
        assert again.status_code == 200


async def test_a_worker_that_hangs_exits_and_leaves_what_it_held_to_the_next(
    anyio_backend: str, api_settings: Settings, bundle_path: Path, redis_server: RedisServer
) -> None:
    async with running(api_settings) as api:
        with processes(Process("worker", bundle_path, redis_server, stall_s=1)) as [victim]:
            held = asyncio.create_task(api.post("/generate", prompt=ENDLESS, steps=4))
            assert await asyncio.to_thread(victim.wait) == LOST
            assert any(line["event"] == "the worker hangs" for line in victim.lines)
        assert not held.done()
        async with running(api_settings.model_copy(update={"role": "worker", "reclaim_after_s": 1.0})) as other:
            assert (await held).status_code == 200
            assert other.metric("fewstep_redeliveries_total") == 1


def test_a_service_that_hangs_starts_anew_and_one_that_is_slow_does_not(
    bundle_path: Path, redis_server: RedisServer
) -> None:
    alone = Process(
        "all", bundle_path, redis_server, tick_s=0.7, queue="memory", stall_s=1, environment={START_ANEW: "1"}
    )
    with processes(alone) as [service]:
        pid, before = service.pid, service.url
        slow = httpx.post(f"{before}/generate", json={"prompt": "a cat", "steps": 4}, timeout=60)
        assert slow.status_code == 200
        hung = httpx.post(f"{before}/generate", json={"prompt": ENDLESS}, timeout=60)
        assert error(hung, 503, "shutting_down")["retryable"]
        wait_until(lambda: service.url != before and service.ready(), 60)
        assert (service.pid, service.alive) == (pid, True)
        again = httpx.post(f"{service.url}/generate", json={"prompt": "a cat"}, timeout=60)
        assert again.status_code == 200


def test_an_idle_connection_stays_open_for_longer_than_the_servers_own_five_seconds(
    bundle_path: Path, redis_server: RedisServer
) -> None:
    with processes(Process("all", bundle_path, redis_server, queue="memory")) as [service]:
        address = httpx.URL(service.url)
        with contextlib.closing(HTTPConnection(address.host, address.port, timeout=60)) as connection:
            connection.request("GET", "/livez")
            connection.getresponse().read()
            own = connection.sock
            time.sleep(6)
            connection.request("GET", "/livez")
            assert connection.getresponse().status == 200
            assert connection.sock is own


@pytest.mark.slow
async def test_a_request_that_kills_workers_is_given_up_after_three(
    anyio_backend: str, api_settings: Settings, bundle_path: Path, redis_server: RedisServer
) -> None:
    async with running(api_settings) as api:
        request = asyncio.create_task(api.post("/generate", prompt=DEADLY, timeout_ms=120_000))
        for _ in range(3):
            with contextlib.closing(Process("worker", bundle_path, redis_server)) as victim:
                assert await asyncio.to_thread(victim.wait) == -signal.SIGKILL
        assert not request.done()
        last = Process("worker", bundle_path, redis_server)
        with processes(last):
            found = error(await request, 500, "generation_failed")
            assert not found["retryable"]
            assert last.metric("fewstep_dead_letter_total") == 1
            assert last.metric('fewstep_jobs_total{outcome="engine"}') == 1
            assert (await api.post("/generate", prompt="a cat")).status_code == 200
    with redis_server.client() as client:
        assert client.xlen(keys.DEAD) == 1


async def test_two_apis_and_two_workers_answer_every_request_once(
    anyio_backend: str, api_settings: Settings, redis_server: RedisServer
) -> None:
    worker_settings = api_settings.model_copy(update={"role": "worker", "max_batch": 2})
    async with (
        running(api_settings) as first,
        running(api_settings) as second,
        running(worker_settings) as one,
        running(worker_settings) as other,
    ):
        apis = (first, second)
        answers = await asyncio.gather(
            *(apis[seed % 2].post("/generate", prompt="a cat", seed=seed) for seed in range(60))
        )
        assert [answer.json()["images"][0]["seed"] for answer in answers] == list(range(60))
        made = [worker.metric("fewstep_images_total") for worker in (one, other)]
        assert sum(made) == 60
        assert min(made) > 0


@pytest.mark.slow
async def test_two_apis_and_two_workers_that_are_processes_answer_every_request_once(
    anyio_backend: str, bundle_path: Path, redis_server: RedisServer
) -> None:
    apis = [Process("api", bundle_path, redis_server) for _ in range(2)]
    workers = [Process("worker", bundle_path, redis_server, tick_s=0.01, max_batch=4) for _ in range(2)]
    with processes(*apis, *workers):
        async with httpx.AsyncClient(timeout=60) as client:

            async def ask(seed: int) -> httpx.Response:
                url = apis[seed % 2].url
                return await client.post(f"{url}/generate", json={"prompt": "a cat", "seed": seed, "n": 1 + seed % 3})

            answers = await asyncio.gather(*map(ask, range(40)))
        assert [answer.status_code for answer in answers] == [200] * 40
        seeds = [[image["seed"] for image in answer.json()["images"]] for answer in answers]
        assert seeds == [list(range(seed, seed + 1 + seed % 3)) for seed in range(40)]
        made = [worker.metric("fewstep_images_total") for worker in workers]
        assert sum(made) == sum(map(len, seeds))
        assert min(made) > 0
        again = httpx.post(f"{apis[1].url}/generate", json={"prompt": "a cat", "seed": 0}).json()
        assert again["images"] == answers[0].json()["images"]


async def test_a_client_that_leaves_cancels_in_the_worker(
    anyio_backend: str, api_settings: Settings, bundle_path: Path, redis_server: RedisServer
) -> None:
    async with running(api_settings) as api:
        with processes(Process("worker", bundle_path, redis_server, tick_s=0.5)) as [worker]:
            late = await api.post("/generate", prompt="a cat", timeout_ms=700)
            error(late, 504, "deadline_exceeded")
            answer = await api.post("/generate", prompt="a cat", steps=1)
            assert answer.json()["batch"]["ticks"] == [1]
            assert worker.metric("fewstep_tick_rows_count") < 1 + 4
            assert worker.metric("fewstep_images_total") == 1


async def test_a_worker_that_is_told_to_stop_finishes_what_it_holds_and_leaves_the_rest(
    anyio_backend: str, api_settings: Settings, bundle_path: Path, redis_server: RedisServer
) -> None:
    async with running(api_settings) as api:
        worker = Process("worker", bundle_path, redis_server, tick_s=0.2, max_batch=1)
        with processes(worker):
            worker.send(signal.SIGSTOP)  # So that it finds all of them at once, and takes the two that it may hold.
            requests = [asyncio.create_task(api.post("/generate", prompt="a cat")) for _ in range(4)]
            await until(lambda: api.metric("fewstep_queue_depth") == 4)
            worker.send(signal.SIGCONT)
            await until(lambda: api.metric("fewstep_queue_depth") == 2)
            worker.send(signal.SIGTERM)
            assert await asyncio.to_thread(worker.wait) == 0
        done, waiting = [task for task in requests if task.done()], [task for task in requests if not task.done()]
        assert [task.result().status_code for task in done] == [200, 200]
        assert api.metric("fewstep_queue_depth") == 2
        async with running(api_settings.model_copy(update={"role": "worker"})) as other:
            assert [answer.status_code for answer in await asyncio.gather(*waiting)] == [200, 200]
            assert other.metric("fewstep_redeliveries_total") == 0


async def test_while_redis_is_away_requests_are_turned_away_and_nothing_accepted_is_lost(
    anyio_backend: str, settings: Settings, redis_path: str, tmp_path: Path
) -> None:
    with RedisServer(redis_path, tmp_path, "--appendonly", "yes", "--appendfsync", "always") as server:
        shared = settings.model_copy(update={"queue": server.url, "max_queue_cost": 24})
        async with running(shared.model_copy(update={"role": "api"})) as api:
            accepted = asyncio.create_task(api.post("/generate", prompt="a cat"))
            await until(lambda: api.metric("fewstep_queue_depth") == 1)
            server.stop()
            refused = await api.post("/generate", prompt="a cat")
            found = error(refused, 503, "queue_unavailable")
            assert (found["type"], found["retryable"]) == ("unavailable_error", True)
            assert int(refused.headers["retry-after"]) >= 1
            assert api.metric("fewstep_rejected_total", reason="queue_unavailable") == 1
            ready = await api.client.get("/readyz")
            assert (ready.status_code, ready.json()) == (503, {"status": "queue_unavailable"})
            assert "fewstep_queue_depth" not in (await api.client.get("/metrics")).text
            assert (await api.client.get("/livez")).status_code == 200
            async with running(shared.model_copy(update={"role": "worker"})) as worker:
                await asyncio.sleep(1.0)
                assert not accepted.done()
                assert worker.service.state is State.READY
                server.start()
                assert (await accepted).status_code == 200
                assert (await api.post("/generate", prompt="a cat")).status_code == 200
                assert (await worker.client.get("/readyz")).status_code == 200


async def test_one_process_can_be_both(anyio_backend: str, settings: Settings, redis_server: RedisServer) -> None:
    async with running(settings.model_copy(update={"queue": redis_server.url})) as both:
        answers = await asyncio.gather(*(both.post("/generate", prompt="a cat", seed=k) for k in range(8)))
        assert {answer.status_code for answer in answers} == {200}
        assert both.metric("fewstep_images_total") == 8
