"""Images: bytes <-> arrays, masks, limits."""

from __future__ import annotations

import numpy as np

from engines.rows import Floats
from engines.tasks import Pixels


def from_pixels(image: Pixels) -> Floats:
    """uint8 (H, W, 3) -> float32 (3, H, W) in [-1, 1]."""
    return np.ascontiguousarray(image.transpose(2, 0, 1)).astype(np.float32) / np.float32(127.5) - np.float32(
        1
    )


def to_pixels(image: Floats) -> Pixels:
    """float32 (3, H, W) -> uint8 (H, W, 3), clipped to [-1, 1] first."""
    scaled = (np.clip(image, -1, 1) + np.float32(1)) * np.float32(127.5)
    return np.ascontiguousarray(np.rint(scaled).astype(np.uint8).transpose(1, 2, 0))
