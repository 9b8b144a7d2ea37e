"""A worker whose steps a test takes itself, on a real pipeline with the fake backend."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import numpy as np

from engines.pipeline import Generate, Pipeline, Task
from service.batching.scheduler import Scheduler
from service.batching.worker import Worker
from service.jobs import Failed, Finished, Job, Outcome, Output, Priority
from service.models.catalogue import Catalogue
from service.models.registry import Models
from service.queue.memory import MemoryQueue
from service.telemetry.metrics import Metrics

MAX_ROWS = 4


class Bench:
    """A worker whose steps the test takes itself."""

    def __init__(self, pipeline: Pipeline) -> None:
        self.pipeline = pipeline
        self.metrics = Metrics()
        self.model = pipeline.manifest.model
        self.queue = MemoryQueue(1000)
        self.models = Models(Catalogue(str(pipeline.bundle.path), None), lambda path: pipeline, 2**30)
        self.models.load(None).result(60)
        self.worker = Worker(self.models, self.queue, Scheduler(MAX_ROWS), self.metrics)
        self.ticks: list[list[str]] = []

    async def submit(
        self, name: str, *tasks: Task, seconds: float = 60.0, priority: Priority = Priority.NORMAL, age_s: float = 0.0
    ) -> None:
        now = time.monotonic()
        times = (now - age_s, now + seconds)
        await self.queue.submit(Job(name, name, tasks, Output("png"), *times, self.model, priority=priority))

    async def outcome(self, name: str) -> Outcome:
        return await asyncio.wait_for(self.queue.outcome(name), 60)

    async def finished(self, name: str) -> Finished:
        outcome = await self.outcome(name)
        assert isinstance(outcome, Finished), outcome
        return outcome

    async def failed(self, name: str) -> Failed:
        outcome = await self.outcome(name)
        assert isinstance(outcome, Failed), outcome
        return outcome

    def steps(self, count: int) -> None:
        for _ in range(count):
            self.worker.step()

    def count(self, name: str, **labels: str) -> float:
        return self.metrics.registry.get_sample_value(name, labels) or 0.0


def task(seed: int = 0, steps: int = 4, prompt: str = "a cat") -> Generate:
    return Generate(prompt, steps, 1.0, seed)


def alone(bench: Bench, *tasks: Task) -> list[np.ndarray[Any, Any]]:
    return [image for one in tasks for image in bench.pipeline.run([one])]
