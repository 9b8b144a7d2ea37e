"""Image files and colours: decoded to RGBA, fitted to a square, laid over a background."""

from __future__ import annotations

import io
import warnings
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from engines.images import scale_clear_colour, upright

Colour = tuple[int, int, int]
Fit = Literal["pad", "crop"]

_PHOTOMETRIC, _ZERO_IS_WHITE = 262, 0


def decode(data: bytes) -> Image.Image:
    """First frame of an image file as RGBA, turned as its EXIF orientation says.

    Raises ValueError, with a reason to show, when the file is empty, broken, truncated or absurdly large.
    """
    if not data:
        raise ValueError("the file is empty")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # such as of damaged EXIF
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(data)) as opened:
                if opened.format == "PNG":
                    scale_clear_colour(opened)
                image = upright(opened)
                return _rgba(_positive(image) if _is_negative(opened) else image)
    except UnidentifiedImageError:
        raise ValueError("not an image in a known format") from None
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise ValueError(f"too large: {error}") from error
    # Pillow's decoders report broken files with whatever they stumble over: SyntaxError, struct.error, IndexError ...
    except Exception as error:
        raise ValueError(f"broken image: {error}") from error


def _is_negative(opened: Image.Image) -> bool:
    """Whether it is 16-bit grey of a TIFF where 0 is white: with fewer bits Pillow turns it round by itself."""
    return opened.mode.startswith("I;16") and getattr(opened, "tag_v2", {}).get(_PHOTOMETRIC) == _ZERO_IS_WHITE


def _positive(grey: Image.Image) -> Image.Image:
    return Image.fromarray(65535 - np.asarray(grey))


def _rgba(image: Image.Image) -> Image.Image:
    if image.mode in ("I", "F"):
        raise ValueError(f"grey levels of 32 bits (mode {image.mode}) have no known range")
    if image.mode.startswith("I;16"):  # Pillow would clip it
        return _rgba_of_16_bits(image)
    if image.mode in ("CMYK", "YCbCr", "LAB", "HSV"):  # no direct way to RGBA
        return image.convert("RGB").convert("RGBA")
    return image.convert("RGBA")


def _rgba_of_16_bits(image: Image.Image) -> Image.Image:
    grey = np.asarray(image)
    rgba = Image.fromarray((grey >> 8).astype(np.uint8)).convert("RGBA")
    if isinstance(clear := image.info.get("transparency"), int):
        rgba.putalpha(Image.fromarray(np.where(grey == clear, 0, 255).astype(np.uint8)))
    return rgba


def fit_square(image: Image.Image, size: int, fit: Fit = "pad") -> Image.Image:
    """The image as RGBA of `size` x `size`, its aspect kept by transparent padding around it, or by a centre crop.

    Whole-number reductions average over areas, which keeps flat drawings crisp; other scales use Lanczos.
    """
    rgba = image.convert("RGBA")
    if fit == "crop":  # first, so that a long strip is never enlarged as a whole
        side = min(rgba.size)
        left, top = (rgba.width - side) // 2, (rgba.height - side) // 2
        rgba = rgba.crop((left, top, left + side, top + side))
    longest = max(rgba.size)
    fitted = (max(1, round(rgba.width * size / longest)), max(1, round(rgba.height * size / longest)))
    if fitted != rgba.size:
        exact = rgba.width % fitted[0] == 0 and rgba.height % fitted[1] == 0 and longest % size == 0
        rgba = rgba.resize(fitted, Image.Resampling.BOX if exact else Image.Resampling.LANCZOS)
    if fitted == (size, size):
        return rgba
    square = Image.new("RGBA", (size, size))
    square.paste(rgba, ((size - fitted[0]) // 2, (size - fitted[1]) // 2))
    return square


def composite(rgba: NDArray[np.uint8], background: Colour) -> NDArray[np.uint8]:
    """Straight-alpha RGBA (..., 4) over one colour: RGB (..., 3)."""
    alpha = rgba[..., 3:].astype(np.float32) / 255
    blended = rgba[..., :3] * alpha + np.asarray(background, np.float32) * (1 - alpha)
    return np.rint(blended).astype(np.uint8)
