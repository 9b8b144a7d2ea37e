"""The worker's loop, one step at a time, on a real pipeline with the fake backend."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from engines.pipeline import Edit, Generate, Inpaint, Row, Task
from service.batching.finisher import Room
from service.jobs import Job, Output, Priority
from tests.service.bench import MAX_ROWS, Bench, alone, task
from tests.service.helpers import random_image, read_pixels, until

pytestmark = pytest.mark.anyio


async def test_a_job_is_done_after_the_ticks_of_its_steps(bench: Bench) -> None:
    await bench.submit("a", task(seed=7))
    bench.steps(4)
    finished = await bench.finished("a")
    assert finished.ticks == (1, 1, 1, 1)
    assert np.array_equal(read_pixels(finished.images[0]), alone(bench, task(seed=7))[0])
    timings = finished.timings
    assert min(timings.queue_s, timings.encode_s, timings.denoise_s, timings.decode_s) >= 0


async def test_waiting_rows_are_admitted_at_every_tick(bench: Bench) -> None:
    await bench.submit("first", task(1))
    bench.steps(2)
    await bench.submit("second", task(2))
    bench.steps(4)
    assert (await bench.finished("first")).ticks == (1, 1, 2, 2)
    assert (await bench.finished("second")).ticks == (2, 2, 1, 1)


async def test_all_endpoints_and_guidance_values_share_ticks_and_change_nothing(bench: Bench) -> None:
    image, repaint = random_image(3), np.zeros((16, 16), dtype=bool)
    repaint[4:12, 4:12] = True
    tasks: list[Task] = [
        Generate("a cat", 4, 0.0, 1),
        Generate("a dog", 4, 6.5, 2),
        Edit("the sun", 4, 2.0, 3, image, strength=0.5),
        Inpaint("a red heart", 4, 3.0, 4, image, repaint),
    ]
    for name, one in zip("abcd", tasks, strict=True):
        await bench.submit(name, one)
    bench.steps(4)
    for name, expected in zip("abcd", alone(bench, *tasks), strict=True):
        finished = await bench.finished(name)
        assert finished.ticks == ((4, 4) if name == "c" else (4, 4, 3, 3))
        assert np.array_equal(read_pixels(finished.images[0]), expected)


async def test_other_students_do_not_share_ticks_but_all_are_served(bench: Bench) -> None:
    await bench.submit("four", task(1, steps=4))
    await bench.submit("one", task(2, steps=1))
    await bench.submit("two", task(3, steps=2))
    bench.steps(4 + 1 + 2)
    assert (await bench.finished("four")).ticks == (1, 1, 1, 1)
    assert (await bench.finished("one")).ticks == (1,)
    assert (await bench.finished("two")).ticks == (1, 1)


async def test_a_job_of_more_images_than_a_tick_holds(bench: Bench) -> None:
    tasks = [task(seed, steps=2) for seed in range(6)]
    await bench.submit("six", *tasks)

    def all_are_done() -> bool:  # A step may find nothing to tick, while the last two are encoded.
        bench.steps(1)
        return bench.count("fewstep_images_total") == 6

    await until(all_are_done)
    finished = await bench.finished("six")
    assert finished.ticks == (4, 4, 2, 2)
    for data, expected in zip(finished.images, alone(bench, *tasks), strict=True):
        assert np.array_equal(read_pixels(data), expected)


async def test_what_the_worker_holds_is_bounded(bench: Bench) -> None:
    for k in range(20):
        await bench.submit(f"{k}", task(k))
    bench.steps(1)
    assert bench.queue.stats().depth == 20 - 2 * MAX_ROWS


async def test_it_goes_on_holding_two_ticks_of_each_student_while_it_is_busy(bench: Bench) -> None:
    """Also when it holds none of one of them for a while: else nothing would be encoded beside the ticks then."""
    await bench.submit("one", task(0, steps=1))
    for k in range(7 * MAX_ROWS):
        await bench.submit(f"{k}", task(k))
    for _ in range(4):
        bench.steps(1)
        await asyncio.sleep(0.05)  # In which those are encoded that were taken.
    await bench.finished("one")
    assert bench.queue.stats().depth == 7 * MAX_ROWS - 2 * 2 * MAX_ROWS

    def all_are_done() -> bool:
        bench.steps(1)
        return bench.count("fewstep_images_total") == 7 * MAX_ROWS + 1

    await until(all_are_done)
    bench.steps(1)
    for k in range(20):
        await bench.submit(f"again {k}", task(k))
    bench.steps(1)
    assert bench.queue.stats().depth == 20 - 2 * MAX_ROWS


async def test_small_ticks_do_not_wait_for_a_slow_decoder(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    go, finish = threading.Event(), bench.pipeline.finish

    def slow_finish(rows: Sequence[Row]) -> Any:
        assert go.wait(10), "the ticks waited for the decoder"
        return finish(rows)

    monkeypatch.setattr(bench.pipeline, "finish", slow_finish)
    names = [f"{k}" for k in range(2 * MAX_ROWS)]
    for name in names:
        await bench.submit(name, task(1, steps=1))
        bench.steps(1)
    go.set()
    for name in names:
        assert (await bench.finished(name)).ticks == (1,)


def test_what_is_not_finished_is_bounded_by_its_images() -> None:
    room = Room(8)
    assert room.enter(5, wait=False)
    assert not room.enter(4, wait=False)
    assert room.enter(3, wait=False)
    entered = threading.Thread(target=room.enter, args=(20,))
    entered.start()
    room.leave(5)
    entered.join(0.2)
    assert entered.is_alive(), "more than there is room for goes in where there is nothing else"
    room.leave(3)
    entered.join(10)
    assert not entered.is_alive()
    assert not room.enter(1, wait=False)


async def test_a_cancelled_job_leaves_at_the_next_tick(bench: Bench) -> None:
    await bench.submit("gone", task(1))
    await bench.submit("stays", task(2))
    bench.steps(1)
    assert await bench.queue.cancel("gone") == "running"
    bench.steps(3)
    assert (await bench.finished("stays")).ticks == (2, 1, 1, 1)
    assert bench.queue.cancelled(["gone"]) == set()


async def test_a_job_past_its_deadline_never_ticks(bench: Bench) -> None:
    await bench.submit("late", task(1), seconds=-1)
    await bench.submit("in time", task(2, steps=1))
    bench.steps(1)
    assert (await bench.failed("late")).reason == "expired"
    assert (await bench.finished("in time")).ticks == (1,)


async def test_stopping_fails_what_is_held_and_leaves_what_waits(bench: Bench) -> None:
    for k in range(3 * MAX_ROWS):
        await bench.submit(f"{k}", task(k))
    bench.steps(1)
    bench.worker.stop()
    assert (await bench.failed("0")).reason == "stopped"
    assert bench.queue.stats().depth == MAX_ROWS


async def test_a_draining_worker_finishes_what_it_holds_takes_nothing_more_and_ends(bench: Bench) -> None:
    await bench.submit("held", task(1))
    bench.steps(1)
    await bench.submit("waits", task(2))
    bench.worker.drain()
    bench.worker.start()
    assert (await bench.finished("held")).ticks == (1, 1, 1, 1)
    await until(lambda: not bench.worker.alive)
    assert bench.queue.stats().depth == 1


async def test_a_worker_leaves_jobs_of_other_models_alone(bench: Bench) -> None:
    now = time.monotonic()
    await bench.queue.submit(Job("other", "other", (task(1),), Output("png"), now, now + 60, "other@1"))
    await bench.submit("mine", task(2, steps=1))
    bench.steps(1)
    assert (await bench.finished("mine")).ticks == (1,)
    assert bench.queue.stats().depth == 1


async def test_decoding_overlaps_the_next_tick(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    decoding, ticked = threading.Event(), threading.Event()
    finish, tick = bench.pipeline.finish, bench.pipeline.tick

    def slow_finish(rows: Sequence[Row]) -> Any:
        decoding.set()
        assert ticked.wait(60), "no tick ran while the decoder was busy"
        return finish(rows)

    def watched_tick(rows: Sequence[Row]) -> None:
        tick(rows)
        if decoding.is_set():
            ticked.set()

    monkeypatch.setattr(bench.pipeline, "finish", slow_finish)
    monkeypatch.setattr(bench.pipeline, "tick", watched_tick)
    await bench.submit("first", task(1, steps=1))
    await bench.submit("second", task(2, steps=4))
    bench.steps(1)
    await asyncio.to_thread(decoding.wait, 10)
    bench.steps(4)
    await bench.finished("first")
    await bench.finished("second")


async def test_prompts_of_others_are_encoded_beside_the_ticks(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    encoding, ticked = threading.Event(), threading.Event()
    prepare, tick = bench.pipeline.prepare, bench.pipeline.tick

    def slow_prepare(tasks: Sequence[Task]) -> Any:
        if any(task.condition == "a dog" for task in tasks):
            encoding.set()
            assert ticked.wait(60), "no tick ran while another's prompt was encoded"
        return prepare(tasks)

    def watched_tick(rows: Sequence[Row]) -> None:
        tick(rows)
        if encoding.is_set():
            ticked.set()

    monkeypatch.setattr(bench.pipeline, "prepare", slow_prepare)
    monkeypatch.setattr(bench.pipeline, "tick", watched_tick)
    await bench.submit("first", *(task(k) for k in range(MAX_ROWS)))
    bench.steps(1)
    await bench.submit("second", task(2, prompt="a dog"))
    bench.steps(1)
    assert await asyncio.to_thread(encoding.wait, 10)
    bench.steps(2)
    assert (await bench.finished("first")).ticks[:2] == (4, 4)

    def both_are_done() -> bool:
        bench.steps(1)
        return bench.count("fewstep_images_total") == MAX_ROWS + 1

    await until(both_are_done)
    second = await bench.finished("second")
    assert np.array_equal(read_pixels(second.images[0]), alone(bench, task(2, prompt="a dog"))[0])


async def test_of_a_burst_no_more_is_encoded_before_the_first_tick_than_it_takes(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    ticked = threading.Event()
    prepare, tick = bench.pipeline.prepare, bench.pipeline.tick

    def slow_prepare(tasks: Sequence[Task]) -> Any:
        if any(task.condition == "a dog" for task in tasks):
            assert ticked.wait(10), "no tick ran while the others were encoded"
        return prepare(tasks)

    def watched_tick(rows: Sequence[Row]) -> None:
        tick(rows)
        ticked.set()

    monkeypatch.setattr(bench.pipeline, "prepare", slow_prepare)
    monkeypatch.setattr(bench.pipeline, "tick", watched_tick)
    await bench.submit("first", *(task(k, prompt="a cat") for k in range(MAX_ROWS)))
    await bench.submit("second", *(task(k, prompt="a dog") for k in range(MAX_ROWS)))

    def both_are_done() -> bool:
        bench.steps(1)
        return bench.count("fewstep_images_total") == 2 * MAX_ROWS

    await until(both_are_done, 15)
    assert (await bench.finished("first")).ticks[0] == MAX_ROWS
    await bench.finished("second")


async def test_a_job_that_is_cancelled_while_it_is_encoded_never_ticks(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened, reached = threading.Event(), threading.Event()
    prepare = bench.pipeline.prepare

    def gated(tasks: Sequence[Task]) -> Any:
        if any(task.condition == "a dog" for task in tasks):
            reached.set()
            assert opened.wait(60)
        return prepare(tasks)

    monkeypatch.setattr(bench.pipeline, "prepare", gated)
    await bench.submit("first", *(task(k) for k in range(MAX_ROWS)))
    bench.steps(1)
    await bench.submit("second", task(2, prompt="a dog"))
    bench.steps(1)
    assert await asyncio.to_thread(reached.wait, 10)
    assert await bench.queue.cancel("second") == "running"
    bench.steps(1)
    opened.set()
    bench.steps(3)
    assert (await bench.finished("first")).ticks == (4, 4, 4, 4)


async def test_priority_goes_first_where_all_cannot_go_at_once(bench: Bench) -> None:
    for k in range(2 * MAX_ROWS):
        await bench.submit(f"low-{k}", task(k, steps=1), priority=Priority.LOW)
    await bench.submit("high", task(99, steps=1), priority=Priority.HIGH)
    bench.steps(1)
    await bench.finished("high")


async def test_what_cannot_be_in_time_is_given_up_before_its_time_is_over(bench: Bench) -> None:
    bench.pipeline.seconds = {"step-4.onnx": {1: 30.0, 2: 31.0, 4: 33.0}}
    began = time.monotonic()
    await bench.submit("lost", task(1), seconds=60)
    bench.steps(1)
    assert (await bench.failed("lost")).reason == "expired"
    assert time.monotonic() - began < 30
    assert bench.count("fewstep_tick_rows_count") == 0
