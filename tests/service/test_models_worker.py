"""A worker and several bundles: what it takes, loads and waits for."""

from __future__ import annotations

import asyncio
import math
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from engines.pipeline import Pipeline
from service.jobs import Failed, Finished
from service.models.catalogue import Catalogue
from service.models.opening import open_pipeline
from service.models.registry import Models
from service.queue import leases
from service.settings import Settings
from tests.service.helpers import wait_until
from tests.service.queues import FINISHED, opened, taken
from tests.service.redis_server import RedisServer
from tests.service.several import MAX_ROWS, NAMES, SeveralBench, replace, room_for

pytestmark = pytest.mark.anyio


@pytest.fixture
def bench(models: Models) -> Iterator[SeveralBench]:
    bench = SeveralBench(models)
    yield bench
    bench.worker.stop()


async def test_a_worker_loads_what_a_job_needs(bench: SeveralBench) -> None:
    for name in NAMES:
        await bench.submit(name, bench.models.catalogue.find(name).manifest.model)
    outcomes = [await bench.outcome(name) for name in NAMES]
    assert all(isinstance(outcome, Finished) for outcome in outcomes)
    assert {state.name for state in bench.models.states() if state.loaded} == set(NAMES)


async def test_a_job_whose_bundle_does_not_load_fails_and_may_be_tried_again(bench: SeveralBench, folder: Path) -> None:
    key = bench.models.catalogue.find("amber").manifest.model
    (folder / "amber" / "step-4.onnx").write_bytes(b"")
    await bench.submit("a", key)
    outcome = await bench.outcome("a")
    assert isinstance(outcome, Failed)
    assert (outcome.reason, outcome.retryable) == ("engine", True)
    assert "step-4.onnx" in outcome.message


async def test_a_bundle_that_does_not_load_here_is_left_to_other_workers_until_its_files_change(
    models: Models, folder: Path, redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = models.catalogue.find("amber").manifest.model
    whole = (folder / "amber" / "step-4.onnx").read_bytes()
    (folder / "amber" / "step-4.onnx").write_bytes(b"")
    async with opened(redis_server.url, max_cost=1000) as queue:
        bench = SeveralBench(models, queue)
        for name in ("first", "next"):
            await bench.submit(name, key)
            while key not in models.refused() or queue.stats().depth != 1:
                await asyncio.to_thread(bench.worker.step, 0.01)
            for _ in range(3):
                await asyncio.to_thread(bench.worker.step)
            assert taken(queue, model=key) == [name]  # As another worker would.
            assert queue.settle(name, FINISHED)
        monkeypatch.setattr(leases, "PATIENCE_S", 0.1)
        await bench.submit("nobody's", key)
        outcome = await bench.outcome("nobody's")
        assert isinstance(outcome, Failed)
        assert "step-4.onnx" in outcome.message
        monkeypatch.setattr(leases, "PATIENCE_S", 60.0)
        (folder / "amber" / "step-4.onnx").write_bytes(whole)
        models._known._again = -math.inf
        await bench.submit("made", key)
        await bench.finished("made")
        bench.worker.stop()


async def test_a_job_whose_bundle_is_replaced_before_it_is_loaded_may_be_tried_again(
    bench: SeveralBench, folder: Path
) -> None:
    key = bench.models.catalogue.find("amber").manifest.model
    assert key in bench.models.takeable()
    replace(folder, "amber")
    await bench.submit("a", key)
    bench.models._known._again = math.inf  # As if all this were within a second.
    outcome = await bench.outcome("a")
    assert isinstance(outcome, Failed)
    assert (outcome.reason, outcome.retryable) == ("engine", True)
    assert f"{key} was replaced" in outcome.message


async def test_a_job_for_a_bundle_that_is_not_here_is_left_to_others(bench: SeveralBench) -> None:
    await bench.submit("a", "amber@000000000000")
    await asyncio.to_thread(bench.worker.step)
    assert bench.queue.stats().depth == 1


async def test_a_job_that_waits_for_its_bundle_is_cancelled_expires_and_is_stopped(
    several: Settings, folder: Path
) -> None:
    go = threading.Event()

    def slow(path: Path) -> Pipeline:
        assert go.wait(60)
        return open_pipeline(several, path)

    models = Models(Catalogue.of(several), slow, 2**30)
    bench = SeveralBench(models)
    key = models.catalogue.find("blue").manifest.model
    await bench.submit("late", key, seconds=0.05)
    outcome = await bench.outcome("late")
    assert isinstance(outcome, Failed)
    assert outcome.reason == "expired"
    await bench.submit("gone", key)
    await asyncio.to_thread(bench.worker.step)
    assert await bench.queue.cancel("gone") == "running"
    models.cancel_loads()
    await bench.submit("left", key)
    await asyncio.to_thread(bench.worker.step)
    bench.worker.stop()
    stopped = await bench.queue.outcome("left")
    assert isinstance(stopped, Failed)
    assert stopped.reason == "stopped"
    go.set()
    models.close()


async def test_what_is_loaded_does_not_wait_for_what_loads(several: Settings) -> None:
    go = threading.Event()

    def slow(path: Path) -> Pipeline:
        assert path.name != "blue" or go.wait(60)
        return open_pipeline(several, path)

    models = Models(Catalogue.of(several), slow, 2**30)
    bench = SeveralBench(models)
    amber, blue = (models.catalogue.find(name).manifest.model for name in ("amber", "blue"))
    many = [f"blue-{k}" for k in range(4 * MAX_ROWS)]
    try:
        models.load("amber").result(60)
        for name in many:
            await bench.submit(name, blue)
        for _ in range(4):
            await asyncio.to_thread(bench.worker.step)
        assert bench.queue.stats().depth >= len(many) - 2 * MAX_ROWS  # The others are left to other workers.
        await bench.submit("amber", amber, seconds=60)
        await bench.finished("amber")
        go.set()
        for name in many:
            await bench.finished(name)
    finally:
        go.set()
        bench.worker.stop()
        models.close()


async def test_a_bundle_does_not_wait_behind_the_queue_of_another(bench: SeveralBench) -> None:
    amber, blue = (bench.models.catalogue.find(name).manifest.model for name in ("amber", "blue"))
    for name in ("amber", "blue"):
        bench.models.load(name).result(60)
    # Its prompt is at hand from then on: the thread that encodes beside the ticks may be late.
    await bench.submit("before", blue)
    await bench.finished("before")
    many = [f"amber-{k}" for k in range(20 * MAX_ROWS)]
    for name in many:
        await bench.submit(name, amber, seconds=600)
    await bench.submit("blue", blue)
    await bench.finished("blue")
    assert bench.queue.stats().depth >= len(many) // 2
    for name in many:
        await bench.finished(name)


async def test_what_is_asked_for_without_end_leaves_its_place_to_another(several: Settings) -> None:
    models = Models(
        Catalogue.of(several), lambda path: open_pipeline(several, path), room_for(several, 1).max_model_bytes
    )
    bench = SeveralBench(models)
    amber, blue = (models.catalogue.find(name).manifest.model for name in ("amber", "blue"))
    submitted = 0
    try:
        await bench.submit("blue", blue)
        outcome = asyncio.ensure_future(bench.queue.outcome("blue"))
        until = time.monotonic() + 60
        while not outcome.done() and time.monotonic() < until:
            while bench.queue.stats().depth < 2 * MAX_ROWS:
                await bench.submit(f"amber-{submitted}", amber, seconds=600)
                submitted += 1
            await asyncio.to_thread(bench.worker.step)
        assert isinstance(await outcome, Finished)
        await bench.finished(f"amber-{submitted - 1}")
    finally:
        bench.worker.stop()
        models.close()


def test_jobs_are_taken_for_what_stays_or_has_requests_that_wait(several: Settings) -> None:
    models = Models(
        Catalogue.of(several), lambda path: open_pipeline(several, path), room_for(several, 1).max_model_bytes
    )
    amber, blue = (models.catalogue.find(name).manifest.model for name in ("amber", "blue"))
    try:
        models.load("amber").result(60)
        request, job = models.lease("amber"), models.take_on(amber)
        assert request is not None
        assert job is not None
        coming = models.load("blue")
        wait_until(lambda: any(state.retiring for state in models.states()))
        assert models.lease("amber") is None
        assert {amber, blue} <= models.takeable()
        request.release()
        assert amber not in models.takeable()
        assert blue in models.takeable()
        job.release()
        coming.result(60)
        assert {amber, blue} <= models.takeable()
    finally:
        models.close()


def test_what_was_just_loaded_stays_for_those_who_waited_for_it(several: Settings) -> None:
    seconds = [0.0]
    room = room_for(several, 1).max_model_bytes
    models = Models(Catalogue.of(several), lambda path: open_pipeline(several, path), room, clock=lambda: seconds[0])
    try:
        models.load("amber").result(60)
        coming = models.load("blue")
        with pytest.raises(TimeoutError):
            coming.result(0.2)
        lease = models.lease("amber")
        assert lease is not None
        lease.release()
        coming.result(60)
        coming = models.load("coral")
        seconds[0] += 2  # Nobody came.
        coming.result(60)
    finally:
        models.close()
