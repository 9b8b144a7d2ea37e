"""scikit-learn's handwritten digits (8 x 8 grey) as RGB: an imagefolder, or arrays for fast tests."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm

from training.data.entries import DataError
from training.data.folder import SplitWriter, building, write_description
from training.data.pixels import fit_square

NATIVE_PX = 8
NATIVE_WHITE = 16
HELDOUT_FRACTION = 0.1
SPLIT_SEED = 0
NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
CLASSES = tuple(str(digit) for digit in range(10))

SOURCE = {
    "name": "scikit-learn digits",
    "licence": "CC-BY-4.0",
    "author": "E. Alpaydin, C. Kaynak (Optical Recognition of Handwritten Digits)",
    "url": "https://archive.ics.uci.edu/dataset/80",
}


def load_digits_images(size: int = NATIVE_PX, split: str = "train") -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Digits of a split: images (N, size, size, 3), white on black, and labels (N,) in 0..9.

    Raises DataError when `split` is neither "train" nor "heldout".
    """
    images, labels = _native()
    chosen = _indices(split, len(images))
    pictures = [_picture(images[i], size) for i in chosen]
    return np.stack([np.asarray(picture, np.uint8) for picture in pictures]), labels[chosen]


def build(out: Path, size: int = 32, overwrite: bool = False) -> Mapping[str, Any]:
    """Builds the set at `out` as an imagefolder and returns what dataset.json says.

    Raises OutputExistsError when `out` exists and is not to be replaced.
    """
    images, labels = _native()
    pictures = [_picture(image, size) for image in images]
    return write_digits(out, "digits", "Handwritten digits", SOURCE, pictures, labels, overwrite)


def write_digits(
    out: Path,
    name: str,
    title: str,
    source: Mapping[str, str],
    pictures: Sequence[Image.Image],
    labels: NDArray[np.int64],
    overwrite: bool,
) -> Mapping[str, Any]:
    """Writes pictures of one size and their labels (N,) in 0..9 as an imagefolder of two splits.

    Returns what dataset.json says. Raises OutputExistsError when `out` exists and is not to be replaced.
    """
    splits = {split: _indices(split, len(pictures)) for split in ("train", "heldout")}
    with building(out, overwrite) as root:
        for split, chosen in splits.items():
            writer = SplitWriter(root, split)
            for i in tqdm(chosen, desc=f"writing {split}", unit="image", disable=None):
                digit = int(labels[i])
                record = {"texts": captions(digit), "class_name": CLASSES[digit], "licence": source["licence"]}
                writer.write(f"{i:04d}.png", pictures[i], record)
            writer.close()
        description = {
            "name": name,
            "size": pictures[0].width,
            "sources": [source],
            "counts": {split: len(chosen) for split, chosen in splits.items()},
            "classes": dict(sorted(Counter(CLASSES[label] for label in labels).items())),
        }
        write_description(root, title, tuple(splits), description)
    return description


def captions(digit: int) -> tuple[str, ...]:
    """Captions of a digit."""
    return (f"a handwritten digit {digit}", f"the number {NAMES[digit]}", NAMES[digit], str(digit))


@cache
def _native() -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    from sklearn.datasets import load_digits  # slow to import

    bunch = load_digits()
    images = np.rint(bunch.images * (255 / NATIVE_WHITE)).astype(np.uint8)
    return images, bunch.target.astype(np.int64)


def _indices(split: str, count: int) -> NDArray[np.int64]:
    order = np.random.Generator(np.random.PCG64(SPLIT_SEED)).permutation(count)
    heldout = round(count * HELDOUT_FRACTION)
    parts = {"heldout": order[:heldout], "train": order[heldout:]}
    if split not in parts:
        raise DataError(f'the digits have no split "{split}"; they have train, heldout')
    return np.sort(parts[split])


def _picture(grey: NDArray[np.uint8], size: int) -> Image.Image:
    return fit_square(Image.fromarray(grey), size).convert("RGB")
