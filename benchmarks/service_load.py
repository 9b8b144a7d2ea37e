"""The whole service, in process, against the bare pipeline it runs: mixed load, saturation, one by one, overload.

Both sides run the same pipeline, in turn. Prompts are new to every request, so that none is encoded before. The
service's side takes in JSON and gives out JSON with PNG files, all in one process with the client.
"""

from __future__ import annotations

import asyncio
import base64
import io
import itertools
import os
import platform
import random
import statistics
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import click
import httpx
import numpy as np
from fastapi import FastAPI
from numpy.typing import NDArray
from PIL import Image

from engines.bundle import SHIPPED
from engines.pipeline import Edit, Generate, Inpaint, Pipeline, Row, Task
from service.app import create_app
from service.runtime import State
from service.settings import Settings

Pixels = NDArray[np.uint8]

TOLERANCE = 2
NOUNS = ("apple", "cat", "house", "car", "tree", "star", "fish", "cup")
COLOURS = ("red", "green", "blue", "yellow", "black", "white")
OVERLOAD = 10
IMAGES_A_REQUEST = 4
OVERLOAD_TIMEOUT_MS = 10_000


@dataclass
class Load:
    """Requests at random, each with a prompt that no other has, as tasks and as the bodies of the API."""

    pipeline: Pipeline
    rng: random.Random
    numbers: itertools.count[int] = field(default_factory=itertools.count)

    def tasks(self, count: int, steps: int | None = None) -> list[Task]:
        return [self.task(steps) for _ in range(count)]

    def task(self, steps: int | None = None) -> Task:
        manifest = self.pipeline.manifest
        rng, guidance = self.rng, manifest.guidance
        prompt = f"a {rng.choice(COLOURS)} {rng.choice(NOUNS)} {next(self.numbers)}"
        steps = steps or rng.choice([student.steps for student in manifest.students])
        # guidance_scale is 1 + w: two decimals of either come back exactly enough.
        w = round(rng.uniform(guidance.minimum, guidance.maximum), 2)
        generate = Generate(prompt, steps, w, rng.randrange(2**32))
        kind = rng.choice((Generate, Edit, Inpaint))
        if kind is Generate:
            return generate
        _, height, width = manifest.image_shape
        image = np.frombuffer(rng.randbytes(height * width * 3), np.uint8).reshape(height, width, 3)
        shared = (prompt, steps, w, generate.seed, image)
        if kind is Edit:
            return Edit(*shared, 0.5 if steps > 1 else 1.0)
        repaint = np.zeros((height, width), bool)
        repaint[: height // 2] = True
        return Inpaint(*shared, repaint, 1.0)


def endpoint(task: Task) -> str:
    return f"/{type(task).__name__.lower()}"


def body(task: Task) -> dict[str, Any]:
    fields: dict[str, Any] = {"prompt": task.condition, "steps": task.steps, "seed": task.seed}
    fields["guidance_scale"] = 1 + task.guidance
    if isinstance(task, Edit | Inpaint):
        fields |= {"image": base64_png(task.image), "strength": task.strength}
    if isinstance(task, Inpaint):
        fields["mask"] = base64_png(task.repaint.astype(np.uint8) * 255)
    return fields


def base64_png(array: Pixels) -> str:
    file = io.BytesIO()
    Image.fromarray(array).save(file, "png")
    return base64.b64encode(file.getvalue()).decode()


def made(answer: httpx.Response) -> dict[str, Any]:
    if answer.status_code != 200:
        raise click.ClickException(answer.text)
    found: dict[str, Any] = answer.json()
    return found


def picture(answer: httpx.Response) -> Pixels:
    return first_image(made(answer))


def first_image(document: Mapping[str, Any]) -> Pixels:
    """The first image of an answer in JSON."""
    data = base64.b64decode(document["images"][0]["b64_json"])
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


@dataclass
class Served:
    """The service and its client; the rows of its ticks are noted while ``ticks`` is a list."""

    client: httpx.AsyncClient
    pipeline: Pipeline
    ticks: list[list[str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        tick = self.pipeline.tick

        def noted(rows: Sequence[Row]) -> None:
            tick(rows)
            self.ticks.append([type(row.task).__name__ for row in rows])

        self.pipeline.tick = noted  # type: ignore[method-assign]

    async def make(self, task: Task, **more: Any) -> httpx.Response:
        return await self.client.post(endpoint(task), json=body(task) | more)


async def mixed(served: Served, load: Load, requests: int, rate: float) -> str:
    """Poisson arrivals at a part of what the pipeline can do; every image against the same made alone."""
    tasks = load.tasks(requests)
    served.ticks.clear()

    async def arrive(task: Task, at: float) -> Pixels:
        await asyncio.sleep(at)
        return picture(await served.make(task))

    arrivals = itertools.accumulate(load.rng.expovariate(rate) for _ in tasks)
    images = await asyncio.gather(*(arrive(task, at) for task, at in zip(tasks, arrivals, strict=True)))
    shared = [kinds for kinds in served.ticks if len(set(kinds)) > 1]
    ticks, mean = len(served.ticks), statistics.mean(map(len, served.ticks))
    worst = [apart(image, served.pipeline.run([task])[0]) for image, task in zip(images, tasks, strict=True)]
    equal = sum(1 for each in worst if each <= TOLERANCE)
    return (
        f"mixed load, {requests} requests at {rate:.1f}/s: {equal} of {requests} images within {TOLERANCE} of 255 of "
        f"the same made alone (furthest {max(worst)}); {ticks} ticks of {mean:.1f} rows, "
        f"{len(shared) / ticks:.0%} of them with rows of several endpoints"
    )


def apart(a: Pixels, b: Pixels) -> int:
    return int(np.abs(a.astype(int) - b).max())


def bare_rate(load: Load, images: int) -> tuple[int, float]:
    """The size of batch at which the bare pipeline makes a mixture fastest, and its images a second there."""
    rates = {size: images / seconds_of(partial(bare, load, images, size)) for size in load.pipeline.batch_sizes}
    best = max(rates, key=lambda size: rates[size])
    return best, rates[best]


def bare(load: Load, images: int, size: int) -> None:
    """As many images of each student, by the pipeline alone, in batches of ``size`` of one student."""
    students = [student.steps for student in load.pipeline.manifest.students]
    for steps in students:
        for start in range(0, images // len(students), size):
            load.pipeline.run(load.tasks(min(size, images // len(students) - start), steps))


async def saturated(served: Served, load: Load, images: int) -> None:
    """The same from the service: all at once, so that it always has enough to do."""
    students = [student.steps for student in load.pipeline.manifest.students]
    tasks = [task for steps in students for task in load.tasks(images // len(students), steps)]
    load.rng.shuffle(tasks)
    for answer in await asyncio.gather(*(served.make(task) for task in tasks)):
        made(answer)


async def saturation(served: Served, load: Load, images: int, rounds: int) -> tuple[str, float]:
    size, rate = await asyncio.to_thread(bare_rate, load, images)
    ratios: list[float] = []
    for _ in range(rounds):
        served.ticks.clear()
        alone = await asyncio.to_thread(seconds_of, partial(bare, load, images, size))
        served.ticks.clear()
        ratios.append(alone / await seconds(saturated(served, load, images)))
    mean = statistics.mean(map(len, served.ticks))
    spread = f"{statistics.median(ratios):.3f} (from {min(ratios):.3f} to {max(ratios):.3f})"
    text = (
        f"saturation, {images} images: {spread} of the bare pipeline's throughput at its best batch, "
        f"{size} ({rate:.1f} images/s); ticks of {mean:.1f} rows"
    )
    return text, rate


async def one_at_a_time(served: Served, load: Load, repeats: int) -> str:
    theirs: list[float] = []
    ours: list[float] = []
    for _ in range(repeats):
        task = load.task(4)
        alone = replace(task, condition=task.condition.replace("a ", "the ", 1))  # as long, and as new
        theirs.append(await asyncio.to_thread(seconds_of, partial(served.pipeline.run, [alone])))
        ours.append(await seconds(served.make(task)))
    bare_ms, served_ms = (1000 * statistics.median(side) for side in (theirs, ours))
    return (
        f"one at a time, {repeats} requests of 4 steps: p50 {served_ms:.1f} ms, bare pipeline {bare_ms:.1f} ms; "
        f"{served_ms - bare_ms:+.1f} ms where 3 ms + 5% is {3 + 0.05 * bare_ms:.1f} ms"
    )


@dataclass
class Tally:
    """What became of the requests of an overload."""

    statuses: Counter[int] = field(default_factory=Counter)
    seconds: list[float] = field(default_factory=list)
    retried: int = 0
    retried_accepted: int = 0
    last_refused: tuple[float, float] = (0.0, 0.0)


async def overload(served: Served, load: Load, rate: float, seconds_long: float) -> str:
    """Poisson arrivals at ten times what the pipeline can do; who is refused comes back once, when told to."""
    tally, before = Tally(), memory_mib()
    started: set[asyncio.Task[None]] = set()
    until = time.perf_counter() + seconds_long
    while time.perf_counter() < until:
        started.add(asyncio.create_task(_one_of_many(served, load.task(), tally)))
        await asyncio.sleep(load.rng.expovariate(OVERLOAD * rate / IMAGES_A_REQUEST))
    peak = memory_mib()
    refused_at, retry_after_s = tally.last_refused
    await asyncio.sleep(max(0.0, refused_at + retry_after_s - time.perf_counter()))
    probe = await _post_many(served, load.task())
    await asyncio.gather(*started)
    quantiles = sorted(tally.seconds)
    p99 = quantiles[int(0.99 * (len(quantiles) - 1))] if quantiles else float("nan")
    counts = ", ".join(f"{count} x {status}" for status, count in sorted(tally.statuses.items()))
    return (
        f"overload, {OVERLOAD} times capacity for {seconds_long:.0f} s, {IMAGES_A_REQUEST} images a request, "
        f"time limit {OVERLOAD_TIMEOUT_MS / 1000:.0f} s: {counts}; p99 of those made {p99:.2f} s, "
        f"memory {peak - before:+.0f} MiB\n"
        f"- of {tally.retried} who came back after Retry-After, the overload going on, {tally.retried_accepted} were "
        f"taken; one who came {retry_after_s:.0f} s after the last refusal, the overload being over, got "
        f"{probe.status_code}"
    )


async def _one_of_many(served: Served, task: Task, tally: Tally) -> None:
    start = time.perf_counter()
    answer = await _post_many(served, task)
    tally.statuses[answer.status_code] += 1
    if answer.status_code == 200:
        tally.seconds.append(time.perf_counter() - start)
    elif answer.status_code == 429:
        wait_s = float(answer.headers["retry-after"])
        tally.last_refused = time.perf_counter(), wait_s
        if task.seed % 20 == 0:  # a few: all of them would be another overload
            await asyncio.sleep(wait_s)
            tally.retried += 1
            tally.retried_accepted += (await _post_many(served, task)).status_code != 429


async def _post_many(served: Served, task: Task) -> httpx.Response:
    return await served.make(task, n=IMAGES_A_REQUEST, timeout_ms=OVERLOAD_TIMEOUT_MS)


def seconds_of(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


async def seconds(awaited: Awaitable[object]) -> float:
    start = time.perf_counter()
    await awaited
    return time.perf_counter() - start


def memory_mib() -> float:
    """What the process has in memory now."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


async def measure(app: FastAPI, requests: int, images: int, rounds: int, repeats: int, overload_s: float) -> None:
    transport = httpx.ASGITransport(app)
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=transport, base_url="http://service", timeout=None) as client,
    ):
        while app.state.service.state is State.LOADING:
            await asyncio.sleep(0.05)
        lease = app.state.service.models.lease(None)
        served, load = Served(client, lease.pipeline), Load(lease.pipeline, random.Random(0))
        await saturated(served, load, images)
        throughput, rate = await saturation(served, load, images, rounds)
        click.echo(f"- {await mixed(served, load, requests, 0.7 * rate)}")
        click.echo(f"- {throughput}")
        click.echo(f"- {await one_at_a_time(served, load, repeats)}")
        click.echo(f"- {await overload(served, load, rate, overload_s)}")
        lease.release()


@click.command()
@click.option("--bundle", default=SHIPPED, show_default=True)
@click.option("--backend", default="ort", show_default=True)
@click.option("--threads", default=2, show_default=True, help="Threads of the engines, on both sides.")
@click.option("--requests", default=100, show_default=True, help="Of the mixed load.")
@click.option("--images", default=96, show_default=True, help="Of a round at saturation.")
@click.option("--rounds", default=3, show_default=True)
@click.option("--repeats", default=40, show_default=True, help="Of one at a time.")
@click.option("--overload-s", default=30.0, show_default=True)
def main(
    bundle: str, backend: str, threads: int, requests: int, images: int, rounds: int, repeats: int, overload_s: float
) -> None:
    """Print how the service does on BUNDLE under four loads."""
    click.echo(f"{platform.machine()}, {threads} threads, {backend}, {bundle}\n")
    # Every request of a round must be let in.
    settings = Settings(bundle=bundle, backend=backend, threads=threads, max_inflight=max(256, images))
    asyncio.run(measure(create_app(settings), requests, images, rounds, repeats, overload_s))


if __name__ == "__main__":
    main()
