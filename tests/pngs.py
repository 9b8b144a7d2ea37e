"""PNG files that Pillow does not write."""

from __future__ import annotations

import struct
import zlib
from typing import Any

import numpy as np


def png_chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png_of(header: bytes, *chunks: bytes) -> bytes:
    return b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header) + b"".join(chunks) + png_chunk(b"IEND", b"")


def png_header(width: int, height: int) -> bytes:
    """The start of a PNG that claims a size and holds next to nothing."""
    return png_of(struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0), png_chunk(b"IDAT", zlib.compress(b"\0")))


def small_png(samples: np.ndarray[Any, Any], bits: int, colour_type: int, clear: bytes) -> bytes:
    """One row of samples, (1, W) or (1, W, 3), of so many bits each, with a transparent colour."""
    if bits < 8:
        row = np.packbits(np.unpackbits(samples[0, :, None], axis=1)[:, 8 - bits :]).tobytes()
    else:
        row = samples.tobytes()
    header = struct.pack(">IIBBBBB", samples.shape[1], 1, bits, colour_type, 0, 0, 0)
    return png_of(header, png_chunk(b"tRNS", clear), png_chunk(b"IDAT", zlib.compress(b"\0" + row)))
