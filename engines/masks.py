"""The edge of an inpainting's mask: grown or shrunk, blurred, and how the old pixels and the new are joined there."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageFilter

from engines.tasks import Blend, Mask, Pixels

MAX_BLUR_PX = 256
MAX_GROW_PX = 256


def grown(mask: Mask, pixels: int) -> Mask:
    """The mask (H, W) with every pixel that lies within ``pixels`` of a marked one, by rows and by columns.

    A negative number takes away what lies that near to an unmarked pixel; the border of the image counts as marked.
    """
    if pixels < 0:
        return ~grown(~mask, -pixels)
    return _spread(_spread(mask, pixels).T, pixels).T


def _spread(mask: Mask, pixels: int) -> Mask:
    """Each row the union of those within ``pixels`` of it, in as many steps as their number has bits."""
    union: Mask = np.pad(mask, ((pixels, pixels), (0, 0)))
    joined_rows, wanted = 1, 2 * pixels + 1
    while joined_rows < wanted:
        step = min(joined_rows, wanted - joined_rows)
        union = union[:-step] | union[step:]
        joined_rows += step
    return union


def blurred(mask: Mask, radius: float) -> Blend:
    """How much of the new image shows where, uint8 (H, W): the mask under a Gaussian of that standard deviation.

    ``radius`` is in pixels. 0 is none of it, 255 nothing else. It is exactly 0 wherever every marked pixel is farther
    away than 3 x ``radius`` + 3, by rows or by columns.
    """
    picture = Image.fromarray(np.where(mask, 255, 0).astype(np.uint8))
    return np.array(picture.filter(ImageFilter.GaussianBlur(radius)))


def fit_blend(blend: Blend, size: tuple[int, int]) -> Blend:
    """Resize a blend (H, W) to ``size`` (width, height); the same size is a copy.

    A pixel of a smaller one is the mean of what lies under it and of nothing beside: it is 0 where all of that is.
    """
    height, width = blend.shape
    if (width, height) == size:
        return blend.copy()
    shrinks = size[0] < width or size[1] < height
    return np.array(Image.fromarray(blend).resize(size, Image.Resampling.BOX if shrinks else Image.Resampling.BILINEAR))


def joined(old: Pixels, new: Pixels, blend: Blend) -> Pixels:
    """Images (H, W, 3) mixed by ``blend`` (H, W): exactly ``old`` where it is 0, exactly ``new`` where it is 255."""
    share = blend[..., None].astype(np.uint32)
    mixed = (share * new + (255 - share) * old + 127) // 255
    return mixed.astype(np.uint8)
