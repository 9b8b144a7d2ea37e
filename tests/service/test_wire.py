"""Jobs and outcomes come off the wire as they went on it; what is damaged is refused."""

from __future__ import annotations

import dataclasses
from typing import Any, get_args

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from engines.manifest import SAMPLERS
from engines.pipeline import MAX_SEED, Edit, Generate, Inpaint, Task, Transfer
from engines.provenance import METADATA
from service.jobs import Failed, FailureReason, Finished, Job, Outcome, Output, Priority, Timings
from service.queue.wire import WireError, pack_job, pack_outcome, unpack_job, unpack_outcome

numbers = st.floats(allow_nan=False, allow_infinity=False)
seconds = st.floats(0, 1e6)
images = arrays(np.uint8, st.tuples(st.integers(1, 5), st.integers(1, 5), st.just(3)))
masks = arrays(np.bool_, st.tuples(st.integers(1, 5), st.integers(1, 5)))
blends = arrays(np.uint8, st.tuples(st.integers(1, 5), st.integers(1, 5)))
shared: dict[str, Any] = {
    "condition": st.text(),
    "steps": st.integers(1, 64),
    "guidance": numbers,
    "seed": st.integers(0, MAX_SEED),
    "sampler": st.sampled_from(SAMPLERS),
}
tasks: st.SearchStrategy[Task] = st.one_of(
    st.builds(Generate, **shared),
    st.builds(Edit, **shared, image=images, strength=st.floats(0, 1)),
    st.builds(Transfer, **shared, image=images, source=st.text()),
    st.builds(Inpaint, **shared, image=images, repaint=masks, strength=st.floats(0, 1), blend=st.none() | blends),
)
outputs = st.builds(
    Output, st.sampled_from(["png", "jpeg", "webp"]), st.none() | st.integers(1, 100), st.sampled_from(METADATA)
)
jobs = st.builds(
    Job,
    id=st.text(),
    request_id=st.text(),
    tasks=st.lists(tasks, min_size=1, max_size=4).map(tuple),
    output=outputs,
    submitted=numbers,
    deadline=numbers,
    model=st.text(),
    priority=st.sampled_from(Priority),
    trace=st.text(),
)
finished = st.builds(
    Finished,
    st.lists(st.binary(), max_size=4).map(tuple),
    st.builds(Timings, seconds, seconds, seconds, seconds),
    st.lists(st.integers(1, 256), max_size=8).map(tuple),
)
failed = st.builds(
    Failed,
    st.sampled_from(get_args(FailureReason)),
    st.text(),
    st.none() | st.text(),
    st.none() | st.text(),
    st.booleans(),
)
outcomes: st.SearchStrategy[Outcome] = st.one_of(finished, failed)


def fields(task: Task) -> dict[str, Any]:
    """The fields of a task, arrays as what they hold."""
    found = {field.name: getattr(task, field.name) for field in dataclasses.fields(task)}
    return {
        name: (value.dtype, value.shape, value.tobytes()) if isinstance(value, np.ndarray) else value
        for name, value in found.items()
    }


@given(jobs)
def test_a_job_comes_back_whole(job: Job) -> None:
    packed = pack_job(job)
    back = unpack_job(packed.message, lambda: packed.images, job.submitted, job.deadline)
    for name in ("id", "request_id", "model", "trace", "output", "submitted", "deadline", "cost", "priority"):
        assert getattr(back, name) == getattr(job, name)
    assert [type(task) for task in back.tasks] == [type(task) for task in job.tasks]
    assert [fields(task) for task in back.tasks] == [fields(task) for task in job.tasks]


@given(outcomes)
def test_an_outcome_comes_back_whole(outcome: Outcome) -> None:
    assert unpack_outcome(pack_outcome(outcome)) == outcome


@given(jobs, st.data())
def test_damage_is_an_error_of_the_wire_or_does_no_harm(job: Job, data: st.DataObject) -> None:
    packed = pack_job(job)
    message = data.draw(damaged(packed.message))
    arrived = data.draw(damaged(packed.images)) if packed.images else b""
    try:
        back = unpack_job(message, lambda: arrived, 0.0, 1.0)
    except WireError:
        return
    assert isinstance(back, Job)


@given(outcomes, st.data())
def test_a_damaged_outcome_is_an_error_of_the_wire_or_does_no_harm(outcome: Outcome, data: st.DataObject) -> None:
    try:
        back = unpack_outcome(data.draw(damaged(pack_outcome(outcome))))
    except WireError:
        return
    assert isinstance(back, Finished | Failed)


def damaged(original: bytes) -> st.SearchStrategy[bytes]:
    """The bytes cut short, or with one of them changed."""
    places = st.integers(0, len(original) - 1)
    cut = places.map(lambda place: original[:place])
    changed = st.tuples(places, st.integers(0, 255)).map(
        lambda change: original[: change[0]] + bytes([change[1]]) + original[change[0] + 1 :]
    )
    return cut | changed


def test_an_image_that_rows_share_travels_once() -> None:
    image = np.zeros((64, 64, 3), np.uint8)
    rows = tuple(Edit("a cat", 4, 0.0, seed, image, 0.5) for seed in range(8))
    one, eight = (pack_job(Job("a", "a", some, Output("png"), 0.0, 1.0)) for some in (rows[:1], rows))
    assert len(eight.images) == len(one.images)
    back = unpack_job(eight.message, lambda: eight.images, 0.0, 1.0)
    assert len({id(task.image) for task in back.tasks if isinstance(task, Edit)}) == 1


@pytest.mark.parametrize("images", [b"", b"nothing"])
def test_images_that_are_gone_are_an_error(images: bytes) -> None:
    job = Job("a", "a", (Edit("a cat", 4, 0.0, 0, np.zeros((4, 4, 3), np.uint8), 0.5),), Output("png"), 0.0, 1.0)
    with pytest.raises(WireError, match="images"):
        unpack_job(pack_job(job).message, lambda: images, 0.0, 1.0)


def test_a_job_of_an_older_process_has_no_priority_and_is_normal() -> None:
    job = Job("a", "a", (Generate("a cat", 4, 0.0, 0),), Output("png"), 0.0, 1.0, priority=Priority.HIGH)
    older = pack_job(job).message.replace(b'"priority": 1, ', b"")
    assert unpack_job(older, bytes, 0.0, 1.0).priority is Priority.NORMAL


def test_a_priority_that_there_is_not_is_an_error() -> None:
    job = Job("a", "a", (Generate("a cat", 4, 0.0, 0),), Output("png"), 0.0, 1.0, priority=Priority.HIGH)
    with pytest.raises(WireError):
        unpack_job(pack_job(job).message.replace(b'"priority": 1', b'"priority": 7'), bytes, 0.0, 1.0)


def test_another_version_is_refused() -> None:
    job = Job("a", "a", (Generate("a cat", 4, 0.0, 0),), Output("png"), 0.0, 1.0)
    later = pack_job(job).message.replace(b'"version": 1', b'"version": 2')
    with pytest.raises(WireError, match="version"):
        unpack_job(later, bytes, 0.0, 1.0)
