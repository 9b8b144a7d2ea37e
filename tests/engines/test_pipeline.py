"""Tasks -> rows -> ticks -> images: the same image alone or in company, and nothing asked for is ignored."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engines.backends import open_engines
from engines.backends.base import Array, EngineError, EngineOptions
from engines.backends.fake import FakeEngine
from engines.bundle import Bundle, BundleError, Grid, Student, load_bundle, write_bundle
from engines.paths import Level, path_of
from engines.pipeline import (
    MAX_SEED,
    Edit,
    Generate,
    Inpaint,
    Pipeline,
    Task,
    TaskError,
    kept_steps,
    noise_of,
    strengths,
)
from engines.rows import implied_x, keep_cells, start_row
from tests.bundles import MAX_TOKENS, tiny_description

SIZE = 16
# Largest difference, of 255, between an image made alone and the same made in a batch.
COMPANY_TOLERANCE = 2
IMAGE = np.random.default_rng(0).integers(0, 256, (SIZE, SIZE, 3)).astype(np.uint8)
REPAINT = np.zeros((SIZE, SIZE), dtype=bool)
REPAINT[3:9, 5:12] = True


def conditions(pipeline: Pipeline) -> list[str]:
    return list(pipeline.manifest.classes) or ["a red cat", "the moon", "blue house", "smiling face and sun"]


def mixed_tasks(pipeline: Pipeline) -> list[Task]:
    """All three kinds, on the 4-step student, with different guidance and different places on the grid."""
    one, two, three, four = conditions(pipeline)
    return [
        Generate(one, 4, 0.0, 1),
        Edit(two, 4, 3.5, 2, IMAGE, 0.5),
        Inpaint(three, 4, 7.0, 3, IMAGE, REPAINT),
        Inpaint(four, 4, 1.25, 4, IMAGE, REPAINT, 0.75),
        Generate(four, 4, 2.0, MAX_SEED),
    ]


def difference(one: Array, two: Array) -> int:
    return int(np.abs(one.astype(int) - two.astype(int)).max())


def test_mixed_rows_in_one_tick_equal_each_alone(pipeline: Pipeline) -> None:
    tasks = mixed_tasks(pipeline)
    rows = pipeline.prepare(tasks)
    assert len({row.group for row in rows}) == 1
    assert len({row.remaining for row in rows}) == 3
    while moving := [row for row in rows if not row.done]:
        pipeline.tick(moving)
    for task, image in zip(tasks, pipeline.finish(rows), strict=True):
        (alone,) = pipeline.run([task])
        assert difference(image, alone) <= COMPANY_TOLERANCE
        assert image.dtype == np.uint8
        assert image.shape == (SIZE, SIZE, 3)


def test_run_batches_students_and_numbers_beyond_the_largest_batch(pipeline: Pipeline) -> None:
    condition = conditions(pipeline)[0]
    tasks = [Generate(condition, steps, 1.0, seed) for seed in range(3) for steps in (1, 4, 2)]
    moved: list[int] = []
    images = pipeline.run(tasks, progress=moved.append)
    assert sum(moved) == sum(task.steps for task in tasks)
    assert max(moved) <= pipeline.max_rows
    for task, image in zip(tasks, images, strict=True):
        assert difference(image, pipeline.run([task])[0]) <= COMPANY_TOLERANCE


def test_same_seed_same_image_and_everything_else_matters(pipeline: Pipeline) -> None:
    first, other = conditions(pipeline)[:2]
    task = Generate(first, 4, 1.0, 7)
    (image,) = pipeline.run([task])
    np.testing.assert_array_equal(image, pipeline.run([task])[0])
    for change in ({"condition": other}, {"seed": 8}, {"guidance": 5.0}, {"steps": 2}):
        (changed,) = pipeline.run([replace(task, **change)])
        assert difference(image, changed) > 8, change


def test_preserved_pixels_come_back_exactly(pipeline: Pipeline) -> None:
    for strength in (0.25, 1.0):
        task = Inpaint(conditions(pipeline)[0], 4, 2.0, 5, IMAGE, REPAINT, strength)
        (image,) = pipeline.run([task])
        np.testing.assert_array_equal(image[~REPAINT], IMAGE[~REPAINT])
        assert difference(image[REPAINT], IMAGE[REPAINT]) > 8


def test_weaker_edits_stay_nearer_the_image(pipeline: Pipeline) -> None:
    smooth = np.full((SIZE, SIZE, 3), 90, np.uint8)
    distances = []
    for strength in (0.25, 1.0):
        (image,) = pipeline.run([Edit(conditions(pipeline)[0], 4, 2.0, 5, smooth, strength)])
        distances.append(float(np.abs(image.astype(int) - smooth).mean()))
    assert distances[0] < distances[1]


def test_rows_start_where_the_strength_says(pipeline: Pipeline) -> None:
    condition = conditions(pipeline)[0]
    for strength, remaining in ((0.25, 1), (0.5, 2), (0.6, 2), (0.99, 3), (1.0, 4)):
        (row,) = pipeline.prepare([Edit(condition, 4, 0.0, 9, IMAGE, strength)])
        assert (row.remaining, row.step_index, row.done) == (remaining, 0, False)
        noise = noise_of(9, pipeline.manifest.latent_shape)
        grid, k = pipeline.bundle.student(4).grid, 4 - remaining
        if pipeline.manifest.space == "pixel":
            latent = IMAGE.transpose(2, 0, 1) / 127.5 - 1
            np.testing.assert_allclose(row.z, grid.alphas[k] * latent + grid.sigmas[k] * noise, atol=1e-6)


def test_generated_rows_start_from_their_noise(pipeline: Pipeline) -> None:
    (row,) = pipeline.prepare([Generate(conditions(pipeline)[0], 2, 0.0, 3)])
    np.testing.assert_array_equal(row.z, noise_of(3, pipeline.manifest.latent_shape))
    assert not row.keep.any()


class FailingEngine(FakeEngine):
    """Fails, or gives nan, whenever a row asks for w = 6."""

    broken = "raise"

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        outputs = super().run(inputs)
        if "guidance" in inputs and (bad := inputs["guidance"] == 6).any():
            if self.broken == "raise":
                raise EngineError("out of memory")
            outputs["z_next"][bad] = np.nan
        return outputs


@pytest.mark.parametrize("broken", ["raise", "nan"])
def test_a_failed_tick_changes_no_row(text_bundle: Bundle, broken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FailingEngine, "broken", broken)
    engines = {name: FailingEngine(graph, EngineOptions()) for name, graph in text_bundle.graphs().items()}
    with Pipeline(text_bundle, engines) as pipeline:
        good, bad = pipeline.prepare([Generate("a cat", 2, 0.0, 1), Generate("a dog", 2, 6.0, 2)])
        before = [(row.z.copy(), row.step_index) for row in (good, bad)]
        with pytest.raises(EngineError):
            pipeline.tick([good, bad])
        for row, (z, index) in zip((good, bad), before, strict=True):
            assert row.step_index == index
            np.testing.assert_array_equal(row.z, z)
        pipeline.tick([good])
        assert good.step_index == 1


def test_ticks_refuse_what_cannot_share_them(text_pipeline: Pipeline, bundles: dict[tuple[str, str], Bundle]) -> None:
    two, four = text_pipeline.prepare([Generate("a cat", steps, 0.0, 1) for steps in (2, 4)])
    with pytest.raises(ValueError, match="one group"):
        text_pipeline.tick([two, four])
    with pytest.raises(ValueError, match="one group"):
        text_pipeline.tick([])
    with pytest.raises(ValueError, match="not done"):
        text_pipeline.finish([two])
    text_pipeline.tick([two])
    text_pipeline.tick([two])
    with pytest.raises(ValueError, match="done already"):
        text_pipeline.tick([two])
    with Pipeline.open(bundles["text", "pixel"].path, backend="fake") as other:
        (stranger,) = other.prepare([Generate("a cat", 2, 0.0, 1)])
    with pytest.raises(ValueError, match="one group"):
        text_pipeline.tick([stranger])


GOOD = Generate("a cat", 4, 1.0, 0)
EDIT = Edit("a cat", 4, 1.0, 0, IMAGE, 0.5)
INPAINT = Inpaint("a cat", 4, 1.0, 0, IMAGE, REPAINT)


@pytest.mark.parametrize(
    ("task", "change", "code", "param"),
    [
        (GOOD, {"steps": 3}, "unsupported_steps", "steps"),
        (GOOD, {"steps": 0}, "unsupported_steps", "steps"),
        (GOOD, {"guidance": -0.1}, "guidance_out_of_range", "guidance"),
        (GOOD, {"guidance": 7.01}, "guidance_out_of_range", "guidance"),
        (GOOD, {"guidance": float("nan")}, "guidance_out_of_range", "guidance"),
        (GOOD, {"seed": -1}, "seed_out_of_range", "seed"),
        (GOOD, {"seed": MAX_SEED + 1}, "seed_out_of_range", "seed"),
        (GOOD, {"condition": ""}, "empty_prompt", "condition"),
        (GOOD, {"condition": " \n\t"}, "empty_prompt", "condition"),
        (GOOD, {"condition": "xyzzy \u200b"}, "unknown_words", "condition"),
        (GOOD, {"condition": "cat " * (MAX_TOKENS - 1)}, "prompt_too_long", "condition"),
        (GOOD, {"condition": "cat \ud800"}, "invalid_prompt", "condition"),
        (EDIT, {"strength": 0.0}, "strength_out_of_range", "strength"),
        (EDIT, {"strength": 1.1}, "strength_out_of_range", "strength"),
        (EDIT, {"strength": float("nan")}, "strength_out_of_range", "strength"),
        (EDIT, {"strength": 0.2}, "strength_leaves_no_step", "strength"),
        (EDIT, {"image": IMAGE[:-1]}, "image_shape", "image"),
        (EDIT, {"image": IMAGE.astype(np.float32)}, "image_shape", "image"),
        (INPAINT, {"strength": 0.1}, "strength_leaves_no_step", "strength"),
        (INPAINT, {"image": IMAGE[..., :1]}, "image_shape", "image"),
        (INPAINT, {"repaint": REPAINT[:, 1:]}, "mask_shape", "mask"),
        (INPAINT, {"repaint": REPAINT.astype(np.uint8)}, "mask_shape", "mask"),
        (INPAINT, {"repaint": np.zeros_like(REPAINT)}, "empty_mask", "mask"),
    ],
)
def test_what_the_bundle_cannot_honour_is_refused(
    text_pipeline: Pipeline, task: Task, change: dict[str, Any], code: str, param: str
) -> None:
    text_pipeline.validate(task)
    with pytest.raises(TaskError) as caught:
        text_pipeline.validate(replace(task, **change))
    assert (caught.value.code, caught.value.param) == (code, param)
    with pytest.raises(TaskError):
        text_pipeline.prepare([task, replace(task, **change)])


def test_the_message_names_the_strengths_that_work(text_pipeline: Pipeline) -> None:
    with pytest.raises(TaskError, match=r"0\.25 to 1"):
        text_pipeline.validate(replace(EDIT, strength=0.1))


def test_the_longest_prompt_fits(text_pipeline: Pipeline) -> None:
    text_pipeline.validate(replace(GOOD, condition="cat " * (MAX_TOKENS - 2)))


def test_unknown_class_names_those_there_are(bundles: dict[tuple[str, str], Bundle]) -> None:
    with (
        Pipeline.open(bundles["class", "pixel"].path, backend="fake") as pipeline,
        pytest.raises(TaskError, match="zero, one, two, three") as caught,
    ):
        pipeline.validate(replace(GOOD, condition="four"))
    assert caught.value.code == "unknown_class"


def test_warmup_times_every_student_at_every_batch_size(pipeline: Pipeline) -> None:
    seconds = pipeline.warmup()
    assert {graph: list(times) for graph, times in seconds.items()} == {f"step-{n}.onnx": [1, 2, 4] for n in (1, 2, 4)}
    assert all(time > 0 for times in seconds.values() for time in times.values())


def test_a_closed_pipeline_has_closed_its_engines(text_bundle: Bundle, backend: str) -> None:
    engines = open_engines(backend, text_bundle.graphs(), EngineOptions(threads=1)).engines
    with Pipeline(text_bundle, engines):
        pass
    for engine in engines.values():
        with pytest.raises(EngineError, match="closed"):
            engine.warmup((1,))


def test_opening_refuses_damaged_bundles(bundle_copy: Path) -> None:
    (bundle_copy / "step-1.onnx").write_bytes(b"")
    with pytest.raises(BundleError, match=r"step-1\.onnx"):
        Pipeline.open(bundle_copy)


def test_opening_refuses_graphs_that_are_not_the_manifests(text_bundle: Bundle, tmp_path: Path) -> None:
    files = {name: text_bundle.path / name for name in text_bundle.manifest.files}
    swapped = files | {"encode.onnx": files["decode.onnx"], "decode.onnx": files["encode.onnx"]}
    bundle = write_bundle(tmp_path / "swapped", tiny_description(space="latent"), swapped)
    with pytest.raises(EngineError, match=r"encode\.onnx: its inputs are latent"):
        Pipeline.open(bundle.path, threads=1)


def test_opening_refuses_a_tokenizer_that_is_none(text_bundle: Bundle, tmp_path: Path) -> None:
    files = {name: text_bundle.path / name for name in text_bundle.manifest.files}
    bundle = write_bundle(
        tmp_path / "odd", tiny_description(space="latent"), files | {"tokenizer.json": files["README.md"]}
    )
    with pytest.raises(BundleError, match=r"tokenizer\.json: not a tokenizer"):
        Pipeline.open(bundle.path, backend="fake")


@pytest.mark.parametrize("sizes", [(), (0, 1)])
def test_batch_sizes_are_positive(text_bundle: Bundle, sizes: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="batch_sizes"):
        Pipeline(load_bundle(text_bundle.path), {}, sizes)


def test_noise_is_a_function_of_the_seed_alone() -> None:
    """The first values for three seeds. If a library changes them, every seed anyone noted means another image."""
    golden = {
        0: [0.059911035, 0.015559634, -1.1644385],
        1: [1.0916891, 0.4558267, 0.70178974],
        MAX_SEED: [0.95186639, -1.0147828, 1.1980889],
    }
    for seed, values in golden.items():
        np.testing.assert_allclose(noise_of(seed, (3,)), values, rtol=1e-6)
        np.testing.assert_array_equal(noise_of(seed, (2, 3)).ravel()[:3], noise_of(seed, (3,)))
    many = noise_of(5, (4, 64, 64))
    assert many.dtype == np.float32
    assert abs(float(many.mean())) < 0.03
    assert abs(float(many.std()) - 1) < 0.03


@settings(deadline=None)
@given(steps=st.integers(1, 100), strength=st.floats(0.001, 1))
def test_kept_steps_follow_strength(steps: int, strength: float) -> None:
    kept = kept_steps(steps, strength)
    assert 0 <= kept <= steps
    assert kept <= steps * strength < kept + 1 or kept == steps
    assert kept_steps(steps, 1.0) == steps
    assert [kept_steps(steps, value) for value in strengths(steps)] == list(range(1, steps + 1))
    assert [kept_steps(steps, value - 1.01e-4) for value in strengths(steps)] == list(range(steps))


def test_a_cell_is_kept_only_if_every_pixel_in_it_is() -> None:
    repaint = np.zeros((8, 8), dtype=bool)
    repaint[0, 0] = repaint[5, 7] = True
    keep = keep_cells(repaint, (4, 4, 2))
    assert keep.tolist() == [[[0, 1], [1, 1], [1, 0], [1, 1]]]
    np.testing.assert_array_equal(keep_cells(repaint, (3, 8, 8))[0], ~repaint)


def test_editing_rows_need_an_encoded_image(text_bundle: Bundle) -> None:
    with pytest.raises(ValueError, match="encoded image"):
        start_row(
            EDIT,
            revision="",
            path=path_of(EDIT, text_bundle.manifest),
            condition={},
            source=None,
            shape=(4, 8, 8),
            latent=None,
        )


@pytest.mark.parametrize("puts_back", [True, False])
def test_what_is_painted_wholly_anew_starts_from_noise_alone(puts_back: bool) -> None:
    """Stable Diffusion's schedules end at alpha = 0.068: the brightness of what was there would come back."""
    grid = Grid(times=(1.0, 0.5, 0.0), alphas=(0.068, 0.7, 1.0), sigmas=(0.9977, 0.714, 0.0))
    student = Student(steps=2, graph="step-2.onnx", grid=grid)
    latent, noise = np.full((4, 8, 8), 5, np.float32), noise_of(3, (4, 8, 8))
    wholly = Inpaint("", 2, 0.0, 3, IMAGE, REPAINT)
    rows = []
    for task in (wholly, replace(wholly, strength=0.5), Edit("", 2, 0.0, 3, IMAGE, 1.0)):
        path = path_of(task, tiny_description().model_copy(update={"students": (student,)}))
        start = {"condition": {}, "source": None, "shape": latent.shape, "latent": latent, "puts_back": puts_back}
        rows.append(start_row(task, revision="", path=path, **start))
    whole, half, edit = (row.z for row in rows)
    kept = np.broadcast_to(rows[0].keep == 1, whole.shape)
    assert kept.any() == puts_back
    np.testing.assert_array_equal(whole[~kept], noise[~kept])
    np.testing.assert_array_equal(whole[kept], edit[kept])
    np.testing.assert_allclose(edit, 0.068 * latent + 0.9977 * noise, rtol=1e-6)
    np.testing.assert_allclose(half, 0.7 * latent + 0.714 * noise, rtol=1e-6)


@given(st.floats(0, 1), st.floats(0, 1))
def test_two_ends_of_a_step_imply_the_image(before: float, after: float) -> None:
    # Angles: alpha is the cosine, sigma the sine. A step goes to less noise.
    high, low = sorted((before, after), reverse=True)
    if high - low < 0.05:
        high, low = 1.0, 0.0
    x, eps = np.random.default_rng(0).standard_normal((2, 3, 4, 4)).astype(np.float32)
    levels = [Level(float(np.cos(t * np.pi / 2)), float(np.sin(t * np.pi / 2))) for t in (high, low)]
    z, z_next = (np.float32(alpha) * x + np.float32(sigma) * eps for alpha, sigma in levels)
    found = implied_x(z, z_next, *levels)
    assert np.abs(found - x).max() < 1e-4


def test_an_estimate_ends_at_the_image_and_keeps_what_is_kept(pipeline: Pipeline) -> None:
    [row] = pipeline.prepare([Inpaint(conditions(pipeline)[0], 4, 1.0, 3, IMAGE, REPAINT)])
    with pytest.raises(ValueError, match="no step"):
        _ = row.estimate
    while not row.done:
        pipeline.tick([row])
        assert row.estimate.dtype == np.float32
        kept = np.broadcast_to(row.keep == 1, row.z.shape)
        assert np.abs(row.estimate - row.known)[kept].max() < 1e-4
    assert np.abs(row.estimate - row.z).max() < 1e-4


class Nowhere(FakeEngine):
    """An engine whose values are not finite."""

    def run(self, inputs: Any) -> dict[str, Any]:
        return {name: array * np.nan for name, array in super().run(inputs).items()}


class OnceNowhere(FakeEngine):
    """An engine whose values are finite from the second run on."""

    runs = 0

    def run(self, inputs: Any) -> dict[str, Any]:
        self.runs += 1
        outputs = super().run(inputs)
        return {name: array * np.nan for name, array in outputs.items()} if self.runs == 1 else outputs


def test_a_prompt_that_was_once_encoded_wrongly_is_encoded_anew(text_bundle: Bundle) -> None:
    engines = {
        name: (OnceNowhere if graph.role == "text" else FakeEngine)(graph, EngineOptions())
        for name, graph in text_bundle.graphs().items()
    }
    with Pipeline(text_bundle, engines) as pipeline:
        with pytest.raises(EngineError, match=r"the text graph .* not finite"):
            pipeline.run([Generate("a cat", 4, 1.0, 1)])
        assert len(pipeline.run([Generate("a cat", 4, 1.0, 1)])) == 1


@pytest.mark.parametrize("role", ["encode", "decode", "step"])
def test_values_that_are_not_finite_are_an_error_and_no_image(text_bundle: Bundle, role: str) -> None:
    graphs = text_bundle.graphs()
    engines = {
        name: (Nowhere if graph.role == role else FakeEngine)(graph, EngineOptions()) for name, graph in graphs.items()
    }
    with (
        Pipeline(text_bundle, engines) as pipeline,
        pytest.raises(EngineError, match=f"the {role} graph .* not finite"),
    ):
        pipeline.run([Edit("a cat", 4, 1.0, 1, IMAGE, 1.0)])
