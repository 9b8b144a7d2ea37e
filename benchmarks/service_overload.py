"""The service asked for ten times what it can do: who is served, when, and whether the others are told right.

Requests arrive at random, whatever became of those before them. Who is refused comes back once, after Retry-After,
where that lies within the overload: as the same request, as a client's retry is. The service is a process of its own.
"""

from __future__ import annotations

import asyncio
import math
import platform
import random
import statistics
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import click

from benchmarks.arguments import known_bundle
from benchmarks.requests import Requests, body, endpoint
from benchmarks.served import Answer, Served, serving
from engines.bundle import SHIPPED, find_bundle, read_manifest
from service.models.opening import default_threads

OVERLOAD = 10
SATURATION_REQUESTS = 60
ALONE = 15
ALONE_AGAIN = 3
SAMPLE_S = 0.5
RECOVERED_WITHIN_S = 60.0
# A lone request is served as usual when it takes no longer than this many times the median of before, and this more.
USUAL = 1.5
USUAL_MORE_S = 0.05


@dataclass
class Tally:
    """What became of requests that came for the first time, and of those that came back."""

    first: Counter[int] = field(default_factory=Counter)
    back: Counter[int] = field(default_factory=Counter)
    seconds: list[float] = field(default_factory=list)
    waits: list[float] = field(default_factory=list)
    memory: list[float] = field(default_factory=list)


@dataclass
class Overload:
    """The service under more load than it can take."""

    served: Served
    requests: Requests
    images: int
    timeout_ms: int
    tally: Tally = field(default_factory=Tally)

    async def capacity(self) -> float:
        """Requests a second that the service makes when it has enough to do."""
        start = time.perf_counter()
        answers = await asyncio.gather(*(self._ask(self._some()) for _ in range(SATURATION_REQUESTS)))
        done = sum(answer.status == 200 for answer in answers)
        return done / (time.perf_counter() - start)

    async def alone_s(self, count: int) -> float:
        """The median time of requests that come one after the other."""
        return statistics.median([await self._alone_s() for _ in range(count)])

    async def run(self, rate: float, seconds: float) -> set[asyncio.Task[None]]:
        """Poisson arrivals at ``rate`` a second. Returns the clients, of which the last still wait."""
        until = time.perf_counter() + seconds
        clients: set[asyncio.Task[None]] = set()
        watching = asyncio.create_task(self._watch_memory())
        at = time.perf_counter()
        while (at := at + self.requests.rng.expovariate(rate)) < until:
            await asyncio.sleep(max(0.0, at - time.perf_counter()))
            clients.add(asyncio.create_task(self._client(until)))
        await asyncio.sleep(max(0.0, until - time.perf_counter()))
        watching.cancel()
        return clients

    async def recovery_s(self, usual_s: float) -> float:
        """Seconds from now until lone requests take about as long as usual, several in a row; inf: they do not."""
        start = since = time.perf_counter()
        usual = 0
        while usual < ALONE_AGAIN:
            if since - start > RECOVERED_WITHIN_S:
                return math.inf
            as_usual = await self._alone_s() <= USUAL * usual_s + USUAL_MORE_S
            usual = usual + 1 if as_usual else 0
            since = since if as_usual else time.perf_counter()
        return since - start

    async def _client(self, until: float) -> None:
        request = self._some()
        answer = await self._timed(request, self.tally.first)
        if answer.status != 429:
            return
        wait_s = float(answer.headers["retry-after"])
        self.tally.waits.append(wait_s)
        if time.perf_counter() + wait_s < until:
            await asyncio.sleep(wait_s)
            await self._timed(request, self.tally.back)

    async def _timed(self, request: tuple[str, bytes], statuses: Counter[int]) -> Answer:
        start = time.perf_counter()
        answer = await self._ask(request)
        statuses[answer.status] += 1
        if answer.status != 429:
            self.tally.seconds.append(time.perf_counter() - start)
        return answer

    async def _alone_s(self) -> float:
        while True:
            start = time.perf_counter()
            answer = await self._ask(self._some())
            if answer.status == 200:
                return time.perf_counter() - start
            await asyncio.sleep(0.1)

    async def _ask(self, request: tuple[str, bytes]) -> Answer:
        return await self.served.post(*request)

    def _some(self) -> tuple[str, bytes]:
        task = self.requests.task()
        return endpoint(task), body(task, n=self.images, timeout_ms=self.timeout_ms)

    async def _watch_memory(self) -> None:
        while True:
            self.tally.memory.append(self.served.memory_mib())
            await asyncio.sleep(SAMPLE_S)


def quantile(values: list[float], part: float) -> float:
    ordered = sorted(values)
    return ordered[round(part * (len(ordered) - 1))] if ordered else float("nan")


def counts(statuses: Counter[int]) -> str:
    return ", ".join(f"{count} x {status}" for status, count in sorted(statuses.items())) or "none"


def lines(tally: Tally, timeout_ms: int) -> Iterator[str]:
    """What was seen, a line for each question."""
    kept = tally.back.total() - tally.back[429]
    late = tally.first[504] + tally.back[504]
    told = f"told {min(tally.waits):.0f} to {max(tally.waits):.0f} s" if tally.waits else "nobody was refused"
    yield f"first tries: {counts(tally.first)}; {told}"
    yield f"back after Retry-After, the overload going on: {counts(tally.back)}: {kept} of {tally.back.total()} let in"
    yield (
        f"of {len(tally.seconds)} that were let in {late} came too late (504); p50 {quantile(tally.seconds, 0.5):.2f} "
        f"s, p99 {quantile(tally.seconds, 0.99):.2f} s, time limit {timeout_ms / 1000:.0f} s"
    )
    quarters = [tally.memory[k * (len(tally.memory) - 1) // 4] for k in range(5)]
    yield f"memory of the service, MiB, in quarters: {', '.join(f'{mib:.0f}' for mib in quarters)}"


async def measure(overload: Overload, seconds: float) -> None:
    usual_s = await overload.alone_s(ALONE)
    await overload.capacity()
    capacity = await overload.capacity()
    click.echo(f"- alone {1000 * usual_s:.0f} ms; capacity {capacity:.1f} requests/s of {overload.images} images")
    clients = await overload.run(OVERLOAD * capacity, seconds)
    recovery_s = await overload.recovery_s(usual_s)
    await asyncio.gather(*clients)
    for line in lines(overload.tally, overload.timeout_ms):
        click.echo(f"- {line}")
    click.echo(f"- lone requests are served as before {recovery_s:.1f} s after the last arrival")


@contextmanager
def overloaded(bundle: str, backend: str, threads: int, images: int, timeout_ms: int) -> Iterator[Overload]:
    manifest = read_manifest(find_bundle(bundle))
    with serving(bundle, backend, threads) as served:
        yield Overload(served, Requests(manifest, random.Random(0)), images, timeout_ms)


@click.command()
@click.option("--bundle", default=SHIPPED, show_default=True, callback=known_bundle)
@click.option("--backend", default="ort", show_default=True)
@click.option("--threads", default=0, help="Of the engines; 0 (default): as many as the service takes by itself.")
@click.option("--seconds", default=60.0, show_default=True, help="How long the overload lasts.")
@click.option("--images", default=4, show_default=True, help="Of a request.")
@click.option("--timeout-ms", default=10_000, show_default=True, help="Time limit of a request.")
def main(bundle: str, backend: str, threads: int, seconds: float, images: int, timeout_ms: int) -> None:
    """Print how the service does on BUNDLE at ten times its capacity."""
    of_engines = threads or default_threads()
    click.echo(f"{platform.machine()}, {of_engines} threads, {backend}, {bundle}, {OVERLOAD} times capacity\n")
    with overloaded(bundle, backend, threads, images, timeout_ms) as overload:
        asyncio.run(measure(overload, seconds))


if __name__ == "__main__":
    main()
