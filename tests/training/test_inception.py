"""FID's network: only its published weights are taken, and features and score are torch-fidelity's."""

from __future__ import annotations

import socket
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from engines.hashes import sha256_of
from tests.training.small_models import write_inception
from training.evaluation import inception
from training.evaluation.features import FeatureError, Pixels
from training.evaluation.inception import LOGITS, POOLED, SCORE_SPLITS, Inception, inception_score
from training.evaluation.metrics import MetricError

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def weights(torch_fidelity: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        return write_inception(tmp_path_factory.mktemp("inception") / "random.pth", patch)


@pytest.fixture
def accepted(weights: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(inception, "WEIGHTS_SHA256", sha256_of(weights)[:8])
    return weights


def pictures(count: int) -> Pixels:
    return np.random.default_rng(0).integers(0, 256, (count, 8, 8, 3), np.uint8)


def test_features_are_pooled_ones_and_unbiased_logits_from_a_file_without_a_connection(
    accepted: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("a connection was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    network, images = Inception(accepted, CPU), pictures(3)
    features = network(images)
    assert features.shape == (3, POOLED + LOGITS)
    matrix = torch.load(accepted, weights_only=True)["fc.weight"].numpy()
    assert np.allclose(features[:, POOLED:], features[:, :POOLED] @ matrix.T, rtol=1e-3, atol=1e-3)
    assert not np.allclose(features[0], features[1], rtol=1e-2)
    assert np.allclose(network(images[1:2]), features[1:2], rtol=1e-3, atol=1e-4)
    assert sha256_of(accepted)[:12] in network.identity
    assert capfd.readouterr() == ("", "")


def test_other_weights_than_the_published_ones_are_refused(weights: Path) -> None:
    begins = sha256_of(weights)[:8]
    with pytest.raises(FeatureError, match=f"SHA-256 begins with {begins}, not with 6726825d"):
        Inception(weights, CPU)


def test_missing_weights_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FeatureError, match="is not a file"):
        Inception(tmp_path / "weights.pth", CPU)


def test_without_torch_fidelity_the_message_says_what_to_install(
    accepted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    with pytest.raises(FeatureError, match=r"pip install 'fewstep\[fid\]'"):
        Inception(accepted, CPU)


def test_the_score_is_one_for_equal_images_and_the_number_of_classes_for_sure_and_even_ones(
    torch_fidelity: ModuleType,
) -> None:
    equal = np.zeros((40, LOGITS), np.float32)
    assert inception_score(equal, seed=0) == pytest.approx((1, 0))
    # Two classes, each image surely of one. In a random split they are not quite even.
    sure = np.zeros((4000, LOGITS), np.float32)
    sure[np.arange(4000), np.arange(4000) % 2] = 100
    mean, deviation = inception_score(sure, seed=0)
    assert mean == pytest.approx(2, abs=0.02)
    assert 0 < deviation < 0.02
    assert inception_score(sure, seed=1) != (mean, deviation)


def test_a_score_of_fewer_images_than_splits_is_refused() -> None:
    with pytest.raises(MetricError, match="10 splits cannot be had from 9 images"):
        inception_score(np.zeros((SCORE_SPLITS - 1, LOGITS), np.float32), seed=0)
