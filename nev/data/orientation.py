"""The orientation of a picture: cameras store the rows of the sensor, and in EXIF (tag 0x0112) how to turn them upright.

The eight values are those of the Exif standard (CIPA DC-008, section 4.6.4); 1 is upright.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from PIL import Image

TAG = 0x0112
EXIF = b"Exif\0\0"
APP1, START_OF_SCAN = 0xE1, 0xDA

Picture = NDArray[np.uint8]

UPRIGHT: Mapping[int, Callable[[Picture], Picture]] = {
    2: lambda p: p[:, ::-1],
    3: lambda p: p[::-1, ::-1],
    4: lambda p: p[::-1],
    5: lambda p: p.swapaxes(0, 1),
    6: lambda p: p.swapaxes(0, 1)[:, ::-1],
    7: lambda p: p[::-1, ::-1].swapaxes(0, 1),
    8: lambda p: p.swapaxes(0, 1)[::-1],
}

SIDEWAYS = (5, 6, 7, 8)  # these swap height and width


def apply_orientation(picture: Picture, orientation: int) -> Picture:
    """Turn and mirror a picture upright: uint8 [h, w, 3], contiguous. An unknown `orientation` counts as upright."""
    turn = UPRIGHT.get(orientation)
    return np.ascontiguousarray(turn(picture)) if turn else picture


def jpeg_orientation(data: bytes | memoryview) -> int:
    """The orientation in the EXIF segment of a JPEG; 1 where there is no segment, or it cannot be read.

    Only the headers of the segments before the first scan are read, no pixel.
    """
    offset = 2
    while offset + 4 <= len(data) and data[offset] == 0xFF and data[offset + 1] != START_OF_SCAN:
        end = offset + 2 + int.from_bytes(data[offset + 2 : offset + 4], "big")
        if data[offset + 1] == APP1 and bytes(data[offset + 4 : offset + 10]) == EXIF:
            return read_orientation(partial(_load_exif, bytes(data[offset + 4 : end])))
        offset = end
    return 1


def _load_exif(block: bytes) -> Image.Exif:
    from PIL import Image

    exif = Image.Exif()
    exif.load(block)
    return exif


def read_orientation(read: Callable[[], Image.Exif]) -> int:
    """The orientation in the EXIF data that `read` returns; 1 where the data are damaged. The picture may be intact."""
    try:
        value = read().get(TAG, 1)
    except (SyntaxError, ValueError, LookupError, OSError, TypeError, OverflowError, struct.error):
        return 1
    return value if isinstance(value, int) else 1
