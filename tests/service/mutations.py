"""Damage: JSON documents and image files with a few things wrong, the same ones for the same seed."""

from __future__ import annotations

import io
import json
import random
import zlib
from collections.abc import Callable, Sequence
from typing import Any

from PIL import Image, ImageDraw
from PIL.PngImagePlugin import PngInfo

_NASTY: Sequence[Any] = (
    None,
    True,
    "",
    " ",
    "a" * 2000,
    "\x00",
    "\ud800",
    "\U0001f408",
    "NaN",
    "../../etc/passwd",
    "data:image/png;base64,",
    -1,
    0,
    2**31,
    2**53,
    2**64,
    10**400,
    1e308,
    -0.0,
    1e-400,
    [],
    {},
    [[[[[[]]]]]],
    {"prompt": "a cat"},
)
_PNG = b"\x89PNG\r\n\x1a\n"
_BYTES = (b"\x00", b"\xff", b"\x7f\xff\xff\xff", b"\xff\xff\xff\xff", b"\x00\x00\x00\x00", b'"', b"{", b"]", b"\\u")


def mutated_json(chance: random.Random, fields: dict[str, Any], names: Sequence[str]) -> bytes:
    """The fields in JSON with values, names or bytes changed."""
    changed = dict(fields)
    for _ in range(chance.randint(0, 3)):
        name = chance.choice(names)
        if chance.random() < 0.2:
            changed.pop(name, None)
        else:
            changed[name] = chance.choice(_NASTY)
    body = json.dumps(changed).encode()
    if chance.random() < 0.1:
        body = body[:-1] + b"," + json.dumps(dict(chance.sample(sorted(fields.items()), 1))).encode()[1:]
    return mutated_bytes(chance, body) if chance.random() < 0.25 else body


def mutated_bytes(chance: random.Random, data: bytes) -> bytes:
    """The bytes with one to four changes."""
    for _ in range(chance.randint(1, 4)):
        data = chance.choice(_CHANGES)(chance, data)
    return data


def mutated_image(chance: random.Random, data: bytes) -> bytes:
    """The same of an image file; half the PNGs have checksums that are right, so that more than those is read."""
    data = mutated_bytes(chance, data)
    return _with_checksums(data) if data.startswith(_PNG) and chance.random() < 0.5 else data


def image_files() -> dict[str, bytes]:
    """Small files of every kind that the service reads, and of the modes, orders and extras they can have.

    Two are refused as they are: what is animated, and what has too many scans.
    """
    picture = Image.new("RGB", (16, 16), "orange")
    ImageDraw.Draw(picture).ellipse((2, 2, 12, 12), "blue")
    text, exif = PngInfo(), Image.Exif()
    text.add_text("Comment", "a picture", zip=True)
    exif[0x0112] = 6
    return {
        "png": _saved(picture, "png", pnginfo=text, exif=exif),
        "png-rgba": _saved(picture.convert("RGBA"), "png"),
        "png-palette": _saved(picture.quantize(16), "png", transparency=0),
        "png-1": _saved(picture.convert("1"), "png"),
        "png-16": _saved(picture.convert("L").convert("I").convert("I;16"), "png"),
        "jpeg": _saved(picture, "jpeg", exif=exif, comment=b"a picture"),
        "jpeg-progressive": _saved(picture, "jpeg", progressive=True, optimize=True),
        "jpeg-scans": _with_scans(_saved(picture.convert("L"), "jpeg", progressive=True)),
        "jpeg-cmyk": _saved(picture.convert("CMYK"), "jpeg"),
        "jpeg-grey": _saved(picture.convert("L"), "jpeg"),
        "webp": _saved(picture, "webp", exif=exif),
        "webp-lossless": _saved(picture.convert("RGBA"), "webp", lossless=True),
        "webp-animated": _saved(picture, "webp", save_all=True, append_images=[picture.rotate(90)]),
    }


def _with_scans(data: bytes) -> bytes:
    """The progressive JPEG with its last scan a thousand times: a pass over all its pixels for a few bytes each."""
    place, end = data.rindex(b"\xff\xda"), data.rindex(b"\xff\xd9")
    return data[:end] + data[place:end] * 1000 + data[end:]


def _with_checksums(data: bytes) -> bytes:
    """The PNG with a right checksum after each chunk, as far as its chunks can be told apart."""
    repaired, place = bytearray(data), len(_PNG)
    while place + 12 <= len(data):
        end = place + 8 + int.from_bytes(data[place : place + 4], "big")
        if end + 4 > len(data):
            break
        repaired[end : end + 4] = zlib.crc32(data[place + 4 : end]).to_bytes(4, "big")
        place = end + 4
    return bytes(repaired)


def _saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def _flip(chance: random.Random, data: bytes) -> bytes:
    place, bit = chance.randrange(len(data) or 1), 1 << chance.randrange(8)
    return data[:place] + bytes(byte ^ bit for byte in data[place : place + 1]) + data[place + 1 :]


def _write(chance: random.Random, data: bytes) -> bytes:
    place, new = chance.randrange(len(data) + 1), chance.choice(_BYTES)
    return data[:place] + new + data[place + len(new) :]


def _insert(chance: random.Random, data: bytes) -> bytes:
    place = chance.randrange(len(data) + 1)
    return data[:place] + chance.randbytes(chance.randint(1, 16)) + data[place:]


def _delete(chance: random.Random, data: bytes) -> bytes:
    place = chance.randrange(len(data) + 1)
    return data[:place] + data[place + chance.randint(1, 16) :]


def _repeat(chance: random.Random, data: bytes) -> bytes:
    begin = chance.randrange(len(data) + 1)
    return data[: begin + chance.randint(1, 64)] + data[begin:]


def _cut(chance: random.Random, data: bytes) -> bytes:
    return data[: chance.randrange(len(data) + 1)] if chance.random() < 0.3 else data


_CHANGES: Sequence[Callable[[random.Random, bytes], bytes]] = (_flip, _flip, _write, _insert, _delete, _repeat, _cut)
