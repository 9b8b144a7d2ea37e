"""Tensors of images as PNG files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from training.store import whole_file


def to_uint8(images: Tensor) -> NDArray[np.uint8]:
    """Pixels (N, H, W, 3) of float images (N, 3, H, W) in [-1, 1], clipped."""
    pixels = (images.detach().float().cpu().clamp(-1, 1) + 1) * 127.5
    rounded: NDArray[np.uint8] = pixels.round().byte().permute(0, 2, 3, 1).numpy()
    return rounded


def from_uint8(images: Tensor) -> Tensor:
    """Float images in [-1, 1] of uint8 images."""
    return images.float().div(127.5).sub(1)


def save_grid(images: Tensor, path: Path, columns: int) -> None:
    """Write images (N, 3, H, W) as one PNG, `columns` in a row, each enlarged twice."""
    pixels = to_uint8(images)
    count, height, width, channels = pixels.shape
    rows = -(-count // columns)
    sheet = np.full((rows * columns, height, width, channels), 255, np.uint8)
    sheet[:count] = pixels
    sheet = sheet.reshape(rows, columns, height, width, channels).swapaxes(1, 2)
    picture = Image.fromarray(sheet.reshape(rows * height, columns * width, channels))
    enlarged = picture.resize((2 * picture.width, 2 * picture.height), Image.Resampling.NEAREST)
    with whole_file(path) as partial:
        enlarged.save(partial, "PNG")
