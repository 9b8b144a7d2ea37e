"""Pictures as a caller has them -> bytes of an image file that the service reads."""

from __future__ import annotations

import io
import os
from pathlib import Path

import numpy as np
import PIL.Image

from engines.images import scale_clear_colour, upright
from service.client.answers import MadeImage

Picture = PIL.Image.Image | MadeImage | bytes | str | os.PathLike[str]
"""An image or a mask: decoded, as it came from this client, the bytes of a file, or the path of one.

Pillow forgets the depth of a PNG once its pixels are used: after that, a transparent colour that the file stated in 2,
4 or 3 x 16 bits is another. Its bytes or its path are safe.
"""

_MODES_OF_PNG = frozenset({"1", "L", "LA", "P", "RGB", "RGBA", "I;16"})
# Pillow has no conversion of the one, and clips the other, whose range is anybody's.
_REFUSED_MODES = frozenset({"La", "F"})
_MAX_GREY = 0xFFFF


def file_bytes(picture: Picture) -> bytes:
    """A file with this picture. Raises OSError for a path that cannot be read, ValueError for values no file holds."""
    if isinstance(picture, bytes):
        return picture
    if isinstance(picture, MadeImage):
        return picture.data
    if isinstance(picture, PIL.Image.Image):
        return _png(picture)
    return Path(picture).read_bytes()


def _png(picture: PIL.Image.Image) -> bytes:
    scale_clear_colour(picture)  # Before the copy, which has it decoded.
    # The file that is written does not say which way is up, so the pixels must.
    picture = _in_mode_of_png(upright(picture.copy()))
    file = io.BytesIO()
    picture.save(file, "png")
    return file.getvalue()


def _in_mode_of_png(picture: PIL.Image.Image) -> PIL.Image.Image:
    if picture.mode in _MODES_OF_PNG:
        return picture
    if picture.mode in _REFUSED_MODES:
        raise ValueError(f"a picture of Pillow's mode {picture.mode!r} cannot be sent: convert it to RGB or RGBA first")
    if picture.mode.startswith("I"):
        return _wide_grey(picture)
    return picture.convert("RGBA" if picture.has_transparency_data else "RGB")


def _wide_grey(picture: PIL.Image.Image) -> PIL.Image.Image:
    """Grey of whole numbers as grey of 16 bits, the values as they are."""
    values = np.asarray(picture.convert("I"))
    if values.min() < 0 or values.max() > _MAX_GREY:
        found = f"this one {values.min()} to {values.max()}"
        raise ValueError(f"a picture of whole numbers has values from 0 to {_MAX_GREY}, {found}")
    return PIL.Image.fromarray(values.astype(np.uint16))
