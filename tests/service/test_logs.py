"""Log lines: every one of a request names it, in whatever thread; none at any level holds a secret."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from engines.backends.base import EngineError
from service.queue.base import QueueUnavailable
from service.queue.wire import pack_job, request_of
from service.security.api_keys import ApiKey, digest_of, new_key
from service.settings import Settings
from service.telemetry import logs
from tests.service.helpers import Running, b64, random_image, running
from tests.service.queues import KEEP, opened
from tests.service.queues import job as some_job
from tests.service.redis_server import RedisServer

pytestmark = pytest.mark.anyio

PASSWORD = "correct-horse-battery"
PROMPT = "a cat of the zanzibar"
METADATA = "written-into-the-picture"


class Lines:
    """What the service's own handler wrote."""

    def __init__(self, stream: io.StringIO) -> None:
        self._stream = stream

    @property
    def text(self) -> str:
        return self._stream.getvalue()

    def of(self, event: str) -> list[dict[str, Any]]:
        lines = [json.loads(line) for line in self.text.splitlines()]
        return [line for line in lines if line["event"] == event]


@pytest.fixture
def lines(monkeypatch: pytest.MonkeyPatch) -> Iterator[Lines]:
    """Everything that any logger says, as a service set to debug writes it."""
    stream = io.StringIO()
    root = logging.getLogger()
    before = root.handlers[:], root.level, logging.getLogger("PIL").level
    monkeypatch.setattr("sys.stderr", stream)
    logs.configure("json", "debug")
    yield Lines(stream)
    root.handlers[:], level, pil = before
    root.setLevel(level)
    logging.getLogger("PIL").setLevel(pil)


def described_png() -> bytes:
    """An image with text in all the places that a PNG has for it."""
    file, text, exif = io.BytesIO(), PngInfo(), Image.Exif()
    text.add_text("Comment", METADATA)
    exif[0x010E] = METADATA
    Image.fromarray(random_image()).save(file, "png", pnginfo=text, exif=exif)
    return file.getvalue()


def described_jpeg() -> bytes:
    """The same in a JPEG."""
    file, exif = io.BytesIO(), Image.Exif()
    exif[0x010E], exif[0x0112] = METADATA, 6
    Image.fromarray(random_image()).save(file, "jpeg", exif=exif, comment=METADATA.encode())
    return file.getvalue()


async def test_no_line_at_any_level_holds_a_secret(
    anyio_backend: str,
    settings: Settings,
    redis_path: str,
    tmp_path: Path,
    lines: Lines,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    key = new_key()
    digest = digest_of(key)
    keys_file = tmp_path / "keys"
    keys_file.write_text(ApiKey("ann", digest).line)
    pictures = [described_png(), described_jpeg()]
    with RedisServer(redis_path, tmp_path, "--requirepass", PASSWORD, password=PASSWORD) as server:
        safe = settings.model_copy(
            update={"queue": server.url, "api_keys_file": keys_file, "safety": "tests.service.checks:refuse_dogs"}
        )
        async with running(safe) as app:
            headers = {"Authorization": f"Bearer {key}"}

            async def post(path: str, **fields: Any) -> int:
                answer = await app.client.post(path, json={"prompt": PROMPT, **fields}, headers=headers)
                return answer.status_code

            assert {await post("/edit", image=b64(picture), strength=0.5) for picture in pictures} == {200}
            files = {"image": ("a.png", pictures[0], "image/png")}
            form = await app.client.post("/edit", data={"prompt": PROMPT}, files=files, headers=headers)
            assert form.status_code == 200, form.text
            assert await post("/edit", image=b64(pictures[0])[:-40]) == 400
            assert await post("/generate", prompt=f"{PROMPT} dog") == 422
            assert await post("/generate", nonsense=PROMPT) == 422
            assert (await app.client.post("/generate", headers={"X-Api-Key": key[:-1]})).status_code == 401
            keys_file.write_text(f"ann:{key}")

            def broken(_: object) -> None:
                raise EngineError("broken")

            monkeypatch.setattr(app.pipeline, "tick", broken)
            assert await post("/generate") == 500
            server.stop()
            assert await post("/generate") == 503
            server.start()
    served = [line for line in lines.of("request") if line["status"] != 401]
    assert {line["key"] for line in served} == {"ann"}, "the name of a key says whose request it was"
    assert "batch failed" in lines.text
    assert "the queue is away" in lines.text
    assert "the keys stay as they were" in lines.text
    assert '"debug"' in lines.text
    secrets = [key, key[3:-1], digest, PASSWORD, "zanzibar", METADATA]
    for picture in pictures:
        secrets += [base64.b64encode(picture[60:90]).decode(), repr(picture[60:80])[2:-1]]
    for secret in secrets:
        assert secret not in lines.text, secret


async def test_a_wrong_password_of_a_redis_is_not_quoted(
    anyio_backend: str, settings: Settings, redis_path: str, tmp_path: Path, lines: Lines
) -> None:
    with RedisServer(redis_path, tmp_path, "--requirepass", PASSWORD, password=PASSWORD) as server:
        wrong = server.url.replace(PASSWORD, "wrong-horse")
        async with running(settings.model_copy(update={"queue": wrong})) as app:
            assert (await app.post("/generate", prompt=PROMPT)).status_code == 503
    assert "the queue is away" in lines.text
    assert "horse" not in lines.text


async def test_what_a_thread_says_of_a_request_has_its_id(app: Running, lines: Lines) -> None:
    def say() -> None:
        logging.getLogger("anything").info("from a thread")

    token = logs.request_id_var.set("mine")
    try:
        await app.service.decoded(say, app.service.clock() + 20, asyncio.Event().wait)
        await app.service.parsed(say, app.service.clock() + 20)
    finally:
        logs.request_id_var.reset(token)
    assert [line.get("request_id") for line in lines.of("from a thread")] == ["mine", "mine"]


@pytest.mark.parametrize("method", ["prepare", "tick", "finish"])
async def test_what_a_worker_says_names_the_requests(
    app: Running, lines: Lines, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    def broken(_: object) -> None:
        raise EngineError("broken")

    monkeypatch.setattr(app.pipeline, method, broken)
    headers = {"X-Request-ID": "mine"}
    answer = await app.client.post("/generate", json={"prompt": "a cat"}, headers=headers)
    assert answer.status_code == 500
    assert [line["requests"] for line in lines.of("batch failed")] == [["mine"]]


async def test_a_fault_in_a_loop_names_the_requests_that_it_cost(
    app: Running, lines: Lines, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError

    headers = {"X-Request-ID": "mine"}
    with monkeypatch.context() as once:
        once.setattr("service.batching.finisher.encode_image", broken)
        await app.client.post("/generate", json={"prompt": "a cat"}, headers=headers)
    assert [line["requests"] for line in lines.of("an image cannot be encoded")] == [["mine"]]
    with monkeypatch.context() as once:
        once.setattr("service.batching.finisher.failures", broken)
        await app.client.post("/generate", json={"prompt": "a cat"}, headers=headers)
    assert [line["requests"] for line in lines.of("finishing failed")] == [["mine"]]
    with monkeypatch.context() as once:
        once.setattr("service.queue.memory.MemoryQueue.progress", broken)
        await app.client.post("/generate", json={"prompt": "a cat"}, headers=headers)
    assert [line["requests"] for line in lines.of("the worker's loop failed")] == [["mine"]]


async def test_the_queue_being_away_is_no_affair_of_the_first_request(
    anyio_backend: str, settings: Settings, redis_server: RedisServer, lines: Lines
) -> None:
    apart = settings.model_copy(update={"queue": redis_server.url})
    async with running(apart) as app:
        assert (await app.post("/generate", prompt="a cat")).status_code == 200
        redis_server.stop()
        try:
            while not lines.of("the queue is away"):
                await asyncio.sleep(0.05)
        finally:
            redis_server.start()
    assert all("request_id" not in line for line in lines.of("the queue is away"))


async def test_every_outage_is_told_to_who_waits_for_nothing_too(
    anyio_backend: str, redis_server: RedisServer, lines: Lines
) -> None:
    """As an API process whose clients all send a key, and ask for what became of their jobs."""
    async with opened(redis_server.url) as queue:
        for outage in (1, 2):
            redis_server.stop()
            try:
                with pytest.raises(QueueUnavailable):
                    await queue.submit(some_job("a"), KEEP)
            finally:
                redis_server.start()
            await queue.submit(some_job(f"{outage}"), KEEP)
            assert len(lines.of("the queue is away")) == len(lines.of("the queue is back")) == outage


def test_a_job_that_is_not_unpacked_names_its_request_too() -> None:
    assert request_of(pack_job(some_job("mine")).message) == ["request-mine"]
    assert request_of(b"{") == request_of(b'{"version": 1}') == []
