"""Laws of the mask's edge: what grows, what shrinks, how far a blur reaches, and which pixels stay exact."""

from __future__ import annotations

import dataclasses
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from engines.bundle import Bundle
from engines.images import fit_mask
from engines.masks import MAX_GROW_PX, blurred, fit_blend, grown, joined
from engines.pipeline import Inpaint, Pipeline, TaskError
from engines.tasks import Mask

masks = arrays(np.bool_, st.tuples(st.integers(1, 12), st.integers(1, 12)))
lone_pixels = st.tuples(st.integers(1, 60), st.integers(1, 60)).flatmap(
    lambda shape: st.tuples(st.just(shape), st.integers(0, shape[0] - 1), st.integers(0, shape[1] - 1))
)


def grown_pixel_by_pixel(mask: Mask, pixels: int) -> Mask:
    marked = np.argwhere(mask)
    places = np.indices(mask.shape).reshape(2, -1).T
    near = [bool(len(marked)) and bool((np.abs(marked - place).max(axis=1) <= pixels).any()) for place in places]
    return np.array(near, dtype=bool).reshape(mask.shape)


@given(masks, st.integers(0, 14))
def test_a_mask_grows_by_what_is_near(mask: Mask, pixels: int) -> None:
    np.testing.assert_array_equal(grown(mask, pixels), grown_pixel_by_pixel(mask, pixels))


@given(masks, st.integers(0, 14))
def test_shrinking_is_growth_of_the_rest(mask: Mask, pixels: int) -> None:
    np.testing.assert_array_equal(grown(mask, -pixels), ~grown(~mask, pixels))


@given(masks, st.integers(0, 5), st.integers(0, 5))
def test_growth_adds_up(mask: Mask, first: int, second: int) -> None:
    np.testing.assert_array_equal(grown(grown(mask, first), second), grown(mask, first + second))


@given(masks, st.integers(0, 5))
def test_grown_and_shrunk_again_a_mask_lacks_nothing(mask: Mask, pixels: int) -> None:
    assert (grown(grown(mask, pixels), -pixels) >= mask).all()
    assert (grown(grown(mask, -pixels), pixels) <= mask).all()


def test_the_largest_mask_grows_in_a_moment() -> None:
    mask = np.zeros((3072, 4096), dtype=bool)
    mask[1500, 2000] = True
    began = time.process_time()
    wide = grown(mask, MAX_GROW_PX)
    assert time.process_time() - began < 0.5  # 0.06 where this was written
    assert wide.sum() == (2 * MAX_GROW_PX + 1) ** 2


def test_the_border_takes_nothing_away() -> None:
    assert grown(np.ones((5, 7), dtype=bool), -20).all()


@given(lone_pixels, st.floats(0.01, 12))
def test_a_blur_reaches_no_farther_than_it_says(place: tuple[tuple[int, int], int, int], radius: float) -> None:
    shape, row, column = place
    mask = np.zeros(shape, dtype=bool)
    mask[row, column] = True
    distance = np.abs(np.indices(shape) - np.array([row, column])[:, None, None]).max(axis=0)
    assert not blurred(mask, radius)[distance > 3 * radius + 3].any()
    # The same from the other side: the inside of a mask shows the new image alone.
    assert (blurred(~mask, radius)[distance > 3 * radius + 3] == 255).all()


@pytest.mark.parametrize("radius", [1.0, 4.0, 16.0])
def test_a_straight_edge_is_blurred_by_a_gaussian_of_the_radius(radius: float) -> None:
    mask = np.zeros((9, 201), dtype=bool)
    mask[:, 100:] = True
    profile = blurred(mask, radius)[4].astype(float) / 255
    assert (np.diff(profile) >= 0).all()
    spread = np.diff(profile)
    middle = (spread * np.arange(200)).sum()
    deviation = np.sqrt((spread * (np.arange(200) - middle) ** 2).sum())
    assert middle == pytest.approx(99, abs=0.1)
    assert deviation == pytest.approx(radius, rel=0.1)


@given(masks, st.floats(0.1, 4), st.integers(0, 2**32 - 1))
def test_old_pixels_are_exact_where_the_blend_is_nothing_and_new_ones_where_it_is_all(
    mask: Mask, radius: float, seed: int
) -> None:
    old, new = np.random.default_rng(seed).integers(0, 256, (2, *mask.shape, 3), dtype=np.uint8)
    blend = blurred(mask, radius)
    mixed = joined(old, new, blend)
    np.testing.assert_array_equal(mixed[blend == 0], old[blend == 0])
    np.testing.assert_array_equal(mixed[blend == 255], new[blend == 255])
    assert (mixed >= np.minimum(old, new)).all()
    assert (mixed <= np.maximum(old, new)).all()
    np.testing.assert_array_equal(joined(old, old, blend), old)


@given(masks, st.integers(1, 30), st.integers(1, 30))
def test_a_fitted_blend_of_one_value_stays_it(mask: Mask, width: int, height: int) -> None:
    for value in (0, 255):
        blend = np.full(mask.shape, value, dtype=np.uint8)
        assert (fit_blend(blend, (width, height)) == value).all()
    assert fit_blend(blurred(mask, 1.0), (width, height)).shape == (height, width)


@given(masks, st.integers(1, 30), st.integers(1, 30))
def test_a_smaller_blend_is_nothing_where_all_under_it_is(mask: Mask, width: int, height: int) -> None:
    """So what is kept of an image that is made smaller stays exact as far from the mask as it is said to."""
    blend = blurred(mask, 0.3)
    size = min(width, blend.shape[1]), min(height, blend.shape[0])
    touched = fit_mask(blend > 0, size)
    assert not fit_blend(blend, size)[~touched].any()


def test_a_pipeline_mixes_by_the_blend(text_bundle: Bundle) -> None:
    _, height, width = text_bundle.manifest.image_shape
    image = np.random.default_rng(3).integers(0, 256, (height, width, 3), dtype=np.uint8)
    mask = np.zeros((height, width), dtype=bool)
    mask[:2] = True
    blend = blurred(mask, 1.0)
    hard = Inpaint("a red cat", 4, 2.0, 7, image, blend > 0)
    with Pipeline.open(text_bundle.path, backend="fake") as pipeline:
        new, mixed = pipeline.run([hard, dataclasses.replace(hard, blend=blend)])
    assert 0 < (blend == 0).sum() < blend.size
    np.testing.assert_array_equal(mixed, joined(image, new, blend))
    np.testing.assert_array_equal(mixed[blend == 0], image[blend == 0])
    assert (mixed != new).any()


@pytest.mark.parametrize(
    ("change", "code"), [("shape", "mask_shape"), ("dtype", "mask_shape"), ("outside", "mask_blend")]
)
def test_a_blend_that_does_not_fit_its_mask_is_refused(text_bundle: Bundle, change: str, code: str) -> None:
    _, height, width = text_bundle.manifest.image_shape
    image = np.zeros((height, width, 3), dtype=np.uint8)
    repaint = np.zeros((height, width), dtype=bool)
    repaint[0] = True
    blend = {
        "shape": np.zeros((height, width + 1), dtype=np.uint8),
        "dtype": np.zeros((height, width), dtype=np.float32),
        "outside": np.ones((height, width), dtype=np.uint8),
    }[change]
    with Pipeline.open(text_bundle.path, backend="fake") as pipeline, pytest.raises(TaskError) as caught:
        pipeline.validate(Inpaint("a red cat", 4, 2.0, 7, image, repaint, blend=blend))  # type: ignore[arg-type]
    assert (caught.value.code, caught.value.param) == (code, "mask")
