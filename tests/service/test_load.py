"""Mixed load on ONNX Runtime: ticks carry rows of several endpoints, and nobody's image changes by it."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from engines.pipeline import Row
from service.settings import Settings
from tests.service.helpers import Running, b64, box_mask, pixels, png, random_image, running

pytestmark = pytest.mark.anyio

# In levels of 255: batches of other sizes may round otherwise.
TOLERANCE = 1
REQUESTS = 40


def some_request(rng: random.Random) -> tuple[str, dict[str, Any]]:
    path = rng.choice(["/generate", "/edit", "/inpaint"])
    fields: dict[str, Any] = {
        "prompt": rng.choice(["a cat", "the moon", "a big red heart", "the small green house and tree"]),
        "steps": rng.choice([1, 2, 4, 4, 4]),
        "guidance_scale": round(rng.uniform(1, 8), 2),
        "seed": rng.randrange(2**32),
        "n": rng.choice([1, 1, 1, 2, 3]),
    }
    if path != "/generate":
        fields["image"] = b64(png(random_image(rng.randrange(1000))))
        fields["strength"] = rng.choice([0.5, 0.75, 1.0]) if fields["steps"] > 1 else 1.0
    if path == "/inpaint":
        fields["mask"] = b64(png(box_mask(part=rng.choice([0.25, 0.5, 0.75]))))
    return path, fields


async def test_mixed_load(anyio_backend: str, settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(2)
    requests = [some_request(rng) for _ in range(REQUESTS)]
    async with running(settings.model_copy(update={"backend": "ort", "max_batch": 8})) as app:
        company = watch_ticks(app, monkeypatch)

        async def arrive(path: str, fields: dict[str, Any]) -> Any:
            await asyncio.sleep(rng.expovariate(1 / 0.01))
            return await app.post(path, **fields)

        together = await asyncio.gather(*(arrive(path, fields) for path, fields in requests))
        mixed = [kinds for kinds in company if len(set(kinds)) > 1]
        mean_rows = sum(map(len, company)) / len(company)
        print(f"{len(company)} ticks, {len(mixed)} of several endpoints, {mean_rows:.1f} rows a tick")
        assert {kind for kinds in mixed for kind in kinds} == {"Generate", "Edit", "Inpaint"}
        worst = 0
        for (path, fields), answer in zip(requests, together, strict=True):
            alone = await app.post(path, **fields)
            for index in range(fields["n"]):
                difference = pixels(answer, index).astype(int) - pixels(alone, index).astype(int)
                worst = max(worst, int(np.abs(difference).max()))
        print(f"largest difference to the images made alone: {worst} of 255")
        assert worst <= TOLERANCE


def watch_ticks(app: Running, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The kinds of the rows in each tick, as they happen."""
    company: list[list[str]] = []
    tick = app.pipeline.tick

    def watched(rows: Sequence[Row]) -> None:
        company.append([type(row.task).__name__ for row in rows])
        time.sleep(0.01)  # as a larger network would take: the tiny one is done before others arrive
        tick(rows)

    monkeypatch.setattr(app.pipeline, "tick", watched)
    return company
