"""Bytes from strangers: what is an image becomes RGB, what is too large is refused by its header."""

from __future__ import annotations

import contextlib
import io
import json
import struct
import tracemalloc
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from PIL import Image, ImageOps, JpegImagePlugin, PngImagePlugin

from engines.images import (
    XMP,
    ImageError,
    ImageLimits,
    decode_image,
    decode_mask,
    encode_image,
    fit,
    fit_mask,
    from_pixels,
    to_pixels,
)
from tests.pngs import png_header, small_png

RGB = np.random.default_rng(0).integers(0, 256, (6, 10, 3)).astype(np.uint8)
SMALL = ImageLimits(max_bytes=100_000, max_pixels=10_000)


def save(image: Image.Image, format: str, **options: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, format, **options)
    return out.getvalue()


def jpeg_header(width: int, height: int) -> bytes:
    data = bytearray(save(Image.new("RGB", (8, 8)), "JPEG"))
    frame = data.index(b"\xff\xc0")
    data[frame + 5 : frame + 9] = struct.pack(">HH", height, width)
    return bytes(data)


def webp_header(width: int, height: int, kind: str) -> bytes:
    if kind == "VP8X":
        data = bytearray(save(Image.new("RGBA", (8, 8), (1, 2, 3, 4)), "WEBP"))
        assert data[12:16] == b"VP8X"
        data[24:30] = (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    elif kind == "VP8L":
        data = bytearray(save(Image.new("RGB", (8, 8)), "WEBP", lossless=True))
        assert data[12:16] == b"VP8L"
        bits = int.from_bytes(data[21:25], "little") >> 28 << 28
        data[21:25] = (bits | (width - 1) | (height - 1) << 14).to_bytes(4, "little")
    else:
        data = bytearray(save(Image.new("RGB", (8, 8)), "WEBP"))
        assert data[12:16] == b"VP8 "
        data[26:30] = struct.pack("<HH", width, height)
    return bytes(data)


def code_of(data: bytes, limits: ImageLimits = SMALL) -> str:
    with pytest.raises(ImageError) as caught:
        decode_image(data, limits)
    return caught.value.code


def test_lossless_formats_come_back_exactly() -> None:
    np.testing.assert_array_equal(decode_image(encode_image(RGB, "png")), RGB)
    np.testing.assert_array_equal(decode_image(save(Image.fromarray(RGB), "WEBP", lossless=True)), RGB)


@pytest.mark.parametrize("format", ["jpeg", "webp"])
def test_lossy_formats_come_back_nearly(format: Any) -> None:
    smooth = np.full((16, 16, 3), (200, 100, 50), np.uint8)
    data = encode_image(smooth, format, quality=95)
    np.testing.assert_allclose(decode_image(data).astype(int), smooth, atol=6)
    assert len(encode_image(fit(RGB, (64, 64)), format, quality=20)) < len(
        encode_image(fit(RGB, (64, 64)), format, quality=95)
    )


@pytest.mark.parametrize(
    "data",
    [
        png_header(100_000, 100_000),
        png_header(101, 100),
        jpeg_header(60_000, 60_000),
        webp_header(16_000, 16_000, "VP8X"),
        webp_header(16_000, 16_000, "VP8L"),
        webp_header(16_000, 16_000, "VP8 "),
    ],
    ids=["png", "png just over", "jpeg", "webp extended", "webp lossless", "webp lossy"],
)
def test_huge_sizes_are_refused_by_the_header(data: bytes) -> None:
    tracemalloc.start()
    assert code_of(data) == "too_many_pixels"
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1_000_000


def test_pixels_are_not_decoded_before_the_check(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(self: Image.Image) -> None:
        raise AssertionError("decoded")

    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", load)
    assert code_of(save(Image.new("RGB", (101, 100)), "PNG")) == "too_many_pixels"


def test_a_bomb_within_the_byte_limit_is_refused() -> None:
    """20 megapixels of black in 60 kB."""
    data = save(Image.new("1", (5000, 4000)), "PNG", optimize=True)
    assert len(data) < SMALL.max_bytes
    assert code_of(data) == "too_many_pixels"


def test_too_many_bytes_are_refused_unread() -> None:
    assert code_of(b"x" * 100_001) == "too_many_bytes"


def test_text_bombs_in_png_are_refused() -> None:
    info = PngImagePlugin.PngInfo()
    info.add_text("comment", "0" * 3_000_000, zip=True)
    assert code_of(save(Image.new("RGB", (8, 8)), "PNG", pnginfo=info)) == "undecodable"


def with_scans(data: bytes, scans: int) -> bytes:
    """The progressive JPEG with the last scan, of few bytes, of its first picture so often that it has this many."""
    end = data.index(b"\xff\xd9")
    place = data.rindex(b"\xff\xda", 0, end)
    return data[:end] + data[place:end] * (scans - data.count(b"\xff\xda", 0, end)) + data[end:]


@pytest.mark.parametrize("format", ["JPEG", "MPO"])
def test_scans_are_counted_before_any_is_decoded(format: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(self: Image.Image) -> None:
        raise AssertionError("decoded")

    grey = Image.new("L", (8, 8), 128)
    second = {"save_all": True, "append_images": [grey]} if format == "MPO" else {}
    data = save(grey, format, progressive=True, **second)
    assert Image.open(io.BytesIO(data)).format == format
    assert decode_image(with_scans(data, 100), SMALL).shape == (8, 8, 3)
    monkeypatch.setattr(JpegImagePlugin.JpegImageFile, "load", load)
    with pytest.raises(ImageError, match="more than 100 scans") as caught:
        decode_image(with_scans(data, 101), SMALL)
    assert caught.value.code == "undecodable"


def test_segments_are_counted_before_the_decoder_reads_them(monkeypatch: pytest.MonkeyPatch) -> None:
    data, note = save(Image.fromarray(RGB), "JPEG"), b"\xff\xfe\x00\x02"
    assert decode_image(data[:2] + note * 1500 + data[2:], SMALL).shape == RGB.shape
    monkeypatch.setattr(Image, "open", None)
    with pytest.raises(ImageError, match="more than 2000 segments") as caught:
        decode_image(data[:2] + note * 2001 + data[2:], SMALL)
    assert caught.value.code == "undecodable"


def test_scans_in_a_comment_and_behind_the_end_are_none() -> None:
    marks = b"\xff\xda" * 200
    data = save(Image.fromarray(RGB), "JPEG", progressive=True, comment=marks)
    assert decode_image(data + marks, SMALL).shape == RGB.shape


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP"])
def test_truncated_files_are_refused(format: str) -> None:
    data = save(Image.fromarray(fit(RGB, (64, 64))), format)
    for length in (0, 1, 7, 12, 20, 29, 33, len(data) // 2, len(data) - 30):
        assert code_of(data[:length]) == "undecodable"


@pytest.mark.parametrize("format", ["GIF", "BMP", "TIFF", "ICO", "PPM"])
def test_other_formats_are_refused(format: str) -> None:
    assert code_of(save(Image.fromarray(RGB), format)) == "undecodable"


@pytest.mark.parametrize("format", ["PNG", "WEBP"])
def test_animations_are_refused(format: str) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    assert code_of(save(frames[0], format, save_all=True, append_images=frames[1:])) == "animated"


def test_a_jpeg_with_a_second_picture_behind_it_is_its_first() -> None:
    """Phones store depth and gain maps so (MPO)."""
    first, second = Image.new("RGB", (8, 8), "red"), Image.new("RGB", (8, 8), "blue")
    pixels = decode_image(save(first, "MPO", save_all=True, append_images=[second]))
    assert pixels[0, 0].tolist() == [254, 0, 0]


def test_cmyk_becomes_rgb() -> None:
    pixels = decode_image(save(Image.new("CMYK", (8, 8), (255, 0, 0, 0)), "JPEG", quality=95))
    np.testing.assert_allclose(pixels[0, 0], (0, 255, 255), atol=4)


def test_sixteen_bit_grey_is_scaled_not_clipped() -> None:
    grey = np.array([[0, 257, 32896, 65535]], dtype=np.uint16)
    pixels = decode_image(save(Image.fromarray(grey), "PNG"))
    assert pixels[0, :, 0].tolist() == [0, 1, 128, 255]


def test_palettes_and_their_transparency() -> None:
    palette = Image.fromarray(RGB).quantize(4)
    np.testing.assert_array_equal(decode_image(save(palette, "PNG")), np.array(palette.convert("RGB")))
    clear = palette.getpixel((0, 0))
    pixels = decode_image(save(palette, "PNG", transparency=clear))
    assert pixels[0, 0].tolist() == [255, 255, 255]


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA"])
def test_every_png_mode_becomes_rgb(mode: str) -> None:
    pixels = decode_image(save(Image.fromarray(RGB).convert(mode), "PNG"))
    assert (str(pixels.dtype), pixels.shape) == ("uint8", RGB.shape)
    assert pixels.flags.writeable


def test_alpha_is_flattened_on_white() -> None:
    rgba = Image.new("RGBA", (2, 1), (255, 0, 0, 0))
    rgba.putpixel((1, 0), (255, 0, 0, 128))
    for format in ("PNG", "WEBP"):
        pixels = decode_image(save(rgba, format, lossless=True))
        assert pixels[0].tolist() == [[255, 255, 255], [255, 127, 127]]


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
def test_exif_orientation_is_applied(orientation: int, format: str) -> None:
    """The corner that is red when seen upright, for each of the eight ways to hold a camera."""
    blocks = np.full((16, 32, 3), 255, np.uint8)
    blocks[:8, :8] = (255, 0, 0)
    stored = {
        1: blocks,
        2: blocks[:, ::-1],
        3: blocks[::-1, ::-1],
        4: blocks[::-1],
        5: blocks.transpose(1, 0, 2),
        6: np.rot90(blocks, 1),
        7: blocks[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(blocks, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    pixels = decode_image(save(Image.fromarray(np.ascontiguousarray(stored)), format, exif=exif))
    assert pixels.shape == blocks.shape
    np.testing.assert_allclose(pixels[3, 3], (255, 0, 0), atol=40)
    np.testing.assert_allclose(pixels[12, 28], (255, 255, 255), atol=40)


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
def test_an_orientation_that_is_not_of_exif_turns_nothing(format: str) -> None:
    """As browsers have it, over whose picture a mask is drawn."""
    packet = (
        '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
        '<rdf:Description xmlns:tiff="http://ns.adobe.com/tiff/1.0/" tiff:Orientation="6"/></rdf:RDF></x:xmpmeta>'
    )
    options: dict[str, Any] = {"xmp": packet.encode()}
    if format == "PNG":
        info = PngImagePlugin.PngInfo()
        info.add_itxt(XMP, packet)
        options = {"pnginfo": info}
    data = save(Image.new("RGB", (32, 16)), format, **options)
    assert ImageOps.exif_transpose(Image.open(io.BytesIO(data))).size == (16, 32)
    assert decode_image(data).shape == (16, 32, 3)


def test_damaged_exif_is_no_reason_to_refuse() -> None:
    data = save(Image.fromarray(RGB), "PNG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff")
    assert decode_image(data).shape == RGB.shape


@settings(deadline=None, max_examples=100)
@given(data=st.binary(max_size=200), start=st.sampled_from(["PNG", "JPEG", "WEBP", ""]), cut=st.integers(0, 400))
@example(data=b"", start="", cut=0)
def test_whatever_comes_is_an_image_or_an_image_error(data: bytes, start: str, cut: int) -> None:
    """Random bytes put into the middle of real files."""
    body = save(Image.fromarray(RGB), start) if start else b""
    with contextlib.suppress(ImageError):
        pixels = decode_image(body[:cut] + data + body[cut + len(data) :], SMALL)
        assert pixels.dtype == np.uint8
        assert pixels.ndim == 3


@settings(deadline=None, max_examples=50)
@given(image=arrays.arrays(np.uint8, st.tuples(st.integers(1, 20), st.integers(1, 20), st.just(3))))
def test_png_and_model_range_keep_every_value(image: np.ndarray[Any, Any]) -> None:
    np.testing.assert_array_equal(decode_image(encode_image(image, "png")), image)
    latent = from_pixels(image)
    assert latent.dtype == np.float32
    assert np.abs(latent).max() <= 1
    np.testing.assert_array_equal(to_pixels(latent), image)


def test_model_range_is_clipped() -> None:
    wild = np.array([-9, -1, 0, 1, 9], np.float32).reshape(1, 1, 5).repeat(3, axis=0)
    assert to_pixels(wild)[0, :, 0].tolist() == [0, 0, 128, 255, 255]


def mask_of(mode: str, *pixels: Any) -> bytes:
    image = Image.new(mode, (len(pixels), 1))
    for x, pixel in enumerate(pixels):
        image.putpixel((x, 0), pixel)
    return save(image, "PNG")


def test_mask_modes() -> None:
    grey = mask_of("L", 0, 127, 128, 255)
    assert decode_mask(grey, "white", (4, 1)).tolist() == [[False, False, True, True]]
    assert decode_mask(grey, "black", (4, 1)).tolist() == [[True, True, False, False]]
    alpha = mask_of("RGBA", (255, 255, 255, 0), (0, 0, 0, 0), (0, 0, 0, 1), (255, 255, 255, 255))
    assert decode_mask(alpha, "alpha", (4, 1)).tolist() == [[True, True, False, False]]


def test_transparent_parts_are_not_repainted_in_the_grey_modes() -> None:
    """A brush on an empty canvas: only what was painted counts."""
    white = mask_of("RGBA", (255, 255, 255, 0), (0, 0, 0, 0), (255, 255, 255, 255))
    assert decode_mask(white, "white", (3, 1)).tolist() == [[False, False, True]]
    black = mask_of("RGBA", (255, 255, 255, 0), (0, 0, 0, 0), (0, 0, 0, 255))
    assert decode_mask(black, "black", (3, 1)).tolist() == [[False, False, True]]


def test_bad_masks_are_refused() -> None:
    grey = mask_of("L", 0, 255)
    for data, mode, size, code in (
        (grey, "white", (3, 1), "mask_size"),
        (grey, "white", (1, 2), "mask_size"),
        (grey, "alpha", (2, 1), "mask_without_alpha"),
        (grey[:40], "white", (2, 1), "undecodable"),
        (png_header(50_000, 50_000), "white", (2, 1), "too_many_pixels"),
    ):
        with pytest.raises(ImageError) as caught:
            decode_mask(data, mode, size, SMALL)  # type: ignore[arg-type]
        assert caught.value.code == code


def test_fit_resizes_and_copies() -> None:
    assert fit(RGB, (32, 16)).shape == (16, 32, 3)
    same = fit(RGB, (10, 6))
    np.testing.assert_array_equal(same, RGB)
    assert same is not RGB
    flat = np.full((50, 30, 3), 77, np.uint8)
    assert (fit(flat, (8, 8)) == 77).all()


def test_fitted_masks_lose_no_marked_pixel() -> None:
    mask = np.zeros((64, 48), dtype=bool)
    mask[63, 0] = mask[10, 40] = True
    small = fit_mask(mask, (6, 8))
    assert np.argwhere(small).tolist() == [[1, 5], [7, 0]]
    np.testing.assert_array_equal(fit_mask(mask, (48, 64)), mask)
    assert not fit_mask(np.zeros((64, 64), dtype=bool), (7, 9)).any()
    assert fit_mask(np.ones((5, 5), dtype=bool), (16, 16)).all()


@pytest.mark.parametrize(("rows", "size"), [(48, 32), (5, 16), (7, 7), (3, 100), (100, 3)])
def test_every_pixel_that_a_marked_one_overlaps_is_marked(rows: int, size: int) -> None:
    for row in range(rows):
        mask = np.zeros((rows, 1), dtype=bool)
        mask[row] = True
        overlapping = [i for i in range(size) if i * rows < (row + 1) * size and row * size < (i + 1) * rows]
        assert np.flatnonzero(fit_mask(mask, (1, size))).tolist() == overlapping
        assert np.flatnonzero(fit_mask(mask.T, (size, 1))).tolist() == overlapping


def test_the_transparent_grey_level_of_sixteen_bits_is_the_mask() -> None:
    file = io.BytesIO()
    Image.fromarray(np.array([[0, 256, 32896, 65535]], np.uint16)).save(file, "png", transparency=256)
    mask = decode_mask(file.getvalue(), "alpha", (4, 1))
    assert mask.tolist() == [[False, True, False, False]]


@pytest.mark.parametrize(("bits", "clear"), [(1, 0), (1, 1), (2, 1), (2, 3), (4, 7), (8, 7)])
def test_the_transparent_grey_level_is_one_of_the_files_own_depth(bits: int, clear: int) -> None:
    levels = np.arange(min(1 << bits, 16), dtype=np.uint8)[None]
    data = small_png(levels, bits, 0, struct.pack(">H", clear))
    grey = levels[0] * (255 // ((1 << bits) - 1))
    assert decode_image(data)[0, :, 0].tolist() == np.where(levels[0] == clear, 255, grey).tolist()
    mask = decode_mask(data, "alpha", (levels.shape[1], 1))
    assert mask.tolist() == (levels == clear).tolist()


def test_the_transparent_colour_of_sixteen_bits_a_sample() -> None:
    colours = np.array([[[256, 257, 258], [0, 257, 258], [65535, 0, 32768]]], ">u2")
    data = small_png(colours, 16, 2, colours[0, 0].tobytes())
    assert decode_image(data)[0].tolist() == [[255, 255, 255], [0, 1, 1], [255, 0, 128]]
    assert decode_mask(data, "alpha", (3, 1)).tolist() == [[True, False, False]]


def test_text_is_written_into_every_format() -> None:
    text = {"fewstep": json.dumps({"seed": 7, "model": "émoji"})}
    opened = Image.open(io.BytesIO(encode_image(RGB, "png", text=text)))
    assert isinstance(opened, PngImagePlugin.PngImageFile)
    assert opened.text == text
    for format in ("jpeg", "webp"):
        exif = Image.open(io.BytesIO(encode_image(RGB, format, text=text))).getexif()
        assert json.loads(exif[0x010E]) == text


@pytest.mark.parametrize(("format", "quality"), [("png", 90), ("jpeg", 0), ("jpeg", 101), ("gif", None)])
def test_options_that_a_format_lacks_are_refused(format: Any, quality: int | None) -> None:
    with pytest.raises(ValueError, match=r"quality|format"):
        encode_image(RGB, format, quality=quality)
