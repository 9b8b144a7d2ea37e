"""More than the service can take, over HTTP: who is refused is told when to come back, and is let in then."""

from __future__ import annotations

import asyncio
import json
import tracemalloc

import pytest

from service.settings import Settings
from tests.service.helpers import Gate, b64, error, png, random_image, running, until

pytestmark = pytest.mark.anyio

MIB = 2**20


async def test_who_comes_back_when_told_to_is_let_in_before_newcomers(
    anyio_backend: str, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = {"prompt": "a cat", "image": b64(png(random_image())), "strength": 1.0, "seed": 1}
    async with running(settings.model_copy(update={"max_batch": 1, "max_queue_cost": 16})) as app:
        gate = Gate(app.pipeline, monkeypatch)
        accepted = [asyncio.create_task(app.post("/generate", prompt="a cat"))]
        await asyncio.to_thread(gate.reached.wait, 20)
        accepted += [asyncio.create_task(app.post("/generate", prompt="a cat")) for _ in range(2)]
        await until(lambda: app.metric("fewstep_queue_cost") == 8, 60)
        refused = await app.post("/edit", **mine)
        error(refused, 429, "queue_full")
        await asyncio.sleep(int(refused.headers["retry-after"]))
        error(await app.post("/edit", **mine | {"seed": 2}), 429, "queue_full")
        accepted.append(asyncio.create_task(app.post("/edit", **mine)))
        await until(lambda: app.metric("fewstep_queue_cost") == 12, 60)
        gate.opened.set()
        assert {answer.status_code for answer in await asyncio.gather(*accepted)} == {200}


@pytest.mark.parametrize("kind", ["json", "multipart"])
async def test_an_upload_counts_and_is_held_until_a_job_was_made_of_it(
    anyio_backend: str, settings: Settings, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    image = png(random_image()) + bytes(4 * MIB)
    body = json.dumps({"prompt": "a cat", "steps": 1, "image": b64(image)}).encode()
    sent = {
        "json": {"content": body, "headers": {"Content-Type": "application/json"}},
        "multipart": {"data": {"prompt": "a cat", "steps": "1"}, "files": {"image": image}},
    }[kind]
    async with running(settings.model_copy(update={"max_inflight_bytes": 12 * MIB, "max_batch": 1})) as app:
        gate = Gate(app.pipeline, monkeypatch)
        tracemalloc.start()
        edits = []
        for waiting in range(4):
            edits.append(asyncio.create_task(app.client.post("/edit", **sent)))
            await asyncio.to_thread(gate.reached.wait, 20)
            await until(lambda waiting=waiting: app.metric("fewstep_queue_depth") == waiting or edits[-1].done())
        held, _ = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        gate.opened.set()
        assert [edit.status_code for edit in await asyncio.gather(*edits)] == [200] * 4
        assert held < 2 * MIB
