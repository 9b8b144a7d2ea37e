"""The Idempotency-Key header: a request that is sent again is not run again."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from engines.backends.base import EngineError
from service.app import create_app
from service.models.catalogue import Catalogue
from service.security.api_keys import ApiKey, digest_of
from service.settings import Settings
from tests.service import checks
from tests.service.helpers import Gate, Running, error, listening, pipeline_of, png, random_image, running, until
from tests.service.redis_server import RedisServer
from tests.service.several import replace as rolled_to

pytestmark = pytest.mark.anyio


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


async def post(app: Running, key: str, headers: dict[str, str] | None = None, **fields: Any) -> httpx.Response:
    sent = {"Idempotency-Key": key, **(headers or {})}
    return await app.client.post("/generate", json={"prompt": "a cat", **fields}, headers=sent)


async def test_the_same_key_gives_the_same_images_without_a_second_run(app: Running) -> None:
    first, second = await post(app, "a"), await post(app, "a")
    assert first.status_code == 200
    assert (second.json()["id"], second.json()["images"]) == (first.json()["id"], first.json()["images"])
    assert app.metric("fewstep_images_total") == 1
    raw = await post(app, "a", {"Accept": "image/png"})
    assert raw.headers["content-type"] == "image/png"
    assert int(raw.headers["x-seed"]) == first.json()["images"][0]["seed"]
    assert app.metric("fewstep_images_total") == 1
    assert (await post(app, "b")).json()["id"] != first.json()["id"]


async def test_two_at_once_share_one_run(app: Running, gate: Gate) -> None:
    requests = [asyncio.create_task(post(app, "a")) for _ in range(3)]
    await until(lambda: app.service.inflight == 3)
    gate.opened.set()
    answers = [(await request).json() for request in requests]
    assert len({answer["id"] for answer in answers}) == 1
    assert app.metric("fewstep_images_total") == 1


async def test_another_request_under_the_key_is_refused(app: Running) -> None:
    await post(app, "a", seed=1)
    for changed in ({"seed": 2}, {"seed": 1, "n": 2}, {"prompt": "the cat", "seed": 1}):
        error(await post(app, "a", **changed), 422, "idempotency_conflict", "idempotency-key")
    error(await post(app, "a", {"Accept": "image/webp"}, seed=1), 422, "idempotency_conflict", "idempotency-key")
    files = {"image": ("a.png", png(random_image()), "image/png")}
    other = await app.client.post("/edit", data={"prompt": "a cat"}, files=files, headers={"Idempotency-Key": "a"})
    error(other, 422, "idempotency_conflict", "idempotency-key")
    assert (await post(app, "a", seed=1)).status_code == 200
    assert app.metric("fewstep_images_total") == 1


async def test_files_are_compared_by_their_bytes(app: Running) -> None:
    async def edit(seed: int) -> httpx.Response:
        files = {"image": ("a.png", png(random_image(seed)), "image/png")}
        return await app.client.post("/edit", data={"prompt": "a cat"}, files=files, headers={"Idempotency-Key": "a"})

    first = await edit(1)
    assert (await edit(1)).json()["id"] == first.json()["id"]
    error(await edit(2), 422, "idempotency_conflict", "idempotency-key")


async def test_a_job_and_a_request_that_waits_may_share_a_key(app: Running) -> None:
    accepted = await post(app, "a", {"Prefer": "respond-async"})
    job_id = accepted.json()["id"]
    assert (await post(app, "a")).json()["id"] == job_id
    again = await post(app, "a", **{"async": True})
    assert (again.status_code, again.json()["id"], again.json()["status"]) == (202, job_id, "done")
    assert (await app.client.get(f"/jobs/{job_id}")).json()["result"] == again.json()["result"]


async def test_what_failed_may_be_tried_again(app: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_: object) -> None:
        raise EngineError("broken")

    with monkeypatch.context() as patched:
        patched.setattr(app.pipeline, "tick", broken)
        error(await post(app, "a"), 500, "generation_failed")
    assert (await post(app, "a")).status_code == 200


async def test_who_waits_for_a_job_that_is_given_up_is_told_so(app: Running, gate: Gate) -> None:
    waiting = asyncio.create_task(post(app, "a"))
    await until(lambda: app.service.inflight == 1)
    job_id = (await post(app, "a", {"Prefer": "respond-async"})).json()["id"]
    assert (await app.client.delete(f"/jobs/{job_id}")).json()["status"] == "cancelled"
    gate.opened.set()
    assert error(await waiting, 410, "cancelled")["retryable"] is False
    await until(lambda: app.metric("fewstep_requests_total", endpoint="generate", outcome="cancelled") == 1)
    assert app.metric("fewstep_requests_total", endpoint="generate", outcome="rejected") == 0


async def test_what_was_made_is_given_again_though_it_would_be_refused_now(
    anyio_backend: str, any_queue: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running(any_queue.model_copy(update={"safety": "tests.service.checks:refuse_dogs"})) as app:
        first = await post(app, "a")
        assert first.status_code == 200
        monkeypatch.setattr(app.service._safety, "_check", checks.refuse_everything)
        assert (await post(app, "a")).json()["id"] == first.json()["id"]
        error(await post(app, "b"), 422, "content_refused")
        error(await post(app, "a", seed=9), 422, "content_refused")


async def test_what_was_made_is_given_again_after_a_roll_to_a_revision_that_would_not_make_it(
    any_queue: Settings, several: Settings, folder: Path
) -> None:
    asked = {
        "a": ("/generate", {"model": "blue"}),
        "b": ("/generate", {"model": Catalogue.of(several).find("blue").manifest.model}),
        "c": ("/generate", {"model": "blue", "async": True}),
        "d": ("/v1/images/generations", {"model": "blue"}),
    }
    async with running(several.model_copy(update={"queue": any_queue.queue})) as app:

        async def send(name: str, key: str, **other: Any) -> httpx.Response:
            path, fields = asked[name]
            sent = {"prompt": "a cat", "steps": 1, **fields, **other}
            return await app.client.post(path, json=sent, headers={"Idempotency-Key": key})

        first = {name: await send(name, name) for name in asked}
        await until(lambda: app.metric("fewstep_images_total") == 4)
        rolled_to(folder, "blue", steps=(2, 4))
        assert (await app.client.post("/models/blue/load")).status_code == 200
        for name in asked:
            again = await send(name, name)
            assert again.status_code == first[name].status_code, again.text
            for told in ("id", "revision", "images", "data"):
                assert again.json().get(told) == first[name].json().get(told)
            refused = "model_not_found" if name == "b" else "unsupported_steps"
            assert (await send(name, "other")).json()["error"]["code"] == refused
            assert (await send(name, name, prompt="a dog")).json()["error"]["code"] == refused
        assert app.metric("fewstep_images_total") == 4


async def test_a_key_is_one_callers(app: Running) -> None:
    first = await post(app, "a", {"Authorization": "Bearer one"})
    other = await post(app, "a", {"Authorization": "Bearer two"}, seed=1)
    assert other.status_code == 200
    assert other.json()["id"] != first.json()["id"]


async def test_a_caller_is_one_however_its_credential_is_spelled(app: Running) -> None:
    spelled: list[dict[str, str]] = [
        {"Authorization": "Bearer one"},
        {"Authorization": "bearer one"},
        {"Authorization": "Bearer  one"},
        {"X-Api-Key": "one"},
    ]
    assert len({(await post(app, "a", headers)).json()["id"] for headers in spelled}) == 1
    others: list[dict[str, str]] = [{}, {"X-Api-Key": "two"}, {"Authorization": "Basic b25l"}]
    assert len({(await post(app, "a", headers)).json()["id"] for headers in others}) == 3
    assert app.metric("fewstep_images_total") == 4


async def test_a_caller_is_its_name_where_keys_are_asked_for(
    anyio_backend: str, any_queue: Settings, tmp_path: Path
) -> None:
    file = tmp_path / "keys"
    file.write_text(ApiKey("ann", digest_of("old")).line)
    async with running(any_queue.model_copy(update={"api_keys_file": file})) as app:
        first = await post(app, "a", {"X-Api-Key": "old"})
        file.write_text("\n".join([ApiKey("ann", digest_of("new key")).line, ApiKey("bob", digest_of("bob")).line]))
        assert (await post(app, "a", {"Authorization": "Bearer new key"})).json()["id"] == first.json()["id"]
        assert (await post(app, "a", {"X-Api-Key": "bob"})).json()["id"] != first.json()["id"]


@pytest.mark.parametrize("key", ["", " ", "a b", "k" * 256, "k\u00e9y"])
async def test_a_key_is_short_and_visible(app: Running, key: str) -> None:
    headers = [(b"Idempotency-Key", key.encode())]
    answer = await app.client.post("/generate", json={"prompt": "a cat"}, headers=headers)
    error(answer, 422, "invalid_value", "idempotency-key")


async def test_two_keys_are_one_too_many(app: Running) -> None:
    headers = [("Idempotency-Key", "a"), ("Idempotency-Key", "b")]
    answer = await app.client.post("/generate", json={"prompt": "a cat"}, headers=headers)
    error(answer, 422, "invalid_value", "idempotency-key")


async def test_a_job_with_a_key_goes_on_when_its_client_is_gone(
    any_queue: Settings, anyio_backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    app = create_app(any_queue)
    with listening(app) as port:
        gate = Gate(pipeline_of(app.state.service), monkeypatch)
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
            sent = {"json": {"prompt": "a cat"}, "headers": {"Idempotency-Key": "a"}}
            request = asyncio.create_task(client.post("/generate", **sent))
            await until(gate.reached.is_set)
            request.cancel()
            await until(lambda: app.state.service.inflight == 0)
            gate.opened.set()
            answer = await client.post("/generate", **sent)
            assert answer.status_code == 200
            assert app.state.service.metrics.registry.get_sample_value("fewstep_images_total") == 1


async def test_a_time_limit_ends_the_wait_and_the_job(app: Running, gate: Gate) -> None:
    error(await post(app, "a", timeout_ms=300), 504, "deadline_exceeded")
    # The worker's clock may think it a little earlier.
    await asyncio.sleep(1.0)
    gate.opened.set()
    async with asyncio.timeout(60):
        # Until the worker has ended the first job, its key stands for that one.
        while (answer := await post(app, "a", timeout_ms=30_000)).status_code == 422:
            await asyncio.sleep(0.05)
    assert answer.status_code == 200, answer.text
