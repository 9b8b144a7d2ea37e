"""The distances: laws, closed forms, and what too few images do."""

from __future__ import annotations

import math
import tracemalloc

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.linalg import sqrtm
from scipy.spatial.distance import cdist

from engines.decibels import psnr_db
from training.evaluation.metrics import (
    MetricError,
    Projection,
    covariance,
    fit_gaussian,
    frechet_distance,
    gaussian_distance,
    kernel_distance,
    precision_and_recall,
    root_mean_square_error,
    squared_mmd,
    symmetric_sqrt,
)

Array = NDArray[np.float64]


def draw(seed: int, rows: int, dim: int, shift: float = 0.0) -> Array:
    return np.random.default_rng(seed).normal(shift, 1.0, (rows, dim))


def spd(seed: int, dim: int) -> Array:
    factor = draw(seed, dim, dim)
    return factor @ factor.T + 0.1 * np.eye(dim)


def test_squared_mmd_is_the_sum_over_pairs() -> None:
    x, y = draw(0, 5, 3), draw(1, 7, 3, shift=0.5)

    def kernel(a: Array, b: Array) -> float:
        return float((a @ b / 3 + 1) ** 3)

    expected = (
        sum(kernel(x[i], x[j]) for i in range(5) for j in range(5) if i != j) / 20
        + sum(kernel(y[i], y[j]) for i in range(7) for j in range(7) if i != j) / 42
        - 2 * sum(kernel(a, b) for a in x for b in y) / 35
    )
    assert squared_mmd(x, y) == pytest.approx(expected)
    assert squared_mmd(y, x) == pytest.approx(expected)


def test_squared_mmd_is_unbiased() -> None:
    same = [squared_mmd(draw(seed, 20, 4), draw(1000 + seed, 30, 4)) for seed in range(400)]
    error = np.std(same) / math.sqrt(len(same))
    assert abs(np.mean(same)) < 4 * error
    assert min(same) < 0
    other = [squared_mmd(draw(seed, 20, 4), draw(1000 + seed, 30, 4, shift=0.5)) for seed in range(100)]
    assert np.mean(other) > 20 * error


def test_kernel_distance_averages_over_subsets_that_the_seed_chooses() -> None:
    x, y = draw(0, 60, 4), draw(1, 80, 4, shift=0.3)
    kid = kernel_distance(x, y, seed=5, subsets=300)
    assert kid.subset_images == 30
    assert kid == kernel_distance(x, y, seed=5, subsets=300)
    assert kid != kernel_distance(x, y, seed=6, subsets=300)
    assert kid.mean == pytest.approx(squared_mmd(x, y), abs=4 * kid.deviation / math.sqrt(300))
    whole = kernel_distance(x, y[:60], seed=5, subsets=3, subset_images=60)
    assert whole.mean == pytest.approx(squared_mmd(x, y[:60]))
    assert whole.deviation < 1e-12


@pytest.mark.parametrize("subset_images", [1, 11])
def test_kernel_distance_refuses_impossible_subsets(subset_images: int) -> None:
    with pytest.raises(MetricError, match=f"subsets of {subset_images} images"):
        kernel_distance(draw(0, 10, 2), draw(1, 20, 2), seed=0, subset_images=subset_images)


def test_gaussian_distance_in_one_dimension() -> None:
    distance = gaussian_distance(np.array([1.0]), np.array([[4.0]]), np.array([-0.5]), np.array([[0.25]]))
    assert distance == pytest.approx(1.5**2 + (2 - 0.5) ** 2)


@pytest.mark.parametrize("dim", [2, 8, 32])
def test_gaussian_distance_agrees_with_the_matrix_square_root(dim: int) -> None:
    mean_x, mean_y = draw(0, 1, dim)[0], draw(1, 1, dim)[0]
    cov_x, cov_y = spd(2, dim), spd(3, dim)
    root = np.real(sqrtm(cov_x @ cov_y))
    expected = np.sum((mean_x - mean_y) ** 2) + np.trace(cov_x + cov_y - 2 * root)
    assert gaussian_distance(mean_x, cov_x, mean_y, cov_y) == pytest.approx(expected)
    assert gaussian_distance(mean_y, cov_y, mean_x, cov_x) == pytest.approx(expected)
    assert gaussian_distance(mean_x, cov_x, mean_x, cov_x) == pytest.approx(0, abs=1e-6)


def test_gaussian_distance_of_singular_covariances() -> None:
    """Where a general matrix square root warns, or turns complex."""
    basis = np.linalg.qr(draw(0, 64, 64)).Q
    cov_x = basis[:, :3] @ np.diag([1.0, 2.0, 1e-9]) @ basis[:, :3].T
    cov_y = basis[:, 10:12] @ basis[:, 10:12].T
    zero = np.zeros(64)
    assert gaussian_distance(zero, cov_x, zero, cov_y) == pytest.approx(3 + 2, abs=1e-6)
    assert gaussian_distance(zero, cov_x, zero, cov_x) == pytest.approx(0, abs=1e-6)
    assert gaussian_distance(zero, np.zeros((64, 64)), zero, cov_y) == pytest.approx(2)


def test_symmetric_sqrt_squares_to_the_matrix() -> None:
    matrix = spd(0, 12)
    root = symmetric_sqrt(matrix)
    assert np.allclose(root @ root, matrix)
    assert np.allclose(root, root.T)


def test_frechet_distance_ignores_rotations_and_translations_of_both() -> None:
    x, y = draw(0, 200, 6), 2 * draw(1, 150, 6) + 1
    rotation = np.linalg.qr(draw(2, 6, 6)).Q
    distance = frechet_distance(x, y)
    assert distance == pytest.approx(frechet_distance(x @ rotation + 3, y @ rotation + 3))
    assert frechet_distance(x, x) == pytest.approx(0, abs=1e-9)
    # Population value: six dimensions, each of mean 1 apart and standard deviations 1 and 2.
    assert distance == pytest.approx(12, rel=0.2)


def test_frechet_distance_refuses_fewer_images_than_dimensions() -> None:
    with pytest.raises(MetricError, match="8 dimensions cannot be had from 8 and 20 images"):
        frechet_distance(draw(0, 8, 8), draw(1, 20, 8))


def test_a_gaussian_is_fitted_to_two_images_or_more() -> None:
    mean, cov = fit_gaussian([[1.0, 0.0], [3.0, 4.0]])
    assert mean.tolist() == [2, 2]
    assert cov.tolist() == [[2, 4], [4, 8]]
    with pytest.raises(MetricError, match="1 images are too few"):
        fit_gaussian([[1.0, 0.0]])


def test_precision_and_recall_follow_their_definition() -> None:
    real, generated = draw(0, 30, 3), 0.7 * draw(1, 30, 3) + 1.6

    def share(of: Array, within: Array) -> float:
        radii = [sorted(math.dist(a, b) for b in within)[4] for a in within]
        inside = [any(math.dist(x, a) <= r for a, r in zip(within, radii, strict=True)) for x in of]
        return sum(inside) / len(of)

    precision, recall = precision_and_recall(real, generated, neighbours=4)
    assert (precision, recall) == pytest.approx((share(generated, real), share(real, generated)))
    assert precision != recall
    assert min(precision, recall) > 0
    assert max(precision, recall) < 1


def test_precision_and_recall_need_no_memory_for_all_distances_and_are_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    real, generated = draw(0, 1500, 4), 0.5 + draw(1, 1500, 4)
    tracemalloc.start()
    found = precision_and_recall(real, generated, 5)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 * 1500**2
    for at_once in (1, 7 * 1500, 1500**2):  # a row, rows that leave a rest, all
        monkeypatch.setattr("training.evaluation.metrics.DISTANCES_AT_ONCE", at_once)
        assert precision_and_recall(real, generated, 5) == found
    between, within = cdist(real, generated), np.sort(cdist(real, real), axis=1)[:, 5]
    assert found[0] == (between <= within[:, None]).any(axis=0).mean()


def test_precision_and_recall_tell_quality_from_variety() -> None:
    real = draw(0, 500, 4)
    assert min(precision_and_recall(real, draw(1, 500, 4), 5)) > 0.9
    assert precision_and_recall(real, real + 100, 5) == (0, 0)
    assert precision_and_recall(real, real, 5) == (1, 1)
    precision, recall = precision_and_recall(real, 0.3 * draw(1, 500, 4), 5)
    assert precision > 0.99
    assert recall < 0.5


@pytest.mark.parametrize(("real", "generated"), [(5, 5), (20, 21)])
def test_precision_and_recall_refuse_unequal_or_too_few_images(real: int, generated: int) -> None:
    with pytest.raises(MetricError, match=f"from {real} real and {generated} generated images"):
        precision_and_recall(draw(0, real, 2), draw(1, generated, 2), 5)


def test_projection_keeps_the_directions_of_most_variance() -> None:
    scales = np.array([0.1, 5.0, 1.0, 3.0])
    x = draw(0, 2000, 4) * scales + 7
    project = Projection.fit(x, 2)
    assert np.allclose(project.components @ project.components.T, np.eye(2))
    assert np.allclose(np.abs(project.components), [[0, 1, 0, 0], [0, 0, 0, 1]], atol=0.05)
    projected = project(x)
    assert np.allclose(projected.mean(axis=0), 0, atol=1e-9)
    assert np.allclose(covariance(projected), np.diag([25, 9]), atol=1.5)
    assert np.allclose(covariance(projected) - np.diag(np.diag(covariance(projected))), 0, atol=1e-9)


@pytest.mark.parametrize(("rows", "dims"), [(10, 10), (50, 9), (50, 0)])
def test_projection_refuses_dimensions_that_the_reference_does_not_span(rows: int, dims: int) -> None:
    with pytest.raises(MetricError, match=f"{rows} images of 8 features span no {dims} dimensions"):
        Projection.fit(draw(0, rows, 8), dims)


def test_features_of_different_spaces_are_refused() -> None:
    with pytest.raises(ValueError, match="cannot be compared"):
        squared_mmd(draw(0, 5, 3), draw(1, 5, 4))
    with pytest.raises(MetricError, match="too few"):
        squared_mmd(draw(0, 1, 3), draw(1, 5, 3))


def test_features_that_are_not_finite_are_refused_by_every_metric() -> None:
    sound, bad = draw(0, 60, 8), draw(1, 60, 8)
    bad[3, 2], bad[7] = np.nan, np.inf
    for measure in (
        lambda: frechet_distance(sound, bad),
        lambda: kernel_distance(bad, sound, seed=0),
        lambda: precision_and_recall(sound, bad, 3),
        lambda: fit_gaussian(bad),
        lambda: Projection.fit(bad, 4),
    ):
        with pytest.raises(MetricError, match="the features of 2 of 60 images are not finite"):
            measure()


def test_error_in_image_space() -> None:
    black, white = np.zeros((2, 4, 4, 3), np.uint8), np.full((2, 4, 4, 3), 255, np.uint8)
    assert root_mean_square_error(black, white) == 1
    assert root_mean_square_error(white, np.concatenate([white[:1], black[:1]])) == pytest.approx(math.sqrt(0.5))
    assert psnr_db(0.1**2) == pytest.approx(20)
    assert psnr_db(2.55**2, peak=255) == pytest.approx(40)
    assert psnr_db(root_mean_square_error(white, white)) == math.inf
