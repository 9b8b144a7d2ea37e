"""Images: bytes <-> arrays, masks, limits. Every limit is checked on the header, before a pixel is decoded."""

from __future__ import annotations

import io
import json
import re
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
from PIL import Image, ImageFile, ImageOps, PngImagePlugin, UnidentifiedImageError

from engines.tasks import Floats, Mask, Pixels

ImageFormat = Literal["png", "jpeg", "webp"]
MaskMode = Literal["white", "black", "alpha"]

FORMATS: tuple[ImageFormat, ...] = get_args(ImageFormat)
MASK_MODES: tuple[str, ...] = get_args(MaskMode)
XMP = "XML:com.adobe.xmp"
"""The name of a text that is an XMP packet, where other programs look: PNG's own name for it."""
DEFAULT_QUALITY = 90
# zlib's fastest: files are a tenth larger than at its default, and made in a half to a third of the time.
_PNG_LEVEL = 1
# Each scan of a JPEG is a pass over all its pixels, however few bytes it has; progressive files have about ten.
_MAX_SCANS = 100
# Those that are not scans are tables and notes, each of which takes the decoder a moment.
_MAX_SEGMENTS = 2000

_WHITE = (255, 255, 255)
_BLACK = (0, 0, 0)
_EXIF_DESCRIPTION = 0x010E
# What is not a stuffed byte in a JPEG's data, nor one of the marks that restart it.
_JPEG_MARKER = re.compile(rb"\xff[\xc0-\xcf\xd9-\xfe]")
_JPEG_START, _JPEG_END, _JPEG_SCAN = b"\xff\xd8", 0xD9, 0xDA
# Grey PNGs whose samples Pillow spreads to 8 bits, by its name for how they are stored.
_GREY_BITS = {"L;2": 2, "L;4": 4}


class ImageError(ValueError):
    """Bytes that are not an image we take. ``code`` is for programs, ``message`` for people."""

    def __init__(self, code: str, message: str) -> None:
        """Codes: too_many_bytes, too_many_pixels, undecodable, animated, mask_size, mask_without_alpha."""
        super().__init__(message)
        self.code = code
        self.message = message


@dataclass(frozen=True)
class ImageLimits:
    """Bounds on one uploaded image: bytes of the file, pixels (width x height) of the picture."""

    max_bytes: int = 10 * 1024 * 1024
    max_pixels: int = 4096 * 4096


def decode_image(data: bytes, limits: ImageLimits | None = None) -> Pixels:
    """Decode a PNG, JPEG or WebP of one frame to uint8 RGB (H, W, 3).

    EXIF orientation is applied and alpha is flattened on white; colour profiles are not. Raises ImageError.
    """
    with _reading():
        return _flatten(_open(data, limits or ImageLimits()), _WHITE)


def decode_mask(data: bytes, mode: MaskMode, size: tuple[int, int], limits: ImageLimits | None = None) -> Mask:
    """Decode a mask of ``size`` (width, height) to bool (H, W), True where to repaint.

    Repaint where the mask is: lighter than middle grey (``white``), darker (``black``), or wholly transparent
    (``alpha``). In the first two modes transparent parts are not repainted. Raises ImageError.
    """
    with _reading():
        image = _open(data, limits or ImageLimits())
        if image.size != size:
            found, wanted = (f"{width} x {height}" for width, height in (image.size, size))
            raise ImageError("mask_size", f"the mask is {found} pixels, the image {wanted}")
        if mode == "alpha":
            if not image.has_transparency_data:
                raise ImageError("mask_without_alpha", "mask mode 'alpha' needs a mask with an alpha channel")
            alpha = np.asarray(_in_bytes(image).convert("RGBA"))[..., 3]
            return np.asarray(alpha == 0)
        if image.mode != "L" or image.has_transparency_data:
            image = Image.fromarray(_flatten(image, _BLACK if mode == "white" else _WHITE)).convert("L")
        grey = np.asarray(image)
        return grey >= 128 if mode == "white" else grey < 128


def fit(image: Pixels, size: tuple[int, int]) -> Pixels:
    """Resize (H, W, 3) to ``size`` (width, height), stretched where the shapes differ; the same size is a copy."""
    if (image.shape[1], image.shape[0]) == size:
        return image.copy()
    return np.array(Image.fromarray(image).resize(size, Image.Resampling.LANCZOS))


def fit_mask(mask: Mask, size: tuple[int, int]) -> Mask:
    """Resize a mask (H, W) to ``size`` (width, height); a pixel is True if any part of it was."""
    if (mask.shape[1], mask.shape[0]) == size:
        return mask.copy()
    return _touched(_touched(mask, size[1]).T, size[0]).T


def _touched(mask: Mask, size: int) -> Mask:
    """The rows of a mask as ``size`` rows, each the union of those that it overlaps."""
    rows, out = len(mask), np.arange(size)
    first, last = out * rows // size, -((out + 1) * rows // -size)
    above = np.zeros((1, mask.shape[1]), np.int32)
    marked = np.concatenate([above, mask.cumsum(0, dtype=np.int32)])
    union: Mask = marked[last] > marked[first]
    return union


def encode_image(
    image: Pixels, format: ImageFormat, quality: int | None = None, text: Mapping[str, str] | None = None
) -> bytes:
    """Encode uint8 (H, W, 3). ``quality`` 1 to 100 is for jpeg and webp; png has none (ValueError).

    ``text`` goes into the file: PNG text chunks, or in the others one EXIF description with the JSON of it all but
    what is named `XMP`, which they have a place for.
    """
    if format not in FORMATS:
        raise ValueError(f"format must be one of {', '.join(FORMATS)}, got {format!r}")
    if quality is not None and (format == "png" or not 1 <= quality <= 100):
        raise ValueError("quality is 1 to 100, for jpeg and webp only")
    options: dict[str, Any] = {}
    if format == "png":
        options |= {"pnginfo": _png_text(text or {}), "compress_level": _PNG_LEVEL}
    else:
        options["quality"] = DEFAULT_QUALITY if quality is None else quality
        options |= _exif_and_xmp(text or {})
    out = io.BytesIO()
    Image.fromarray(image).save(out, format, **options)
    return out.getvalue()


def _png_text(text: Mapping[str, str]) -> PngImagePlugin.PngInfo:
    info = PngImagePlugin.PngInfo()
    for key, value in text.items():
        info.add_itxt(key, value)
    return info


def _exif_and_xmp(text: Mapping[str, str]) -> dict[str, Any]:
    options: dict[str, Any] = {}
    if XMP in text:
        options["xmp"] = text[XMP].encode()
    if own := {key: value for key, value in text.items() if key != XMP}:
        options["exif"] = exif = Image.Exif()
        exif[_EXIF_DESCRIPTION] = json.dumps(own)
    return options


def read_text(data: bytes, key: str, limits: ImageLimits | None = None) -> str | None:
    """The text that `encode_image` wrote under ``key``, None where there is none.

    Decodes pixels only of a PNG that has none before them: it may lie behind them.

    Raises ImageError for what is not an image or too large; text that is damaged is none.
    """
    with _reading(), _open_header(data, limits or ImageLimits()) as image:
        if image.format == "PNG":
            if key not in image.info:
                image.load()
            found = image.info.get(key)
        else:
            try:
                found = json.loads(image.getexif()[_EXIF_DESCRIPTION])[key]
            except Exception:  # no EXIF, or another program's, or damaged
                return None
    return found if isinstance(found, str) else None


@contextmanager
def _reading() -> Iterator[None]:
    """Turn whatever Pillow raises on bad bytes into an ImageError."""
    try:
        yield
    except ImageError:
        raise
    except UnidentifiedImageError as error:
        raise ImageError("undecodable", "not a PNG, JPEG or WebP image") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageError("too_many_pixels", "the image is too large") from error
    except Exception as error:  # its plugins raise a dozen kinds
        raise ImageError("undecodable", f"the image is damaged ({error})") from error


def _open(data: bytes, limits: ImageLimits) -> Image.Image:
    """Check the limits on the header, then decode and turn upright. The mode is the file's own."""
    image = _open_header(data, limits)
    # A JPEG with further pictures behind it (MPO: depth or gain maps of phones) is its first picture.
    if image.format != "MPO" and getattr(image, "n_frames", 1) > 1:
        raise ImageError("animated", "the image has several frames, only still images are taken")
    scale_clear_colour(image)
    return upright(image)


def upright(image: Image.Image) -> Image.Image:
    """The picture itself, decoded, and turned as its EXIF says."""
    image.load()
    for name in ("xmp", XMP):  # Where EXIF is silent Pillow would go by this, and browsers do not.
        image.info.pop(name, None)
    with suppress(Exception):  # damaged EXIF is no reason to refuse the picture
        ImageOps.exif_transpose(image, in_place=True)
    return image


def _open_header(data: bytes, limits: ImageLimits) -> ImageFile.ImageFile:
    if len(data) > limits.max_bytes:
        raise ImageError("too_many_bytes", f"the image has {len(data)} bytes, at most {limits.max_bytes} are taken")
    # Pillow allocates a WebP's canvas as it opens it, so its size is read before.
    _check_pixels(_webp_size(data), limits)
    _check_segments(data)
    image = Image.open(io.BytesIO(data), formats=("PNG", "JPEG", "WEBP"))
    _check_pixels(image.size, limits)
    return image


def _check_pixels(size: tuple[int, int], limits: ImageLimits) -> None:
    width, height = size
    if width * height > limits.max_pixels:
        message = f"the image has {width} x {height} pixels, at most {limits.max_pixels} are taken"
        raise ImageError("too_many_pixels", message)


def _webp_size(data: bytes) -> tuple[int, int]:
    """Width and height that a WebP's header states; (0, 0) for other files."""
    if data[:4] != b"RIFF" or data[8:12] != b"WEBP" or len(data) < 30:
        return 0, 0
    kind = data[12:16]
    if kind == b"VP8X":
        return 1 + int.from_bytes(data[24:27], "little"), 1 + int.from_bytes(data[27:30], "little")
    if kind == b"VP8L":
        bits = int.from_bytes(data[21:25], "little")
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    if kind == b"VP8 ":
        width, height = struct.unpack("<HH", data[26:30])
        return width & 0x3FFF, height & 0x3FFF
    return 0, 0


def _check_segments(data: bytes) -> None:
    """Raise ImageError for a JPEG of more segments than are taken, up to its end: pictures behind that are not decoded.

    Does nothing for other files.
    """
    scans = segments = 0
    place = len(_JPEG_START) if data.startswith(_JPEG_START) else len(data)
    while (found := _JPEG_MARKER.search(data, place)) is not None:
        marker, place = data[found.end() - 1], found.end()
        if marker == _JPEG_END:
            break
        place += int.from_bytes(data[place : place + 2], "big")
        segments += 1
        scans += marker == _JPEG_SCAN
        if scans > _MAX_SCANS or segments > _MAX_SEGMENTS:
            what = f"{_MAX_SCANS} scans" if scans > _MAX_SCANS else f"{_MAX_SEGMENTS} segments"
            raise ImageError("undecodable", f"the image has more than {what}")


def scale_clear_colour(image: Image.Image) -> None:
    """State a PNG's transparent colour in 8 bits a sample, as its pixels will be; the file states it in its own depth.

    That depth is known only until the pixels are decoded. Of 16 bits Pillow keeps the upper half, so colours that
    differ in the lower half alone are one.
    """
    clear = image.info.get("transparency")
    stored = image.tile[0].args if isinstance(image, ImageFile.ImageFile) and image.tile else None
    if isinstance(clear, tuple) and stored == "RGB;16B":
        image.info["transparency"] = tuple(sample >> 8 for sample in clear)
    elif isinstance(clear, int) and stored in _GREY_BITS:
        top = (1 << _GREY_BITS[stored]) - 1
        image.info["transparency"] = (clear & top) * 255 // top


def _flatten(image: Image.Image, background: tuple[int, int, int]) -> Pixels:
    """RGB (H, W, 3) of any mode we read, alpha laid on ``background``."""
    image = _in_bytes(image)
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, (*background, 255)), rgba)
    return np.array(image.convert("RGB"))


def _in_bytes(image: Image.Image) -> Image.Image:
    """16-bit grey scaled to 8 bits, which Pillow's own conversion clips; other images as they are."""
    if not image.mode.startswith("I"):
        return image
    wide = np.asarray(image)
    grey = Image.fromarray(np.minimum(wide // 257, 255).astype(np.uint8))
    if isinstance(clear := image.info.get("transparency"), int):
        return Image.merge("LA", (grey, Image.fromarray(np.where(wide == clear, 0, 255).astype(np.uint8))))
    return grey


def from_pixels(image: Pixels) -> Floats:
    """uint8 (H, W, 3) -> float32 (3, H, W) in [-1, 1]."""
    channels_first = np.ascontiguousarray(image.transpose(2, 0, 1)).astype(np.float32)
    return channels_first / np.float32(127.5) - np.float32(1)


def to_pixels(image: Floats) -> Pixels:
    """float32 (3, H, W) -> uint8 (H, W, 3), clipped to [-1, 1] first."""
    scaled = (np.clip(image, -1, 1) + np.float32(1)) * np.float32(127.5)
    return np.ascontiguousarray(np.rint(scaled).astype(np.uint8).transpose(1, 2, 0))
