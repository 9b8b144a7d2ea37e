"""Images and masks of requests: text or bytes -> pixels of the bundle's size, or a clear refusal."""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from engines.images import ImageError, ImageLimits, MaskMode, decode_image, decode_mask, fit, fit_mask
from engines.masks import blurred, fit_blend, grown
from engines.provenance import ImageSettings, settings_of
from engines.tasks import Blend, Mask, Pixels
from service.errors import ApiError, from_image_error

_DATA_URI = re.compile(r"data:image/[a-z0-9.+-]{1,40};base64,", re.IGNORECASE)

Decoded = TypeVar("Decoded")
Size = tuple[int, int]


@dataclass(frozen=True, slots=True)
class MaskEdge:
    """What becomes of a mask's edge, in pixels of the image that came: it grows first, and is then blurred."""

    grow_px: int = 0
    blur_px: float = 0.0


def read_image(value: str | bytes, size: Size, limits: ImageLimits) -> tuple[Pixels, Size]:
    """The image at ``size`` (width, height), and the size it came with. Raises ApiError."""
    data = _file_bytes(value, "image", limits)
    original = _decoded(lambda: decode_image(data, limits), "image")
    height, width, _ = original.shape
    return fit(original, size), (width, height)


def read_settings(value: str | bytes, limits: ImageLimits) -> ImageSettings:
    """What the image's file says of how it was made. Raises ApiError, also where it says nothing."""
    data = _file_bytes(value, "image", limits)
    found = _decoded(lambda: settings_of(data, limits), "image")
    if found is None:
        raise ApiError(422, "no_metadata", "the image's file does not say how it was made", param="reuse")
    return found


def read_mask(
    value: str | bytes,
    mode: MaskMode,
    edge: MaskEdge,
    image_size: Size,
    size: Size,
    limits: ImageLimits,
) -> tuple[Mask, Blend | None]:
    """True where the image is to be repainted, at ``size``; the mask must come at ``image_size``. And its blend.

    Without blur there is no blend, and a pixel is True where any part of it is marked, so what stays is wholly the
    client's. A blurred mask is True where its blend is not 0. One that is True nowhere is refused.
    """
    data = _file_bytes(value, "mask", limits)
    drawn = _decoded(lambda: decode_mask(data, mode, image_size, limits), "mask")
    repaint, blend = _with_edge(drawn, edge, size)
    if not repaint.any():
        how = "shrunk or blurred as asked, the mask marks no pixel" if drawn.any() else "the mask marks no pixel"
        raise ApiError(422, "empty_mask", how, param="mask")
    return repaint, blend


def _with_edge(drawn: Mask, edge: MaskEdge, size: Size) -> tuple[Mask, Blend | None]:
    mask = grown(drawn, edge.grow_px)
    if edge.blur_px == 0:
        return fit_mask(mask, size), None
    blend = fit_blend(blurred(mask, edge.blur_px), size)
    return blend > 0, blend


def _decoded(decode: Callable[[], Decoded], param: str) -> Decoded:
    try:
        return decode()
    except ImageError as error:
        raise from_image_error(error, param) from error


def _file_bytes(value: str | bytes, param: str, limits: ImageLimits) -> bytes:
    """The bytes of an image file: as they are, or out of base64 or a data URI."""
    if isinstance(value, bytes):
        return value
    text = value
    if value[:5].lower() == "data:":
        head = _DATA_URI.match(value)
        if head is None:
            raise _not_base64(param, "a data URI must be data:image/...;base64,...")
        text = value[head.end() :]
    if len(text) * 3 // 4 > limits.max_bytes + 2:
        raise ApiError(413, "too_many_bytes", f"{param}: at most {limits.max_bytes} bytes are taken", param=param)
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise _not_base64(param, "not base64; URLs are not fetched") from error


def _not_base64(param: str, message: str) -> ApiError:
    return ApiError(400, "invalid_base64", f"{param}: {message}", param=param)
