"""The digits: real images, one split, the same in memory and on disk."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from sklearn.datasets import load_digits

from training.data import digits
from training.data.captioned import CaptionedImages
from training.data.digits import build, captions, load_digits_images
from training.data.entries import DataError


def test_splits_cover_the_digits_once() -> None:
    train, train_labels = load_digits_images()
    heldout, heldout_labels = load_digits_images(split="heldout")
    assert train.shape == (1617, 8, 8, 3)
    assert heldout.shape == (180, 8, 8, 3)
    assert train.dtype == np.uint8
    assert train_labels.dtype == np.int64
    ours = sorted(image[..., 0].tobytes() for image in (*train, *heldout))
    real = np.rint(load_digits().images * 255 / 16).astype(np.uint8)
    assert ours == sorted(image.tobytes() for image in real)
    assert np.bincount(train_labels).min() > 140
    assert np.bincount(heldout_labels, minlength=10).min() > 5
    with pytest.raises(DataError, match="train, heldout"):
        load_digits_images(split="test")


def test_the_folder_holds_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    some_images, some_labels = (array[:200] for array in digits._native())
    monkeypatch.setattr(digits, "_native", lambda: (some_images, some_labels))
    said = build(tmp_path / "digits", size=16)
    assert said["counts"] == {"train": 180, "heldout": 20}
    for split in ("train", "heldout"):
        opened = CaptionedImages.open(tmp_path / "digits", split, size=16)
        pixels, labels = load_digits_images(16, split)
        assert opened.classes == tuple("0123456789")
        assert np.array_equal(opened.labels, labels)
        assert np.array_equal(np.stack([opened.image(i) for i in range(len(opened))]), pixels)
        assert opened.texts(0) == captions(int(labels[0]))
