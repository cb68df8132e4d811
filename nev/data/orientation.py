"""The orientation of a picture: cameras store the rows of the sensor, and in EXIF (tag 0x0112) how to turn them upright.

The eight values are those of the Exif standard (CIPA DC-008, section 4.6.4); 1 is upright.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from PIL import Image

TAG = 0x0112
EXIF = b"Exif\0\0"
XMP = b"http://ns.adobe.com/xap/1.0/\0"
XMP_ORIENTATION = re.compile(rb'tiff:Orientation(?:="|>)([0-9])')
MARK, APP1, START_OF_SCAN, END_OF_IMAGE = 0xFF, 0xE1, 0xDA, 0xD9
ALONE = frozenset((0x00, 0x01, *range(0xD0, 0xD9)))  # markers without a segment

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
    # np.ascontiguousarray would leave a negative stride along one pixel, which torch refuses.
    return turn(picture).copy() if turn else picture


def jpeg_orientation(data: bytes | memoryview) -> int:
    """The orientation in the EXIF segment of a JPEG, else in its XMP, as Pillow reads them; 1 where neither can be read.

    Only the headers of the segments before the first scan are read, no pixel.
    """
    xmp = b""
    for marker, start, end in _list_segments(data):
        if marker == APP1 and bytes(data[start : start + len(EXIF)]) == EXIF:
            orientation = _read_tag(partial(_load_exif, bytes(data[start:end])))
            if orientation is not None:
                return orientation
        elif marker == APP1 and bytes(data[start : start + len(XMP)]) == XMP:
            xmp = bytes(data[start:end])
    written = XMP_ORIENTATION.search(xmp)
    return int(written[1]) if written else 1


def _list_segments(data: bytes | memoryview) -> Iterator[tuple[int, int, int]]:
    """Marker, start and end of the segments before the first scan. Fill bytes and junk are passed over."""
    at = 2
    while True:
        if at < len(data) and data[at] != MARK:
            data = bytes(data)
            at = data.find(MARK, at)
            if at < 0:
                return
        while at < len(data) and data[at] == MARK:
            at += 1
        if at + 3 > len(data) or data[at] in (START_OF_SCAN, END_OF_IMAGE):
            return
        marker, at = data[at], at + 1
        if marker not in ALONE:
            length = int.from_bytes(data[at : at + 2], "big")
            yield marker, at + 2, at + length
            at += max(length, 2)


def _load_exif(block: bytes) -> Image.Exif:
    from PIL import Image

    exif = Image.Exif()
    exif.load(block)
    return exif


def read_orientation(read: Callable[[], Image.Exif]) -> int:
    """The orientation in the EXIF data that `read` returns; 1 where the data are damaged. The picture may be intact."""
    value = _read_tag(read)
    return 1 if value is None else value


def _read_tag(read: Callable[[], Image.Exif]) -> int | None:
    """The orientation in EXIF data; 1 where they are damaged, None where they have none."""
    try:
        value = read().get(TAG)
    except (SyntaxError, ValueError, LookupError, OSError, TypeError, OverflowError, struct.error):
        return 1
    return value if isinstance(value, int) or value is None else 1
