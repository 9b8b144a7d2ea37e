"""The service against the bare pipeline that it runs: mixed load, saturation, one by one.

The mixed load runs in one process, to see the rows of its ticks. Otherwise the service is a process of its own, asked
over HTTP, and the two sides take turns: both open the bundle with the same backend. Prompts are new to every request,
so that none is encoded before. The service takes in JSON and gives out JSON with PNG files.
"""

from __future__ import annotations

import asyncio
import itertools
import platform
import random
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial

import click
import httpx
import numpy as np
from fastapi import FastAPI

from benchmarks.arguments import known_bundle
from benchmarks.requests import Pixels, Requests, body, endpoint, picture
from benchmarks.served import Answer, Served, serving
from engines.backends.cores import usable_cores
from engines.bundle import SHIPPED, find_bundle
from engines.pipeline import Pipeline, Row, Task
from service.app import create_app
from service.models.opening import default_threads, lone_threads, open_pipeline
from service.runtime import State
from service.settings import Settings

TOLERANCE = 2
WAITING = 192  # at saturation: full ticks of every student, each twice
TIMEOUT_MS = 120_000  # as so many come at once, and none is to be refused
LATENCY_STEPS = 4


@dataclass
class Watched:
    """A service in this process, whose ticks are noted."""

    client: httpx.AsyncClient
    pipeline: Pipeline
    ticks: list[list[str]] = field(default_factory=list)
    refused: int = 0

    def __post_init__(self) -> None:
        tick = self.pipeline.tick

        def noted(rows: Sequence[Row]) -> None:
            tick(rows)
            self.ticks.append([type(row.task).__name__ for row in rows])

        self.pipeline.tick = noted  # type: ignore[method-assign]

    async def make(self, task: Task) -> Pixels:
        headers = {"Content-Type": "application/json"}
        while True:
            answer = await self.client.post(endpoint(task), content=body(task), headers=headers)
            if answer.status_code != 429:
                break
            self.refused += 1
            await asyncio.sleep(float(answer.headers["retry-after"]))
        if answer.status_code != 200:
            raise click.ClickException(answer.text)
        return picture(answer.content)


async def mixed(app: FastAPI, count: int, rate: float) -> str:
    """Poisson arrivals, and every image against the same made alone."""
    transport = httpx.ASGITransport(app)
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=transport, base_url="http://service", timeout=None) as client,
    ):
        while app.state.service.state is State.LOADING:
            await asyncio.sleep(0.05)
        lease = app.state.service.models.lease(None)
        watched = Watched(client, lease.pipeline)
        requests = Requests(lease.pipeline.manifest, random.Random(0))
        text = await _mixed(watched, requests, count, rate)
        lease.release()
        return text


async def _mixed(watched: Watched, requests: Requests, count: int, rate: float) -> str:
    tasks = requests.tasks(count)

    async def arrive(task: Task, at: float) -> Pixels:
        await asyncio.sleep(at)
        return await watched.make(task)

    arrivals = itertools.accumulate(requests.rng.expovariate(rate) for _ in tasks)
    images = await asyncio.gather(*(arrive(task, at) for task, at in zip(tasks, arrivals, strict=True)))
    shared = [kinds for kinds in watched.ticks if len(set(kinds)) > 1]
    ticks, mean = len(watched.ticks), statistics.mean(map(len, watched.ticks))
    worst = [apart(image, watched.pipeline.run([task])[0]) for image, task in zip(images, tasks, strict=True)]
    equal = sum(1 for each in worst if each <= TOLERANCE)
    return (
        f"mixed load, {count} requests at {rate:.1f}/s: {equal} of {count} images within {TOLERANCE} of 255 of "
        f"the same made alone (furthest {max(worst)}); {ticks} ticks of {mean:.1f} rows, "
        f"{len(shared) / ticks:.0%} of them with rows of several endpoints; {watched.refused} told to come "
        "back later"
    )


def apart(a: Pixels, b: Pixels) -> int:
    return int(np.abs(a.astype(int) - b).max())


@dataclass
class Sides:
    """The bare pipeline, and the service."""

    pipeline: Pipeline
    served: Served
    requests: Requests

    def best_rate(self, images: int) -> tuple[int, float]:
        """The size of batch at which the bare pipeline makes a mixture fastest, and its images a second there."""
        rates = {size: images / seconds_of(self.bare(images, size)) for size in self.pipeline.batch_sizes}
        best = max(rates, key=lambda size: rates[size])
        return best, rates[best]

    def bare(self, images: int, size: int) -> Callable[[], None]:
        """A mixture by the pipeline alone, in batches of ``size`` of one student."""
        by_steps: dict[int, list[Task]] = {}
        for task in self.requests.mixture(images):
            by_steps.setdefault(task.steps, []).append(task)

        def run() -> None:
            for tasks in by_steps.values():
                for start in range(0, len(tasks), size):
                    self.pipeline.run(tasks[start : start + size])

        return run

    def saturated(self, images: int) -> float:
        """Seconds in which the service makes as many, of which `WAITING` others are there before, meanwhile and after.

        Each of so many clients asks again as soon as it is answered.
        """
        tasks = self.requests.mixture(images + 2 * WAITING)
        self.requests.rng.shuffle(tasks)
        bodies = iter([(endpoint(task), body(task, timeout_ms=TIMEOUT_MS)) for task in tasks])
        made: list[float] = []

        async def ask_again() -> None:
            for path, text in bodies:
                await self.served.made(path, text)
                made.append(time.perf_counter())

        async def ask() -> None:
            await asyncio.gather(*(ask_again() for _ in range(WAITING)))

        asyncio.run(ask())
        return made[WAITING + images - 1] - made[WAITING - 1]


def saturation(sides: Sides, images: int, rounds: int) -> tuple[str, float]:
    sides.saturated(images)
    size, rate = sides.best_rate(images)
    alone, served = [], []
    alone_cpu_s = served_cpu_s = 0.0
    for _ in range(rounds):
        before = time.process_time()
        alone.append(seconds_of(sides.bare(images, size)))
        between, theirs = time.process_time(), sides.served.cpu_s()
        served.append(sides.saturated(images))
        alone_cpu_s += between - before
        served_cpu_s += time.process_time() - between + sides.served.cpu_s() - theirs
    ratios = [a / b for a, b in zip(alone, served, strict=True)]
    alone_ms = 1000 * alone_cpu_s / (rounds * images)
    served_ms = 1000 * served_cpu_s / (rounds * (images + 2 * WAITING))
    text = (
        f"saturation, {rounds} rounds of {images} images in turn: "
        f"{statistics.median(alone) / statistics.median(served):.3f} of the bare pipeline's throughput at its best "
        f"batch, {size} ({rate:.1f} images/s); pair by pair {min(ratios):.3f} to {max(ratios):.3f}; an image takes "
        f"{alone_ms:.1f} ms of processor time, {served_ms:.1f} with the service and its clients"
    )
    return text, rate


def one_at_a_time(sides: Sides, repeats: int) -> str:
    """Requests of 4 steps, each when the one before it is answered, in pairs: by the bare pipeline, then served.

    The bare pipeline makes what is as long and as new. Both find caches that the other side has filled.
    """
    theirs, ours = [], []
    cpu_s = sides.served.cpu_s()
    with sides.served.one_by_one() as post:
        for task in sides.requests.tasks(repeats, LATENCY_STEPS):
            alone = replace(task, condition=task.condition.replace("a ", "the ", 1))
            theirs.append(seconds_of(partial(sides.pipeline.run, [alone])))
            ours.append(seconds_of(partial(ask, post, endpoint(task), body(task))))
    cpu_ms = 1000 * (sides.served.cpu_s() - cpu_s) / repeats
    bare_ms, served_ms = (1000 * statistics.median(side) for side in (theirs, ours))
    between_ms = 1000 * statistics.median(b - a for a, b in zip(theirs, ours, strict=True))
    return (
        f"one at a time, {repeats} pairs of {LATENCY_STEPS} steps: p50 {served_ms:.1f} ms, bare pipeline "
        f"{bare_ms:.1f} ms; {served_ms - bare_ms:+.1f} ms, pair by pair {between_ms:+.1f} ms, where 3 ms + 5% is "
        f"{3 + 0.05 * bare_ms:.1f} ms ({cpu_ms:.0f} ms of processor time a request)"
    )


def ask(post: Callable[[str, bytes], Answer], path: str, text: bytes) -> None:
    answer = post(path, text)
    if answer.status != 200:
        raise click.ClickException(answer.body.decode())


def seconds_of(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


@click.command()
@click.option("--bundle", default=SHIPPED, show_default=True, callback=known_bundle)
@click.option("--backend", default="ort", show_default=True)
@click.option("--threads", default=0, help="Of the service's engines; 0 (default): as many as it takes by itself.")
@click.option("--bare-threads", default=0, help="Of the bare pipeline; 0 (default): every core it may use.")
@click.option("--bare-first", is_flag=True, help="Open the bare pipeline before the service, not after it.")
@click.option("--requests", default=100, show_default=True, help="Of the mixed load.")
@click.option("--images", default=384, show_default=True, help="Of a round at saturation.")
@click.option("--rounds", default=5, show_default=True)
@click.option("--repeats", default=60, show_default=True, help="Of one at a time.")
def main(
    bundle: str,
    backend: str,
    threads: int,
    bare_threads: int,
    bare_first: bool,
    requests: int,
    images: int,
    rounds: int,
    repeats: int,
) -> None:
    """Print how the service does on BUNDLE under three loads."""
    bare_threads = bare_threads or usable_cores()
    of_service = threads or f"{default_threads()}, for a row that is alone {lone_threads(Settings()) or 'as many'}"
    click.echo(f"{platform.machine()}, threads: {of_service}; bare pipeline {bare_threads}; {backend}, {bundle}\n")
    settings = Settings(bundle=bundle, backend=backend, threads=threads)
    bare = settings.model_copy(update={"threads": bare_threads})
    with ExitStack() as opened:
        pipeline = opened.enter_context(open_pipeline(bare, find_bundle(bundle))) if bare_first else None
        served = opened.enter_context(serving(bundle, backend, threads))
        pipeline = pipeline or opened.enter_context(open_pipeline(bare, find_bundle(bundle)))
        sides = Sides(pipeline, served, Requests(pipeline.manifest, random.Random(0)))
        throughput, rate = saturation(sides, images, rounds)
        click.echo(f"- {throughput}")
        click.echo(f"- {one_at_a_time(sides, repeats)}")
    click.echo(f"- {asyncio.run(mixed(create_app(settings), requests, 0.7 * rate))}")


if __name__ == "__main__":
    main()
