"""Pictures of Pillow made smaller, cut and turned into tensors."""

from __future__ import annotations

from enum import Enum

import numpy as np
import torch
from PIL.Image import Image
from torch import Tensor


def resize(image: Image, size: int, interpolation: Enum) -> Image:
    """The image with its shorter side made `size` pixels."""
    scale = size / min(image.size)
    width, height = (round(side * scale) for side in image.size)
    return image.resize((width, height), interpolation.value)


def crop(image: Image, top: int, left: int, height: int, width: int) -> Image:
    """A part of the image."""
    return image.crop((left, top, left + width, top + height))


def pil_to_tensor(image: Image) -> Tensor:
    """(3, H, W) in 0..255."""
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)


def to_tensor(image: Image) -> Tensor:
    """(3, H, W) in 0..1."""
    return pil_to_tensor(image).float() / 255


def normalize(image: Tensor, mean: list[float], std: list[float]) -> Tensor:
    """(image - mean) / std, for one mean and one standard deviation of all channels."""
    return (image - mean[0]) / std[0]
