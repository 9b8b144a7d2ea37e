"""The extractors: one vector an image whatever its company, from weights that are on the disk."""

from __future__ import annotations

import socket
from functools import cache

import numpy as np
import pytest
import torch
from sklearn.datasets import load_sample_image

from training.evaluation import features
from training.evaluation.features import (
    EXTRACTORS,
    EfficientNetLite0,
    FeatureError,
    FeatureExtractor,
    PixelFeatures,
    Pixels,
    open_extractor,
    resize,
)

IMAGENET_PALACE = 698


@cache
def extractor(name: str) -> FeatureExtractor:
    return open_extractor(name)


def pictures(count: int, size: int = 20) -> Pixels:
    return np.random.default_rng(0).integers(0, 256, (count, size, size, 3), np.uint8)


@pytest.mark.parametrize("name", EXTRACTORS)
def test_the_features_of_an_image_do_not_depend_on_its_company(name: str) -> None:
    extract, images = extractor(name), pictures(features.BATCH_IMAGES + 2)
    together = extract(images)
    assert together.shape == (len(images), extract.dim)
    assert together.dtype == np.float32
    alone = extract(images[-1:])
    assert np.allclose(alone, together[-1:], rtol=1e-3, atol=1e-4)
    assert not np.allclose(alone, together[:1], atol=1e-2)
    assert extract(images[:0]).shape == (0, extract.dim)


def test_efficientnet_sees_what_is_in_a_photograph() -> None:
    """A palace, by the network's own classifier on our features: weights, order of colours and range are right."""
    extract = EfficientNetLite0(torch.device("cpu"), size=224)
    photograph = load_sample_image("china.jpg")[:, 100:527][None]
    scores = extract._network._fc(torch.from_numpy(extract(photograph)))  # type: ignore[operator]
    assert int(scores.argmax()) == IMAGENET_PALACE


def test_efficientnet_loads_offline_and_silently(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("a connection was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    identity = EfficientNetLite0(torch.device("cpu"), size=64).identity
    assert "EfficientNet-Lite0" in identity
    assert "64 px" in identity
    assert capfd.readouterr() == ("", "")


def test_an_extractor_whose_package_is_missing_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(package: str) -> None:
        raise ModuleNotFoundError(package)

    monkeypatch.setattr(features, "files", missing)
    with pytest.raises(FeatureError, match=r"fewstep\[training\]"):
        EfficientNetLite0(torch.device("cpu"))


def test_an_unknown_extractor_is_refused_with_those_there_are() -> None:
    with pytest.raises(FeatureError, match="'inception'; there are efficientnet-lite0, pixels"):
        open_extractor("inception")


def test_pixel_features_are_the_pixels() -> None:
    images = pictures(3, size=8)
    expected = images.transpose(0, 3, 1, 2).reshape(3, -1) / 255
    assert np.allclose(PixelFeatures(8)(images), expected)


def test_resizing_keeps_range_and_flat_colours() -> None:
    x = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)).round() * 255
    for size in (7, 16, 50):
        resized = resize(x, size)
        assert resized.shape == (2, 3, size, size)
        assert resized.min() >= 0
        assert resized.max() <= 255
        assert torch.allclose(resize(torch.full_like(x, 90.0), size), torch.tensor(90.0))
    assert torch.equal(resize(x, 16), x)
