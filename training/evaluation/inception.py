"""FID's own network: the Inception of 2015-12-05, as PyPI torch-fidelity builds it, with weights that the user has."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engines.hashes import sha256_of
from training.evaluation.features import FeatureError, Features, Pixels, in_batches
from training.evaluation.metrics import MetricError

# What the SHA-256 of the published weights-inception-2015-12-05-6726825d.pth begins with.
WEIGHTS_SHA256 = "6726825d"
POOLED, LOGITS = 2048, 1008
SCORE_SPLITS = 10


class Inception:
    """The 2048 pooled features of an image that FID is defined on, and after them its 1008 unbiased logits."""

    dim = POOLED + LOGITS

    def __init__(self, weights: Path, device: torch.device) -> None:
        """Load weights from a file. Raises FeatureError for a file of other weights, or without torch-fidelity."""
        if not weights.is_file():
            raise FeatureError(f"{weights} is not a file")
        found = sha256_of(weights)
        if not found.startswith(WEIGHTS_SHA256):
            raise FeatureError(
                f"{weights} does not hold the Inception weights of 2015-12-05: "
                f"its SHA-256 begins with {found[:8]}, not with {WEIGHTS_SHA256}"
            )
        self.device, self.identity = device, f"Inception of 2015-12-05, weights {found[:12]}, images at 299 px"
        extractor = _torch_fidelity("feature_extractor_inceptionv3").FeatureExtractorInceptionV3
        self._network = extractor("inception", ["2048", "logits_unbiased"], str(weights)).to(device).eval()

    def __call__(self, images: Pixels) -> Features:
        """Features (N, 3056) of images (N, H, W, 3)."""
        return in_batches(self._batch, images, self.dim)

    @torch.inference_mode()
    def _batch(self, images: Pixels) -> Tensor:
        return torch.cat(self._network(torch.tensor(images).permute(0, 3, 1, 2).to(self.device)), dim=1)


def inception_score(logits: NDArray[np.float32], seed: int) -> tuple[float, float]:
    """The Inception Score (Salimans et al. 2016), its mean and standard deviation over 10 random splits.

    `logits` (N, 1008) without bias. Raises MetricError for fewer images than splits.
    """
    if len(logits) < SCORE_SPLITS:
        raise MetricError(f"an Inception Score of {SCORE_SPLITS} splits cannot be had from {len(logits)} images")
    score = _torch_fidelity("metric_isc").isc_features_to_metric
    values = score(torch.from_numpy(logits), splits=SCORE_SPLITS, shuffle=True, rng_seed=seed % 2**32)
    return values["inception_score_mean"], values["inception_score_std"]


def _torch_fidelity(module: str) -> ModuleType:
    try:
        import torch_fidelity.feature_extractor_inceptionv3
        import torch_fidelity.metric_isc
    # A torchvision built for another torch, which torch-fidelity imports, fails with a RuntimeError.
    except (ImportError, RuntimeError) as error:
        raise FeatureError(f"FID needs torch-fidelity ({error}): pip install 'fewstep[fid]'") from error
    found: ModuleType = getattr(torch_fidelity, module)
    return found
