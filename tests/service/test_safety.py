"""The safety check of an operator: asked about every prompt and image, away from the loops, and failing closed."""

from __future__ import annotations

import asyncio
import json
import logging
import threading
import time
from collections.abc import Iterator, Sequence

import numpy as np
import pytest
from pydantic import ValidationError

from engines.pipeline import Row
from service.settings import Settings
from tests.service import checks
from tests.service.helpers import SIZE, Running, error, pixels, running, until
from tests.service.redis_server import RedisServer

pytestmark = pytest.mark.anyio


def checked(settings: Settings, name: str) -> Settings:
    return settings.model_copy(update={"safety": f"tests.service.checks:{name}"})


@pytest.fixture(autouse=True)
def _forget() -> Iterator[None]:
    yield
    checks.seen.clear()


async def test_none_is_the_default_and_is_said(app: Running) -> None:
    assert (await app.client.get("/capabilities")).json()["safety"] is None


async def test_the_check_sees_each_prompt_and_each_image_that_is_sent(anyio_backend: str, settings: Settings) -> None:
    async with running(checked(settings, "refuse_dogs")) as app:
        assert (await app.client.get("/capabilities")).json()["safety"] == "tests.service.checks:refuse_dogs"
        answer = await app.post("/generate", prompt="a cat", n=2)
        assert [prompt for prompt, _ in checks.seen] == ["a cat"] * 3
        [_, *images] = [image for _, image in checks.seen]
        for index, image in enumerate(images):
            assert image is not None
            assert (image.dtype, image.shape) == (np.uint8, (SIZE, SIZE, 3))
            assert np.array_equal(image, pixels(answer, index))
        assert app.metric("fewstep_content_refused_total", stage="prompt") == 0


async def test_a_prompt_that_is_refused_is_never_queued(anyio_backend: str, settings: Settings) -> None:
    async with running(checked(settings, "refuse_dogs")) as app:
        found = error(await app.post("/generate", prompt="a dog"), 422, "content_refused")
        assert "no dogs" in found["message"]
        assert (found["type"], found["retryable"]) == ("invalid_request_error", False)
        assert app.metric("fewstep_content_refused_total", stage="prompt") == 1
        assert app.metric("fewstep_tick_rows_count") == 0
        assert (await app.post("/generate", prompt="a cat")).status_code == 200


async def test_an_image_that_is_refused_is_not_sent_nor_its_company(anyio_backend: str, settings: Settings) -> None:
    async with running(checked(settings, "refuse_images")) as app:
        found = error(await app.post("/generate", prompt="a cat", n=3), 422, "content_refused")
        assert "no images" in found["message"]
        # The first is enough; the others are not looked at.
        assert app.metric("fewstep_content_refused_total", stage="image") == 1
        assert app.metric("fewstep_images_total") == 0


async def test_a_refusal_may_be_any_text(anyio_backend: str, settings: Settings) -> None:
    async with running(checked(settings, "refuse_images_badly")) as app:
        job = (await app.client.post("/generate", json={"prompt": "a cat", "async": True})).json()["id"]
        async with asyncio.timeout(60):
            while (answer := await app.client.get(f"/jobs/{job}")).json()["status"] in ("queued", "running"):
                await asyncio.sleep(0.01)
        assert answer.status_code == 200
        assert "no ? images" in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    "name",
    [
        "fail_on_prompts",
        "fail_to_ask",
        "fail_on_images",
        "forget_to_answer",
        "give_up_on_prompts",
        "exit_on_images",
    ],
)
async def test_a_check_that_fails_lets_nothing_through(
    anyio_backend: str, settings: Settings, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    async with running(checked(settings, name)) as app:
        found = error(await app.post("/generate", prompt="a secret cat"), 500, "safety_check_failed")
        assert "RuntimeError" not in found["message"]
        assert app.metric("fewstep_images_total") == 0
        [record] = [record for record in caplog.records if record.getMessage() == "the safety check failed"]
        assert record.__dict__["requests"] == [found["request_id"]]
        assert "secret" not in str(record.__dict__)


async def test_a_slow_check_holds_up_neither_other_requests_nor_ticks(
    anyio_backend: str, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, go, threads = threading.Event(), threading.Event(), set[str]()

    def slow(prompt: str, image: object) -> str | None:
        threads.add(threading.current_thread().name)
        if image is not None:
            asked.set()
            assert go.wait(60)
        return None

    monkeypatch.setattr(checks, "refuse_dogs", slow)
    async with running(checked(settings, "refuse_dogs")) as app:
        first = asyncio.create_task(app.post("/generate", prompt="a cat", steps=1))
        await asyncio.to_thread(asked.wait, 20)
        second = asyncio.create_task(app.post("/generate", prompt="a cat", steps=4))
        await until(lambda: app.metric("fewstep_tick_rows_count") == 5)
        assert (await app.client.get("/livez")).status_code == 200
        go.set()
        assert {(await request).status_code for request in (first, second)} == {200}
    assert threads == {"safety"}


async def test_a_check_that_never_answers_is_a_504(
    anyio_backend: str, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    go = threading.Event()
    monkeypatch.setattr(checks, "refuse_dogs", lambda prompt, image: "late" if go.wait(60) else None)
    async with running(checked(settings, "refuse_dogs")) as app:
        error(await app.post("/generate", prompt="a cat", timeout_ms=50), 504, "deadline_exceeded")
        assert app.metric("fewstep_tick_rows_count") == 0
        go.set()


@pytest.mark.parametrize("stage", ["prompt", "image"])
async def test_a_check_that_hangs_lets_nothing_through_and_holds_up_nothing(
    anyio_backend: str, settings: Settings, stage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each time its thread is left to itself, but three at most; when they are free again, so is the service."""
    go, asked = threading.Event(), list[str]()

    def hang(prompt: str, image: object) -> str | None:
        if (image is None) == (stage == "prompt") and prompt == "a dog":
            asked.append(prompt)
            assert go.wait(60)
        return None

    monkeypatch.setattr(checks, "refuse_dogs", hang)
    hasty = checked(settings, "refuse_dogs").model_copy(update={"safety_timeout_s": 0.1})
    async with running(hasty) as app:
        for _ in range(2):
            error(await app.post("/generate", prompt="a dog"), 500, "safety_check_failed")
        assert (await app.post("/generate", prompt="a cat")).status_code == 200
        for _ in range(3):
            error(await app.post("/generate", prompt="a dog"), 500, "safety_check_failed")
        assert len(asked) == 3
        error(await app.post("/generate", prompt="a cat"), 500, "safety_check_failed")
        go.set()
        await until(lambda: sum(thread.name == "safety" for thread in threading.enumerate()) <= 1)
        assert (await app.post("/generate", prompt="a cat")).status_code == 200


async def test_across_a_redis_the_api_checks_prompts_and_the_worker_images(
    anyio_backend: str, settings: Settings, redis_server: RedisServer
) -> None:
    apart = settings.model_copy(update={"queue": redis_server.url})
    api = checked(apart, "refuse_dogs").model_copy(update={"role": "api"})
    worker = checked(apart, "refuse_images").model_copy(update={"role": "worker"})
    async with running(api) as front, running(worker):
        error(await front.post("/generate", prompt="a dog"), 422, "content_refused")
        found = error(await front.post("/generate", prompt="a cat"), 422, "content_refused")
        assert "no images" in found["message"]


async def test_jobs_that_nobody_waits_for_are_checked_too(anyio_backend: str, settings: Settings) -> None:
    async with running(checked(settings, "refuse_dogs")) as app:
        error(await app.post("/generate", prompt="a dog", **{"async": True}), 422, "content_refused")
    async with running(checked(settings, "refuse_images")) as app:
        accepted = await app.post("/generate", prompt="a cat", **{"async": True})
        assert accepted.status_code == 202
        place = accepted.headers["location"]
        while (job := (await app.client.get(place)).json())["status"] in ("queued", "running"):
            await asyncio.sleep(0.01)
        assert (job["status"], job["error"]["code"]) == ("failed", "content_refused")


async def test_a_preview_that_is_refused_is_not_shown(
    anyio_backend: str, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running(checked(settings, "refuse_images")) as app:
        tick = app.pipeline.tick

        def slow(rows: Sequence[Row]) -> None:
            time.sleep(0.2)
            tick(rows)

        monkeypatch.setattr(app.pipeline, "tick", slow)
        accepted = await app.post("/generate", prompt="a cat", **{"async": True})
        events = (await app.client.get(f"{accepted.headers['location']}/events?preview=true")).text
        assert app.metric("fewstep_content_refused_total", stage="preview") >= 1
        told = [json.loads(line.removeprefix("data: ")) for line in events.splitlines() if line.startswith("data: ")]
        assert {job["preview"] for job in told} == {None}
        assert told[-1]["error"]["code"] == "content_refused"


async def test_openais_endpoints_are_checked_too(anyio_backend: str, settings: Settings) -> None:
    async with running(checked(settings, "refuse_dogs")) as app:
        error(await app.post("/v1/images/generations", prompt="a dog"), 422, "content_refused")


@pytest.mark.parametrize("name", ["nowhere:check", "tests.service.checks", "tests.service.checks:NOT_A_CHECK", ":", ""])
def test_a_check_that_is_not_there_ends_the_start(name: str) -> None:
    with pytest.raises(ValidationError, match="no safety check"):
        Settings(safety=name)
