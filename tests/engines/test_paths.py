"""The stochastic sampler and transfer by encoding: the paths they take, and that company changes no image."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from engines.backends.base import Array
from engines.bundle import Bundle, Student
from engines.paths import path_of
from engines.pipeline import Edit, Generate, Inpaint, Pipeline, Task, TaskError, Transfer, noise_of, ticks
from engines.rows import implied_x, renoise
from tests.bundles import cosine_grid, make_tiny_bundle, tiny_description

SIZE = 16
COMPANY_TOLERANCE = 2
IMAGE = np.random.default_rng(0).integers(0, 256, (SIZE, SIZE, 3)).astype(np.uint8)
REPAINT = np.zeros((SIZE, SIZE), dtype=bool)
REPAINT[3:9, 5:12] = True

STOCHASTIC = Generate("a cat", 4, 1.0, 7, sampler="stochastic")
TRANSFER = Transfer("a cat", 2, 1.0, 0, IMAGE, "the moon")


@pytest.fixture(scope="module", params=["pixel", "latent"])
def styled(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A bundle whose students of 1 and 2 steps are stochastic too, and that of 2 has an encoder."""
    folder = tmp_path_factory.mktemp("styled")
    return make_tiny_bundle(folder, space=request.param, stochastic=(1, 2), encoders=(2,), name="styled")


@pytest.fixture
def pipeline(styled: Bundle, backend: str) -> Iterator[Pipeline]:
    with Pipeline.open(styled.path, backend=backend, threads=1, batch_sizes=(1, 2, 4)) as opened:
        yield opened


def difference(one: Array, two: Array) -> int:
    return int(np.abs(one.astype(int) - two.astype(int)).max())


def test_every_task_made_in_company_is_as_made_alone(pipeline: Pipeline) -> None:
    tasks: list[Task] = [
        STOCHASTIC,
        Generate("a cat", 2, 0.0, 1),
        Edit("the moon", 4, 3.0, 2, IMAGE, 0.75, sampler="stochastic"),
        TRANSFER,
        Inpaint("blue house", 4, 7.0, 3, IMAGE, REPAINT, sampler="stochastic"),
        replace(TRANSFER, condition="the sun", guidance=4.0),
        Generate("a cat", 2, 2.0, 5, sampler="stochastic"),
    ]
    moved: list[int] = []
    images = pipeline.run(tasks, progress=moved.append)
    assert sum(moved) == sum(map(ticks, tasks)) == 4 + 2 + 3 + 4 + 4 + 4 + 2
    assert max(moved) == 4
    for task, image in zip(tasks, images, strict=True):
        assert difference(image, pipeline.run([task])[0]) <= COMPANY_TOLERANCE


def test_both_samplers_share_the_ticks_of_one_student(pipeline: Pipeline) -> None:
    rows = pipeline.prepare([STOCHASTIC, Generate("a cat", 2, 0.0, 1)])
    assert len({row.group for row in rows}) == 1
    assert [row.remaining for row in rows] == [4, 2]
    pipeline.tick(rows)
    assert [row.remaining for row in rows] == [3, 1]


def test_a_stochastic_row_goes_two_places_on_and_one_back_by_its_own_noise(pipeline: Pipeline) -> None:
    (row,) = pipeline.prepare([STOCHASTIC])
    grid = cosine_grid(4)
    for k in range(4):
        step, before = row.step, row.z
        assert step.time == grid.times[k]
        assert step.start == (grid.alphas[k], grid.sigmas[k])
        assert step.end == (grid.alphas[min(k + 2, 4)], grid.sigmas[min(k + 2, 4)])
        pipeline.tick([row])
        assert row.ends is not None
        assert row.ends[0] is before
        if k < 3:
            assert step.back == (grid.alphas[k + 1], grid.sigmas[k + 1])
            noise = noise_of(7, row.z.shape, k + 1)
            np.testing.assert_array_equal(row.z, renoise(row.ends[1], noise, step.end, step.back))
        np.testing.assert_allclose(row.estimate, implied_x(*row.ends, step.start, step.end))
    np.testing.assert_allclose(row.estimate, row.z, atol=1e-4)


def test_an_estimate_knows_what_is_kept_where_noise_is_added_too(pipeline: Pipeline) -> None:
    (row,) = pipeline.prepare([Inpaint("a cat", 4, 1.0, 3, IMAGE, REPAINT, sampler="stochastic")])
    kept = np.broadcast_to(row.keep == 1, row.z.shape)
    while not row.done:
        pipeline.tick([row])
        np.testing.assert_array_equal(row.estimate[kept], row.known[kept])


def test_rows_that_are_noised_keep_their_other_arrays(pipeline: Pipeline) -> None:
    rows = pipeline.prepare([STOCHASTIC, replace(STOCHASTIC, seed=8)])
    first = pipeline._inputs.of(rows)
    pipeline.tick(rows)
    again = pipeline._inputs.of(rows)
    pipeline.tick(rows)
    third = pipeline._inputs.of(rows)
    assert all(third[name] is again[name] for name in ("known", "keep", "noise", "context"))
    assert third["z"] is not again["z"]
    np.testing.assert_array_equal(third["z"], np.stack([row.z for row in rows]))
    assert first["time"][0] > again["time"][0] > third["time"][0]


def test_the_noise_of_each_step_is_another() -> None:
    noises = [noise_of(seed, (64,), index).tobytes() for seed in (0, 1, 2**63 - 1) for index in range(4)]
    assert len(set(noises)) == len(noises)


def test_the_sampler_and_the_seed_matter(pipeline: Pipeline) -> None:
    (image,) = pipeline.run([STOCHASTIC])
    np.testing.assert_array_equal(image, pipeline.run([STOCHASTIC])[0])
    for other in (replace(STOCHASTIC, sampler="deterministic"), replace(STOCHASTIC, seed=8)):
        assert difference(image, pipeline.run([other])[0]) > 8


def test_what_is_kept_comes_back_exactly_though_noise_is_added(pipeline: Pipeline) -> None:
    (row,) = pipeline.prepare([Inpaint("a cat", 4, 1.0, 3, IMAGE, REPAINT, sampler="stochastic")])
    while not row.done:
        pipeline.tick([row])
    kept = np.broadcast_to(row.keep == 1, row.z.shape)
    np.testing.assert_allclose(row.z[kept], row.known[kept], atol=1e-6)
    (image,) = pipeline.finish([row])
    np.testing.assert_array_equal(image[~REPAINT], IMAGE[~REPAINT])


def test_a_transfer_encodes_what_it_sees_and_decodes_what_is_asked(pipeline: Pipeline) -> None:
    (row,) = pipeline.prepare([TRANSFER])
    grid, low = cosine_grid(2), pipeline.manifest.guidance.minimum
    assert [(step.graph, step.time, step.w) for step in row.path] == [
        ("encoder-2.onnx", grid.times[2], low),
        ("encoder-2.onnx", grid.times[1], low),
        ("step-2.onnx", grid.times[0], 1.0),
        ("step-2.onnx", grid.times[1], 1.0),
    ]
    seen = []
    while not row.done:
        seen.append(row.condition)
        pipeline.tick([row])
    cat, moon = pipeline.prepare([Generate("a cat", 2, 1.0, 0), Generate("the moon", 2, 1.0, 0)])
    for found, expected in zip(seen, [moon, moon, cat, cat], strict=True):
        np.testing.assert_array_equal(found["context"], expected.condition["context"])


def test_a_transfer_depends_on_all_but_the_seed(pipeline: Pipeline) -> None:
    (image,) = pipeline.run([TRANSFER])
    np.testing.assert_array_equal(image, pipeline.run([replace(TRANSFER, seed=9)])[0])
    changes: list[dict[str, Any]] = [{"source": "the sun"}, {"condition": "a dog"}, {"image": 255 - IMAGE}]
    for change in changes:
        assert not np.array_equal(image, pipeline.run([replace(TRANSFER, **change)])[0]), change


@pytest.mark.parametrize(
    ("task", "code", "param"),
    [
        (replace(STOCHASTIC, steps=8), "unsupported_sampler", "sampler"),
        (replace(STOCHASTIC, steps=1), "unsupported_sampler", "sampler"),
        (replace(STOCHASTIC, steps=3), "unsupported_sampler", "sampler"),
        (replace(STOCHASTIC, sampler="deterministic", steps=8), "unsupported_steps", "steps"),
        (replace(TRANSFER, steps=4), "unsupported_method", "method"),
        (replace(TRANSFER, sampler="stochastic"), "unsupported_sampler", "sampler"),
        (replace(TRANSFER, source="xyzzy"), "unknown_words", "source"),
        (replace(TRANSFER, source=" "), "empty_prompt", "source"),
        (replace(TRANSFER, source="cat \ud800"), "invalid_prompt", "source"),
        (replace(TRANSFER, image=IMAGE[1:]), "image_shape", "image"),
    ],
)
def test_what_no_student_was_trained_for_is_refused(pipeline: Pipeline, task: Task, code: str, param: str) -> None:
    with pytest.raises(TaskError) as caught:
        pipeline.validate(task)
    assert (caught.value.code, caught.value.param) == (code, param)


def test_a_bundle_without_either_says_so(text_pipeline: Pipeline) -> None:
    with pytest.raises(TaskError, match=r"for the stochastic sampler$"):
        text_pipeline.validate(STOCHASTIC)
    with pytest.raises(TaskError, match="no student has an encoder"):
        text_pipeline.validate(TRANSFER)
    with pytest.raises(ValueError, match="stochastic sampler"):
        path_of(STOCHASTIC, text_pipeline.manifest)
    with pytest.raises(ValueError, match="no encoder"):
        path_of(TRANSFER, text_pipeline.manifest)


def test_the_stochastic_grid_halves_the_students_steps() -> None:
    fields = {"steps": 2, "graph": "step-2.onnx", "grid": cosine_grid(2)}
    assert Student.model_validate({**fields, "stochastic": cosine_grid(4)}).grid_of("stochastic") == cosine_grid(4)
    for wrong in (2, 3, 8):
        with pytest.raises(ValidationError, match="halves every step"):
            Student.model_validate({**fields, "stochastic": cosine_grid(wrong)})


@given(steps=st.integers(1, 8), start=st.integers(0, 7))
def test_a_stochastic_path_asks_only_at_the_places_of_its_grid_and_ends_clean(steps: int, start: int) -> None:
    description = tiny_description(steps=(steps,), stochastic=(steps,))
    strength = (2 * steps - min(start, 2 * steps - 1)) / (2 * steps)
    path = path_of(Edit("a", 2 * steps, 0.0, 0, IMAGE, strength, sampler="stochastic"), description)
    grid = cosine_grid(2 * steps)
    assert [step.time for step in path] == list(grid.times[-1 - len(path) : -1])
    assert path[-1].end == (1.0, 0.0)
    assert [step.back is None for step in path] == [False] * (len(path) - 1) + [True]
    for step, following in pairwise(path):
        assert step.back == following.start
