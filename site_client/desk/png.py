"""Grey and colour pictures as PNG (ISO/IEC 15948), so that the desk needs no imaging library for it."""

from __future__ import annotations

import struct
import zlib

import numpy as np
import numpy.typing as npt

_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_GREY, _RGB = 0, 2


def png(picture: npt.NDArray[np.uint8]) -> bytes:
    """A picture as a PNG file: uint8, (rows, columns) in grey or (rows, columns, 3) in RGB."""
    rows, columns = picture.shape[:2]
    kind = _RGB if picture.ndim == 3 else _GREY
    lines = np.zeros((rows, 1 + picture[0].size), np.uint8)  # each line begins with its filter, none
    lines[:, 1:] = picture.reshape(rows, -1)
    header = struct.pack(">IIBBBBB", columns, rows, 8, kind, 0, 0, 0)
    return _SIGNATURE + _chunk(b"IHDR", header) + _chunk(b"IDAT", zlib.compress(lines.tobytes(), 1)) + _chunk(b"IEND")


def _chunk(name: bytes, content: bytes = b"") -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))
