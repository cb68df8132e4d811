"""TIFF and PNG files of pixels that Pillow does not write: signed, of 12 bits, with white at zero, with a transparent colour."""

from __future__ import annotations

import struct
import zlib

import numpy as np
from numpy.typing import NDArray


def make_tiff(pixels: NDArray[np.generic], photometric: int, form: int = 1, order: str = "<", bits: int = 0) -> bytes:
    """A TIFF of one strip. form: of the samples; 2 is signed. order: of the bytes."""
    data, (height, width) = pixels.tobytes(), pixels.shape
    if bits == 12:
        pairs = pixels.reshape(-1, 2).tolist()
        data = b"".join(bytes((a >> 4, (a & 15) << 4 | b >> 8, b & 255)) for a, b in pairs)
    tags = [(256, width), (257, height), (258, bits or 8 * pixels.dtype.itemsize), (259, 1), (262, photometric)]
    tags += [(273, 8), (277, 1), (278, height), (279, len(data)), (339, form)]
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}I", 8 + len(data)) + data
    entries = b"".join(struct.pack(f"{order}HHII", tag, 4, 1, value) for tag, value in tags)
    return head + struct.pack(f"{order}H", len(tags)) + entries + struct.pack(f"{order}I", 0)


def make_png(pixels: NDArray[np.int64], depth: int, transparent: tuple[int, ...]) -> bytes:
    """A grey PNG [h, w], or one of colours [h, w, 3], with a transparent colour."""
    height, width = pixels.shape[:2]
    samples = pixels.reshape(height, -1)
    if depth == 16:
        rows = [row.astype(">u2").tobytes() for row in samples]
    else:
        bits = (samples[:, :, None] >> np.arange(depth - 1, -1, -1)) & 1
        rows = [np.packbits(row.astype(np.uint8).ravel()).tobytes() for row in bits]

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    head = struct.pack(">IIBBBBB", width, height, depth, 2 if pixels.ndim == 3 else 0, 0, 0, 0)
    parts = [(b"IHDR", head), (b"tRNS", struct.pack(f">{len(transparent)}H", *transparent))]
    parts += [(b"IDAT", zlib.compress(b"".join(b"\0" + row for row in rows))), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)
