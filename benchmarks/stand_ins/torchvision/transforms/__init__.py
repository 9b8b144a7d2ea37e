"""RandomCrop's draw and the names of the interpolations."""

from __future__ import annotations

import random
from enum import Enum

from PIL.Image import Image, Resampling

from torchvision.transforms import functional as functional


class InterpolationMode(Enum):
    """As Pillow numbers them."""

    BILINEAR = Resampling.BILINEAR
    BICUBIC = Resampling.BICUBIC
    BOX = Resampling.BOX
    NEAREST = Resampling.NEAREST
    NEAREST_EXACT = "nearest-exact"  # which Pillow does not have; transformers names it
    HAMMING = Resampling.HAMMING
    LANCZOS = Resampling.LANCZOS


class RandomCrop:
    """Where a crop may lie."""

    @staticmethod
    def get_params(image: Image, output_size: tuple[int, int]) -> tuple[int, int, int, int]:
        """Top, left, height and width of a random crop of `output_size` (height, width)."""
        height, width = output_size
        return random.randint(0, image.height - height), random.randint(0, image.width - width), height, width
