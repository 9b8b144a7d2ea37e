"""The faults, one by one: how each comes over a fleet under load, and goes."""

from __future__ import annotations

import asyncio
import random
import signal
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass

from benchmarks.faults.clock import why_no_clock
from benchmarks.faults.crowd import Crowd, Kind
from benchmarks.faults.fleet import Fleet, Layout, Role
from benchmarks.faults.slow import SlowPost
from benchmarks.hosts import why_no_hosts
from benchmarks.requests import Requests, endpoint, fields_of
from engines.pipeline import Generate
from tests.service.slow_service import DEADLY

HOUR_S = 3600
CUT_S = 8.0
AWAY_S = 3.0
SLOW_S = 3.0
GONE_AFTER_S = 0.15
_SETTLE_S = 2.0
_GONE = 20
PLAIN = Layout()


@dataclass(frozen=True, slots=True)
class Scene:
    """What a fault comes over."""

    fleet: Fleet
    crowd: Crowd
    requests: Requests
    rng: random.Random


@dataclass(frozen=True, slots=True)
class Fault:
    """``strike`` lets it come and go, and tells what it did. ``missing`` says why it cannot be had here.

    Where Redis is ``forgetful`` by it, what was accepted may fail as known no longer; otherwise that is a loss.
    """

    title: str
    strike: Callable[[Scene], Awaitable[str]]
    layout: Layout = PLAIN
    forgetful: bool = False
    missing: Callable[[], str | None] = lambda: None


async def nothing(scene: Scene) -> str:
    return ""


async def kill_workers(scene: Scene) -> str:
    """Each time while it has jobs that it has not settled."""
    places = (0, 1, 0)
    for place in places:
        await scene.fleet.until_working(place)
        await scene.fleet.replace("worker", place, signal.SIGKILL)
    return f"{len(places)} workers killed while they held jobs"


async def kill_redis(scene: Scene) -> str:
    """While a worker has jobs that it has not settled."""
    await scene.fleet.until_working(0)
    scene.fleet.redis.stop()
    await asyncio.sleep(AWAY_S)
    await asyncio.to_thread(scene.fleet.redis.start)
    return f"away for {AWAY_S:.0f} s"


async def kill_apis(scene: Scene) -> str:
    for place in (0, 1):
        await scene.fleet.replace("api", place, signal.SIGKILL)
    return "both API processes killed, one after the other"


async def cut_cable(scene: Scene) -> str:
    """Of one worker, for longer than its jobs are left to it."""
    assert scene.fleet.host is not None
    await scene.fleet.until_working(0)
    scene.fleet.host.cut()
    await asyncio.sleep(CUT_S)
    scene.fleet.host.heal()
    return f"one of two workers cut off for {CUT_S:.0f} s"


async def shut_door(scene: Scene) -> str:
    assert scene.fleet.door is not None
    scene.fleet.door.shut()
    await asyncio.sleep(CUT_S)
    scene.fleet.door.open()
    return f"both workers cut off for {CUT_S:.0f} s"


async def poison(scene: Scene) -> str:
    """A request of which every worker dies in the middle of a tick."""
    record = scene.crowd.send(Generate(DEADLY, 4, 0.0, 0), Kind.PLAIN)
    died = 0
    while record.last is None:
        died += scene.fleet.revive_workers()
        await asyncio.sleep(0.1)
    return f"{died} workers died of it; its client got {record.last.code or record.last.fate}"


async def slow_clients(scene: Scene) -> str:
    """Some send their bodies slowly, some stop half way, some read their answers late."""
    ways = (SlowPost(over_s=SLOW_S), SlowPost(sent=0.5), SlowPost(read_after_s=SLOW_S))
    each = 5
    for way in each * ways:
        scene.crowd.send(scene.requests.task(), Kind.PLAIN, way)
    return f"{each} clients send for {SLOW_S:.0f} s, {each} stop half way, {each} read {SLOW_S:.0f} s late"


async def gone_clients(scene: Scene) -> str:
    """They ask, and close the connection before they have an answer."""

    async def ask_and_go() -> None:
        task = scene.requests.task(4)
        try:
            async with asyncio.timeout(GONE_AFTER_S):
                await scene.crowd.http.post(f"{scene.crowd.url()}{endpoint(task)}", json=fields_of(task))
        except TimeoutError:
            pass

    async with asyncio.TaskGroup() as coming:
        for _ in range(_GONE):
            coming.create_task(ask_and_go())
            await asyncio.sleep(scene.rng.uniform(0, 0.1))
    await asyncio.sleep(_SETTLE_S)
    stages = [rf'fewstep_cancelled_total\{{stage="{stage}"\}}' for stage in ("queued", "running")]
    cancelled = sum([await scene.fleet.total("api", stage) for stage in stages])
    return f"{_GONE} clients came and went besides; {cancelled} of their jobs were cancelled"


async def terminate(scene: Scene) -> str:
    roles: tuple[Role, ...] = ("worker", "api")
    for place in (0, 1):
        for role in roles:
            await scene.fleet.replace(role, place, signal.SIGTERM)
    return "both workers and both API processes stopped and replaced, one after the other"


async def step_clock(scene: Scene) -> str:
    """An hour ahead, then an hour behind, then right again."""
    assert scene.fleet.clock is not None
    for ahead_s in (HOUR_S, -HOUR_S, 0):
        await scene.fleet.until_working(0)
        scene.fleet.clock.step(ahead_s)
        await asyncio.sleep(_SETTLE_S)
    return "+1 h, -2 h, +1 h"


FAULTS: Mapping[str, Fault] = {
    "none": Fault("none", nothing),
    "worker-killed": Fault("kill -9 of workers in mid-tick", kill_workers),
    "redis-killed": Fault("kill -9 of Redis, with an append-only file", kill_redis),
    "redis-forgets": Fault(
        "kill -9 of Redis, without persistence", kill_redis, Layout(persistent=False), forgetful=True
    ),
    "api-killed": Fault("kill -9 of API processes", kill_apis),
    "cable-cut": Fault(
        "network cut between a worker's host and Redis", cut_cable, Layout(way="cable"), False, why_no_hosts
    ),
    "silence": Fault("silence between all workers and Redis", shut_door, Layout(way="door")),
    "poison": Fault("a poison request", poison),
    "slow-clients": Fault("slow clients", slow_clients),
    "gone-clients": Fault("clients gone", gone_clients),
    "sigterm": Fault("SIGTERM of workers and API processes", terminate),
    "worker-clock": Fault("the workers' clocks jump", step_clock, Layout(clock="worker"), False, why_no_clock),
    "api-clock": Fault("the API's clocks jump", step_clock, Layout(clock="api"), False, why_no_clock),
    "redis-clock": Fault("Redis's clock jumps", step_clock, Layout(clock="redis"), True, why_no_clock),
}
