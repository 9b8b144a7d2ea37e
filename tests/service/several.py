"""What the tests of several bundles share: bundles that are all alike, and a worker that the test steps."""

from __future__ import annotations

import asyncio
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np

from engines.pipeline import Generate
from service.batching.scheduler import Scheduler
from service.batching.worker import Worker
from service.jobs import Finished, Job, Outcome, Output
from service.models.catalogue import Catalogue
from service.models.registry import Models
from service.queue.base import JobQueue
from service.queue.memory import MemoryQueue
from service.settings import Settings
from service.telemetry.metrics import Metrics
from tests.bundles import make_tiny_bundle
from tests.service.helpers import SIZE, Running, pixels

NAMES = ("amber", "blue", "coral")
MAX_ROWS = 4


def room_for(settings: Settings, count: int) -> Settings:
    """Room for that many of the bundles, which are all alike."""
    entry = Catalogue.of(settings).find("amber")
    return settings.model_copy(update={"max_model_bytes": int(entry.memory_bytes * (count + 0.5))})


async def loaded(app: Running) -> set[str]:
    listed = (await app.client.get("/models")).json()["models"]
    return {model["name"] for model in listed if model["loaded"]}


async def generate(app: Running, model: str | None, **fields: Any) -> np.ndarray[Any, Any]:
    answer = await app.post("/generate", prompt="a red heart", seed=3, model=model, **fields)
    assert answer.status_code == 200, answer.text
    assert model is None or answer.json()["model"] == model
    return pixels(answer)


def replace(folder: Path, name: str, steps: tuple[int, ...] = (1, 4, 8)) -> str:
    """Put another revision of the bundle into its place. Returns its key."""
    shutil.rmtree(folder / name)
    made = make_tiny_bundle(folder.parent / f"newer-{time.monotonic_ns()}", size=SIZE, name=name, steps=steps)
    made.path.rename(folder / name)
    return made.manifest.model


def damage(folder: Path) -> None:
    """Change a byte of a graph, and put the length right."""
    graph = folder / "step-4.onnx"
    content = bytearray(graph.read_bytes())
    content[40] ^= 1
    graph.write_bytes(content)


class SeveralBench:
    """A worker that the test steps, with jobs from elsewhere: nobody holds their bundles."""

    def __init__(self, models: Models, queue: JobQueue | None = None) -> None:
        self.queue = queue or MemoryQueue(1000)
        self.models = models
        self.worker = Worker(models, self.queue, Scheduler(MAX_ROWS), Metrics())

    async def submit(self, name: str, model: str, seconds: float = 30.0) -> None:
        now = time.monotonic()
        task = Generate("a red heart", 4, 2.0, 3)
        await self.queue.submit(Job(name, name, (task,), Output("png"), now, now + seconds, model))

    async def outcome(self, name: str) -> Outcome:
        outcome = asyncio.ensure_future(self.queue.outcome(name))
        async with asyncio.timeout(60):
            while not outcome.done():
                await asyncio.to_thread(self.worker.step, 0.01)
                await asyncio.sleep(0)
        return await outcome

    async def finished(self, name: str) -> Finished:
        outcome = await self.outcome(name)
        assert isinstance(outcome, Finished), outcome
        return outcome
