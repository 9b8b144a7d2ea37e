"""Distances between two sets of images, given their features. Pure functions on arrays; knows no images."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from scipy.spatial.distance import cdist
from torch import Tensor

Array = NDArray[np.float64]
DISTANCES_AT_ONCE = 1 << 20


class MetricError(ValueError):
    """Too few images for the figure that is asked for; the message gives the counts."""


@dataclass(frozen=True)
class KernelDistance:
    """Mean and standard deviation of the squared MMD over random subsets of `subset_images` images a side."""

    mean: float
    deviation: float
    subset_images: int


def polynomial_kernel(x: Tensor, y: Tensor) -> Tensor:
    """k(a, b) = (a . b / D + 1)^3 for all pairs: (N, M) of x (N, D) and y (M, D) (Binkowski et al. 2018)."""
    return (x @ y.T / x.shape[1] + 1) ** 3


def squared_mmd(x: ArrayLike, y: ArrayLike) -> float:
    """The unbiased squared maximum mean discrepancy of x (N, D) and y (M, D) (Gretton et al. 2012, equation 3).

    Zero on average, and so at times negative, when both are drawn from one distribution.
    """
    x, y = _features(x, y)
    return _squared_mmd(torch.from_numpy(x), torch.from_numpy(y))


def _squared_mmd(x: Tensor, y: Tensor) -> float:
    within_x, within_y = polynomial_kernel(x, x), polynomial_kernel(y, y)
    return float(
        (within_x.sum() - within_x.trace()) / (len(x) * (len(x) - 1))
        + (within_y.sum() - within_y.trace()) / (len(y) * (len(y) - 1))
        - 2 * polynomial_kernel(x, y).mean()
    )


def default_subset_images(n: int, m: int) -> int:
    """Images a subset for sets of n and m: 1000 as is usual, but at most half of the smaller set."""
    return min(1000, min(n, m) // 2)


def kernel_distance(
    x: ArrayLike,
    y: ArrayLike,
    *,
    seed: int,
    subsets: int = 100,
    subset_images: int | None = None,
    device: torch.device | str = "cpu",
) -> KernelDistance:
    """KID (Binkowski et al. 2018): the unbiased squared MMD of x (N, D) and y (M, D), averaged over subsets.

    The same seed and counts give the same subsets, so that sets of equal sizes are compared pairwise. `device` computes
    the kernels, in float64.
    Raises MetricError if a subset would have fewer than two images or more than there are.
    """
    x, y = _features(x, y)
    size = default_subset_images(len(x), len(y)) if subset_images is None else subset_images
    if not 2 <= size <= min(len(x), len(y)):
        raise MetricError(f"KID on subsets of {size} images cannot be had from {len(x)} and {len(y)} images")
    random = np.random.Generator(np.random.PCG64(seed))
    all_x, all_y = (torch.from_numpy(side).to(device) for side in (x, y))

    def drawn(side: Tensor) -> Tensor:
        return side[torch.from_numpy(random.choice(len(side), size, replace=False)).to(device)]

    values = [_squared_mmd(drawn(all_x), drawn(all_y)) for _ in range(subsets)]
    return KernelDistance(float(np.mean(values)), float(np.std(values)), size)


@dataclass(frozen=True)
class Projection:
    """A principal-component projection: (x - mean) components^T. `mean` (D,), `components` (d, D) orthonormal."""

    mean: Array
    components: Array

    @classmethod
    def fit(cls, reference: ArrayLike, dims: int) -> Projection:
        """The `dims` directions in which reference (N, D) varies most. Raises MetricError unless dims < N, <= D."""
        x = _finite(reference)
        if not 1 <= dims <= min(len(x) - 1, x.shape[1]):
            raise MetricError(f"{len(x)} images of {x.shape[1]} features span no {dims} dimensions")
        mean: Array = x.mean(axis=0)
        # Ascending eigenvalues; the last are the largest.
        vectors = np.linalg.eigh(covariance(x)).eigenvectors
        return cls(mean, np.ascontiguousarray(vectors[:, : -dims - 1 : -1].T))

    def __call__(self, x: ArrayLike) -> Array:
        """Features (N, d) of features (N, D)."""
        projected: Array = (np.asarray(x, np.float64) - self.mean) @ self.components.T
        return projected


def covariance(x: Array) -> Array:
    """The unbiased covariance (D, D) of x (N, D)."""
    centred = x - x.mean(axis=0)
    return np.asarray(centred.T @ centred / (len(x) - 1))


def symmetric_sqrt(matrix: Array) -> Array:
    """The square root of a symmetric positive semidefinite matrix; eigenvalues below zero are rounding, and zero."""
    values, vectors = np.linalg.eigh(matrix)
    root: Array = (vectors * np.sqrt(values.clip(min=0))) @ vectors.T
    return root


def fit_gaussian(x: ArrayLike) -> tuple[Array, Array]:
    """The mean (D,) and the unbiased covariance (D, D) of x (N, D). Raises MetricError for a single vector."""
    x = _finite(x)
    if len(x) < 2:
        raise MetricError(f"{len(x)} images are too few for a covariance: it needs two")
    return x.mean(axis=0), covariance(x)


def gaussian_distance(mean_x: Array, cov_x: Array, mean_y: Array, cov_y: Array) -> float:
    """The squared Frechet distance of two Gaussians (Dowson & Landau 1982).

    |m_x - m_y|^2 + tr(C_x + C_y - 2 (C_x C_y)^(1/2)). The trace of the root is that of the root of the symmetric
    C_x^(1/2) C_y C_x^(1/2), which has the same eigenvalues: real, and not negative but for rounding.
    """
    root = symmetric_sqrt(cov_x)
    eigenvalues = np.linalg.eigvalsh(root @ cov_y @ root).clip(min=0)
    distance = np.sum((mean_x - mean_y) ** 2) + np.trace(cov_x) + np.trace(cov_y) - 2 * np.sqrt(eigenvalues).sum()
    return max(0.0, float(distance))


def frechet_distance(x: ArrayLike, y: ArrayLike) -> float:
    """The squared Frechet distance of Gaussians fitted to x (N, D) and y (M, D).

    Biased upwards in small sets, the more so the larger D: project the features first, compare sets of equal sizes,
    and give the distance of as many real images beside it. Raises MetricError unless both sets exceed D.
    """
    x, y = _features(x, y)
    if min(len(x), len(y)) <= x.shape[1]:
        raise MetricError(
            f"a Frechet distance in {x.shape[1]} dimensions cannot be had from {len(x)} and {len(y)} images: "
            "it needs more images than dimensions"
        )
    return gaussian_distance(*fit_gaussian(x), *fit_gaussian(y))


def precision_and_recall(real: ArrayLike, generated: ArrayLike, neighbours: int) -> tuple[float, float]:
    """Improved precision and recall (Kynkaanniemi et al. 2019, equations 1 and 2) of features (N, D) each.

    Precision is the share of generated images that lie within a ball about some real one, its radius the distance
    to that one's k-th nearest neighbour among the real; recall the same with the sides exchanged. Both depend on N.
    Raises MetricError unless there are equally many of both, and more than `neighbours`.
    """
    real, generated = _features(real, generated)
    if len(real) != len(generated) or len(real) <= neighbours:
        raise MetricError(
            f"precision and recall of {neighbours} neighbours cannot be had from {len(real)} real and "
            f"{len(generated)} generated images: they need equally many, and more than neighbours"
        )
    radii, generated_radii = _neighbour_distances(real, neighbours), _neighbour_distances(generated, neighbours)
    is_near_real, is_near_generated = np.zeros(len(generated), bool), np.zeros(len(real), bool)
    for rows, between in _distances(real, generated):
        is_near_real |= (between <= radii[rows, None]).any(axis=0)
        is_near_generated[rows] = (between <= generated_radii).any(axis=1)
    return float(is_near_real.mean()), float(is_near_generated.mean())


def _neighbour_distances(x: Array, neighbours: int) -> Array:
    """The distance (N,) from each of x (N, D) to its k-th nearest neighbour; the nearest of all is itself."""
    found = np.empty(len(x))
    for rows, distances in _distances(x, x):
        distances.partition(neighbours, axis=1)
        found[rows] = distances[:, neighbours]
    return found


def _distances(x: Array, y: Array) -> Iterator[tuple[slice, Array]]:
    """The distances (n, M) from rows of x (N, D), which a slice tells, to y (M, D), some rows at once."""
    count = max(1, DISTANCES_AT_ONCE // len(y))
    for start in range(0, len(x), count):
        rows = slice(start, start + count)
        yield rows, cdist(x[rows], y)


def root_mean_square_error(images: NDArray[np.uint8], others: NDArray[np.uint8]) -> float:
    """Of all pixels of two equal stacks of images, with white as 1 and black as 0."""
    total = 0.0
    for image, other in zip(images, others, strict=True):  # one by one, as these are eight times as large
        total += float(np.square(image.astype(np.float64) - other.astype(np.float64)).sum())
    return math.sqrt(total / images.size) / 255


def _finite(x: ArrayLike) -> Array:
    """Features (N, D) in float64. Raises MetricError for those that are not finite, of which a metric says nothing."""
    features = np.asarray(x, np.float64)
    if bad := int((~np.isfinite(features)).any(axis=tuple(range(1, features.ndim))).sum()):
        raise MetricError(f"the features of {bad} of {len(features)} images are not finite")
    return features


def _features(x: ArrayLike, y: ArrayLike) -> tuple[Array, Array]:
    x, y = _finite(x), _finite(y)
    if x.ndim != 2 or y.ndim != 2 or x.shape[1] != y.shape[1]:
        raise ValueError(f"features of shapes {x.shape} and {y.shape} cannot be compared")
    if min(len(x), len(y)) < 2:
        raise MetricError(f"{len(x)} and {len(y)} images are too few: each set needs two")
    return x, y
