"""What is measured of a set of images: distances from real ones and, if asked for, FID, Inception Score, CLIP score."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import numpy as np
import torch

from training.evaluation.clip_score import ClipScorer
from training.evaluation.evaluation_set import EvaluationSet
from training.evaluation.features import FeatureExtractor, Features, Pixels
from training.evaluation.inception import POOLED, Inception, inception_score
from training.evaluation.metrics import (
    Projection,
    fit_gaussian,
    frechet_distance,
    gaussian_distance,
    kernel_distance,
    precision_and_recall,
)
from training.evaluation.quality import Figures
from training.store import Store, hash_of_array

# To be raised when a change of the code changes the figures that it makes of the same images.
VERSION = 2
CLIP_VERSION = 3
KID_SUBSETS = 100
NEIGHBOURS = 5


class Judge:
    """Measures images against the reference and against their own words. Features and figures are kept."""

    def __init__(
        self,
        data: EvaluationSet,
        extractor: FeatureExtractor,
        frechet_dims: int,
        seed: int,
        store: Store,
        inception: Inception | None = None,
        clip: ClipScorer | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        """The Frechet distance, precision and recall are taken in `frechet_dims` principal components.

        These are the reference's, in the features of `extractor`. `device` computes the kernels of KID.
        """
        self.data, self.extractor, self.inception, self.clip = data, extractor, inception, clip
        self.frechet_dims, self.seed, self.store, self.device = frechet_dims, seed, store, device
        self._reference_hash = hash_of_array(data.reference)
        self.reference = self._features(extractor, data.reference, self._reference_hash)

    def __call__(self, images: Pixels) -> Figures:
        """The figures of images (N, H, W, 3) of the first N conditions. Raises MetricError if they are too few."""
        images_hash = hash_of_array(images)
        figures = self._distances(images, images_hash)
        if self.inception is not None:
            figures |= self._inception_figures(self.inception, images, images_hash)
        if self.clip is not None:
            figures |= self._clip_figures(self.clip, images, images_hash)
        return Figures(**figures)

    def _distances(self, images: Pixels, images_hash: str) -> dict[str, Any]:
        key = {
            "version": VERSION,
            "extractor": self.extractor.identity,
            "images": images_hash,
            "reference": self._reference_hash,
            "kid_subsets": KID_SUBSETS,
            "frechet_dims": self.frechet_dims,
            "neighbours": NEIGHBOURS,
            "seed": self.seed,
        }
        return self.store.figures(
            "figures", key, lambda: self._measure(self._features(self.extractor, images, images_hash))
        )

    def _measure(self, features: Features) -> dict[str, Any]:
        projected, reference = self._project(features), self._project(self.reference)
        frechet = frechet_distance(projected, reference)
        kid = kernel_distance(features, self.reference, seed=self.seed, subsets=KID_SUBSETS, device=self.device)
        count = min(len(projected), len(reference))
        drawn = np.random.Generator(np.random.PCG64(self.seed)).permutation(len(reference))[:count]
        precision, recall = precision_and_recall(reference[drawn], projected[:count], NEIGHBOURS)
        return {
            "kid": kid.mean,
            "kid_deviation": kid.deviation,
            "kid_subset_images": kid.subset_images,
            "frechet": frechet,
            "precision": precision,
            "recall": recall,
            "manifold_images": count,
        }

    @cached_property
    def _project(self) -> Projection:
        return Projection.fit(self.reference, self.frechet_dims)

    def _inception_figures(self, inception: Inception, images: Pixels, images_hash: str) -> dict[str, Any]:
        def measure() -> dict[str, float]:
            features = self._features(inception, images, images_hash)
            reference = self._features(inception, self.data.reference, self._reference_hash)
            score, deviation = inception_score(features[:, POOLED:], self.seed)
            # FID is defined without a projection, and so on fewer images than dimensions too.
            fid = gaussian_distance(*fit_gaussian(features[:, :POOLED]), *fit_gaussian(reference[:, :POOLED]))
            return {"fid": fid, "inception_score": score, "inception_score_deviation": deviation}

        key = {
            "version": VERSION,
            "extractor": inception.identity,
            "images": images_hash,
            "reference": self._reference_hash,
            "seed": self.seed,
        }
        return self.store.figures("inception", key, measure)

    def _clip_figures(self, clip: ClipScorer, images: Pixels, images_hash: str) -> dict[str, Any]:
        words = self.data.words[: len(images)]
        key = {"version": CLIP_VERSION, "clip": clip.identity, "images": images_hash, "words": words}
        return self.store.figures("clip", key, lambda: {"clip_score": float(clip(images, words).mean())})

    def _features(self, extractor: FeatureExtractor, images: Pixels, images_hash: str) -> Features:
        key = {"extractor": extractor.identity, "images": images_hash}
        return self.store.array("features", key, lambda: extractor(images))
