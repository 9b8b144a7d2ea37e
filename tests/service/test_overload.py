"""More than the service can take, over HTTP: who is refused is told when to come back, and is let in then."""

from __future__ import annotations

import asyncio

import pytest

from service.settings import Settings
from tests.service.helpers import Gate, b64, error, png, random_image, running, until

pytestmark = pytest.mark.anyio


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
