"""Encoded image bytes to uint8 RGB pixels.

JPEG goes through libjpeg-turbo (simplejpeg); everything else, and JPEGs that are not RGB or grey, through Pillow. The header
comes first: a caller that knows the size can draw its crop before a pixel exists, and have a large JPEG decoded at 1/2, 1/4
or 1/8 of its size, by an inverse DCT of fewer coefficients.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from nev.config.data import Limits
from nev.data.orientation import SIDEWAYS, apply_orientation, jpeg_orientation, read_orientation

if TYPE_CHECKING:
    from PIL import Image

# Of torn metadata and large pictures Pillow warns once a picture, in a worker's log: both are dealt with here.
warnings.filterwarnings("ignore", module=r"PIL\.")

# What Pillow may open. Among its other formats is EPS, which it hands to Ghostscript: a program in the bytes of a picture.
PILLOW_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF")

# Where a PNG can say how it is to be turned: its own chunk, and what ImageMagick and Adobe's programs write.
PNG_ORIENTATION = (b"eXIf", b"Raw profile type exif", b"XML:com.adobe.xmp")

Picture = NDArray[np.uint8]
SHRINKS = (8, 4, 2)  # what libjpeg-turbo has fast code for; the factors between cost more than they save


class BadImage(ValueError):
    """Bytes that are not a usable picture. The message is the reason kept in the quarantine table."""


class Encoded(NamedTuple):
    """An image whose header has been read. height, width: as it stands upright; format: as Pillow names it.

    `pixels(shrink)` decodes it to uint8 RGB [ceil(height / shrink), ceil(width / shrink), 3] or larger (only JPEG shrinks),
    and raises BadImage where it can't.
    """

    height: int
    width: int
    format: str
    pixels: Callable[[int], Picture]


def read_header(data: bytes | memoryview, limits: Limits) -> Encoded:
    """Read the size of an encoded image and hold it against the limits; no pixel is decoded. Raises BadImage."""
    if not len(data):
        raise BadImage("image is empty")
    if len(data) > limits.max_bytes:
        raise BadImage(f"image has {len(data)} bytes, more than limits.max_bytes")
    jpeg = bytes(data[:3]) == b"\xff\xd8\xff"
    return (_jpeg if jpeg else _pillow)(data, limits)


def decode(data: bytes | memoryview, limits: Limits) -> Picture:
    """Decode to uint8 RGB [h, w, 3], the way up that EXIF says. Raises BadImage with the reason."""
    return read_header(data, limits).pixels(1)


def shrink_for(rows: int, columns: int, size: int) -> int:
    """The largest factor by which a JPEG may be decoded smaller, so that a crop of it still has `size` pixels a side."""
    return next((shrink for shrink in SHRINKS if min(rows, columns) >= shrink * size), 1)


def _jpeg(data: bytes | memoryview, limits: Limits) -> Encoded:
    import simplejpeg

    try:
        height, width, colorspace, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError as error:
        raise BadImage(f"JPEG: {error}") from error
    _check_pixels(width, height, limits)
    if colorspace in ("CMYK", "YCCK"):
        return _pillow(data, limits)
    orientation = jpeg_orientation(data)

    def pixels(shrink: int) -> Picture:
        least = {"min_height": -(-height // shrink), "min_width": -(-width // shrink), "min_factor": shrink}
        try:
            found: Picture = simplejpeg.decode_jpeg(data, colorspace="RGB", **least if shrink > 1 else {})
        except ValueError as error:
            raise BadImage(f"JPEG: {error}") from error
        return apply_orientation(found, orientation)

    return Encoded(*_upright_size(height, width, orientation), "JPEG", pixels)


def _pillow(data: bytes | memoryview, limits: Limits) -> Encoded:
    with _explained(), _opened(data) as image:
        _check_pixels(image.width, image.height, limits)
        orientation = _orientation(image, data)
        height, width = _upright_size(image.height, image.width, orientation)
        return Encoded(height, width, str(image.format), partial(_pillow_pixels, data, orientation))


def _pillow_pixels(data: bytes | memoryview, orientation: int, shrink: int) -> Picture:
    """The whole picture: Pillow's formats do not shrink."""
    with _explained(), _opened(data) as image:
        # A copy: Pillow's own memory is read-only, which torch warns about.
        return apply_orientation(np.array(to_rgb(image)), orientation)


def _orientation(image: Image.Image, data: bytes | memoryview) -> int:
    """What is left to turn after loading: Pillow turns a TIFF itself, and gives its upright size from the start.

    Of a PNG Pillow looks for it behind the pixels as well, and decodes them all on the way: only where it can be there.
    """
    if image.format == "TIFF" or (image.format == "PNG" and not any(mark in bytes(data) for mark in PNG_ORIENTATION)):
        return 1
    return read_orientation(image.getexif)


def _opened(data: bytes | memoryview) -> Image.Image:
    from PIL import Image

    return Image.open(io.BytesIO(data), formats=PILLOW_FORMATS)


@contextmanager
def _explained() -> Iterator[None]:
    """Whatever Pillow raises over torn bytes becomes BadImage."""
    from PIL import UnidentifiedImageError

    try:
        yield
    except BadImage:
        raise
    except UnidentifiedImageError as error:
        raise BadImage(f"not an image in a known format ({', '.join(PILLOW_FORMATS)})") from error
    except Exception as error:
        raise BadImage(f"{type(error).__name__}: {error}") from error


def _upright_size(height: int, width: int, orientation: int) -> tuple[int, int]:
    return (width, height) if orientation in SIDEWAYS else (height, width)


def to_rgb(image: Image.Image) -> Image.Image:
    """Any Pillow mode as RGB; transparency is laid over white. Sixteen bits become eight; floats are refused."""
    from PIL import Image

    if image.mode == "F":
        raise BadImage("floating-point pixels have no fixed white")
    if image.mode.startswith("I"):  # 16-bit grey, which convert("RGB") would clip at 255
        image = Image.fromarray((np.asarray(image).clip(0, 65535) >> 8).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    return image.convert("RGB")


def _check_pixels(width: int, height: int, limits: Limits) -> None:
    if width * height > limits.max_pixels:
        raise BadImage(f"image is {width}x{height}, more than limits.max_pixels")
