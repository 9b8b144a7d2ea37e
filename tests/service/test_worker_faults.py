"""The worker's loop where rows, engines, the device or the loop itself fail."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from engines.backends.base import DeviceLostError, DeviceMemoryError, EngineError
from engines.pipeline import Row, Task
from tests.service.bench import MAX_ROWS, Bench, task
from tests.service.helpers import until

pytestmark = pytest.mark.anyio


def sabotage(monkeypatch: pytest.MonkeyPatch, bench: Bench, method: str, bad: Callable[[Any], bool]) -> None:
    """Make a method of the pipeline fail for every batch that holds a bad item."""
    original = getattr(bench.pipeline, method)

    def failing(items: Sequence[Any]) -> Any:
        if any(bad(item) for item in items):
            raise EngineError("sabotage")
        return original(items)

    monkeypatch.setattr(bench.pipeline, method, failing)


def is_bad(item: Task | Row) -> bool:
    return (item.task if isinstance(item, Row) else item).condition == "the moon"


@pytest.mark.parametrize("method", ["prepare", "tick", "finish"])
async def test_a_bad_row_fails_alone(bench: Bench, monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    sabotage(monkeypatch, bench, method, is_bad)
    tasks = {name: task(seed, steps=1) for seed, name in enumerate("abc")}
    for name, one in tasks.items():
        await bench.submit(name, one)
    await bench.submit("bad", task(9, steps=1, prompt="the moon"))
    bench.steps(1)
    failed = await bench.failed("bad")
    assert (failed.reason, failed.retryable) == ("engine", False)
    for name in tasks:
        await bench.finished(name)
    assert bench.count("fewstep_batch_failures_total", cause="EngineError") >= 3


@pytest.mark.parametrize("method", ["prepare", "tick", "finish"])
async def test_an_engine_that_fails_on_everything_makes_failures_retryable_and_the_worker_lives(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    with monkeypatch.context() as broken:
        sabotage(broken, bench, method, lambda _: True)
        await bench.submit("a", task(1, steps=1))
        await bench.submit("b", task(2, steps=1))
        bench.steps(1)
        assert (await bench.failed("a")).retryable
        assert (await bench.failed("b")).retryable
    await bench.submit("c", task(3, steps=1))
    bench.steps(1)
    await bench.finished("c")


async def test_one_bad_image_fails_its_job_and_frees_its_rows(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    sabotage(monkeypatch, bench, "tick", lambda row: row.task.seed == 2)
    await bench.submit("mixed", task(1), task(2), task(3))
    await bench.submit("other", task(4))
    bench.steps(4)
    assert (await bench.failed("mixed")).reason == "engine"
    assert (await bench.finished("other")).ticks[1:] == (1, 1, 1)


async def test_a_job_that_fails_while_it_is_decoded_leaves_its_other_images_undone(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    sabotage(monkeypatch, bench, "finish", lambda row: row.task.seed == 0)
    await bench.submit("large", *(task(seed, steps=1) for seed in range(MAX_ROWS + 2)))
    bench.steps(1)
    assert (await bench.failed("large")).reason == "engine"
    await bench.submit("other", task(9, steps=2))
    bench.steps(2)
    assert (await bench.finished("other")).ticks == (1, 1)
    assert bench.count("fewstep_tick_rows_count") == 3


async def test_what_the_bundle_cannot_honour_is_the_clients_error(bench: Bench) -> None:
    await bench.submit("a", task(1, steps=3))
    bench.steps(1)
    failed = await bench.failed("a")
    assert (failed.reason, failed.code, failed.param) == ("invalid", "unsupported_steps", "steps")


async def test_a_fault_in_the_loop_fails_what_is_held_and_the_thread_goes_on(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing = threading.Event()
    failing.set()
    original = bench.queue.cancelled

    def cancelled(job_ids: Any) -> set[str]:
        held = list(job_ids)
        if held and failing.is_set():
            failing.clear()
            raise RuntimeError("the queue is broken")
        return original(held)

    monkeypatch.setattr(bench.queue, "cancelled", cancelled)
    bench.worker.start()
    await bench.submit("a", task(1))
    assert (await bench.failed("a")).retryable
    await bench.submit("b", task(2))
    await bench.finished("b")
    assert bench.worker.alive
    assert bench.count("fewstep_worker_up") == 1


async def test_too_many_rows_for_the_memory_run_in_smaller_ticks_from_then_on(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    tick = bench.pipeline.tick

    def small(rows: Sequence[Row]) -> None:
        if len(rows) > 2:
            raise DeviceMemoryError("out of memory")
        tick(rows)

    monkeypatch.setattr(bench.pipeline, "tick", small)
    for k in range(MAX_ROWS):
        await bench.submit(f"{k}", task(k, steps=2))
    bench.steps(4)
    for k in range(MAX_ROWS):
        assert set((await bench.finished(f"{k}")).ticks) == {2}
    assert bench.count("fewstep_batch_failures_total", cause="DeviceMemoryError") == 1


@pytest.mark.parametrize("method", ["prepare", "finish"])
async def test_too_many_images_for_the_memory_are_coded_in_smaller_batches_from_then_on(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    original = getattr(bench.pipeline, method)
    sizes: list[int] = []

    def small(items: Sequence[Any]) -> Any:
        sizes.append(len(items))
        if len(items) > 2:
            raise DeviceMemoryError("out of memory")
        return original(items)

    monkeypatch.setattr(bench.pipeline, method, small)
    for name in "ab":
        await bench.submit(name, *(task(seed, steps=1) for seed in range(MAX_ROWS)))
        bench.steps(1)
        assert len((await bench.finished(name)).images) == MAX_ROWS
    assert sizes == [4, 2, 2, 2, 2]
    assert bench.count("fewstep_batch_failures_total", cause="DeviceMemoryError") == 1


async def test_a_single_row_that_does_not_fit_fails_alone(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    tick = bench.pipeline.tick

    def small(rows: Sequence[Row]) -> None:
        if any(is_bad(row) for row in rows):
            raise DeviceMemoryError("out of memory")
        tick(rows)

    monkeypatch.setattr(bench.pipeline, "tick", small)
    await bench.submit("good", task(1, steps=1))
    await bench.submit("bad", task(2, steps=1, prompt="the moon"))
    bench.steps(1)
    failed = await bench.failed("bad")
    assert (failed.reason, failed.retryable) == ("engine", True)
    assert "memory" in failed.message
    await bench.finished("good")


@pytest.mark.parametrize("method", ["prepare", "tick", "finish"])
async def test_a_lost_device_fails_its_batch_ends_the_worker_and_leaves_the_rest_to_another(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    calls: list[int] = []

    def lost(items: Sequence[Any]) -> Any:
        calls.append(len(items))
        raise DeviceLostError("an illegal memory access was encountered")

    monkeypatch.setattr(bench.pipeline, method, lost)
    for k in range(MAX_ROWS):
        await bench.submit(f"{k}", task(k, steps=1))
    await bench.submit("waits", task(9, steps=2))
    bench.worker.start()
    for k in range(MAX_ROWS):
        failed = await bench.failed(f"{k}")
        assert (failed.reason, failed.retryable) == ("engine", True)
    await until(lambda: not bench.worker.alive)
    assert calls[0] == MAX_ROWS
    assert sum(calls) <= MAX_ROWS + 1, "a lost device is not bisected"
    bench.worker.stop()
    assert bench.count("fewstep_worker_up") == 0
    if method != "finish":  # its ticks go on until decoding has failed
        assert await bench.queue.cancel("waits") == "running", "it was taken, and is not settled"
