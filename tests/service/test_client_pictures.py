"""Pictures that the client's callers have decoded: the service reads them as it reads the files that they came from."""

from __future__ import annotations

import io
import struct
from typing import Any

import numpy as np
import pytest
from PIL import Image

from engines.images import decode_image
from service.client.pictures import file_bytes
from tests.pngs import small_png
from tests.service.helpers import random_image

UPRIGHT_LEFT = 6
"""EXIF's orientation of a picture that was taken with the camera turned to the right."""


def saved(picture: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


@pytest.mark.parametrize("kind", ["jpeg", "png", "webp", "tiff"])
def test_a_photograph_is_upright(kind: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = UPRIGHT_LEFT
    pixels = np.zeros((8, 64, 3), np.uint8)
    pixels[:, :32] = 255
    file = saved(Image.fromarray(pixels), kind, exif=exif)
    picture = Image.open(io.BytesIO(file))
    sent = decode_image(file_bytes(picture))
    assert sent.shape == (64, 8, 3)
    assert (sent[:24] > 200).all()
    assert (sent[40:] < 50).all()
    if kind != "tiff":  # which the service does not read
        assert np.array_equal(sent, decode_image(file))
        assert picture.size == (64, 8), "the caller's own is not turned"


@pytest.mark.parametrize("mode", ["I", "I;16", "I;16B", "I;16L"])
def test_grey_of_sixteen_bits_keeps_its_levels(mode: str) -> None:
    levels = np.array([[0, 1000, 32896, 65535]], np.int32)
    picture = Image.fromarray(levels) if mode == "I" else _of_sixteen_bits(levels, mode)
    assert picture.mode == mode
    assert decode_image(file_bytes(picture))[0, :, 0].tolist() == [0, 3, 128, 255]


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "HSV"])
def test_other_modes_are_sent_as_pillow_has_them(mode: str) -> None:
    source = Image.fromarray(random_image())
    picture = source.convert("RGBA").convert(mode) if mode == "RGBa" else source.convert(mode)
    assert picture.mode == mode
    assert np.array_equal(decode_image(file_bytes(picture)), np.asarray(picture.convert("RGBA").convert("RGB")))


@pytest.mark.parametrize("mode", ["F", "La"])
def test_a_mode_that_cannot_be_sent_is_named(mode: str) -> None:
    with pytest.raises(ValueError, match=rf"mode '{mode}' cannot be sent"):
        file_bytes(Image.new(mode, (4, 4)))


@pytest.mark.parametrize(
    ("bits", "samples", "clear"),
    [
        (2, [0, 1, 2, 3], (1,)),
        (4, [0, 7, 15, 0], (7,)),
        (16, [[0x1234, 0, 0xFFFF], [0xFFFF, 0, 0]], (0x1234, 0, 0xFFFF)),
    ],
)
def test_a_transparent_colour_is_what_its_file_says(bits: int, samples: Any, clear: tuple[int, ...]) -> None:
    stored = np.array([samples], np.uint8 if bits < 16 else ">u2")
    file = small_png(stored, bits, 2 if len(clear) == 3 else 0, struct.pack(f">{len(clear)}H", *clear))
    picture = Image.open(io.BytesIO(file))
    for _ in range(2):
        assert np.array_equal(decode_image(file_bytes(picture)), decode_image(file))


@pytest.mark.parametrize("value", [-1, 65536])
def test_whole_numbers_that_no_file_holds_are_refused(value: int) -> None:
    with pytest.raises(ValueError, match=f"0 to 65535, this one .*{value}"):
        file_bytes(Image.fromarray(np.array([[7, value]], np.int32)))


def _of_sixteen_bits(levels: Any, mode: str) -> Image.Image:
    height, width = levels.shape
    order = ">" if mode == "I;16B" else "<"
    return Image.frombytes(mode, (width, height), levels.astype(f"{order}u2").tobytes())
