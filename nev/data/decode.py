"""Encoded image bytes to uint8 RGB pixels.

libjpeg-turbo (simplejpeg) decodes JPEGs in RGB or grey; Pillow decodes everything else. The header is read first: a caller
that knows the size can draw its crop before the picture is decoded, and let a large JPEG be decoded at 1/2, 1/4 or 1/8 of its
size, by an inverse DCT of fewer coefficients.
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
from nev.data.colour import NoColour, to_rgb
from nev.data.orientation import SIDEWAYS, apply_orientation, jpeg_orientation, read_orientation

if TYPE_CHECKING:
    from PIL import Image

# Pillow warns of damaged metadata and of large pictures, once a picture, in the log of a worker. This module handles both.
warnings.filterwarnings("ignore", module=r"PIL\.")

# Formats that Pillow may open. EPS is not among them: Pillow would let Ghostscript run a program in the bytes of a picture.
PILLOW_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF")

# Marks of a PNG's orientation: PNG's own chunk, and the text that ImageMagick and Adobe's programs write.
PNG_ORIENTATION = (b"eXIf", b"Raw profile type exif", b"XML:com.adobe.xmp")

Picture = NDArray[np.uint8]
SHRINKS = (8, 4, 2)  # factors for which libjpeg-turbo has fast code; other factors cost more time than they save


class BadImage(ValueError):
    """Bytes that are not a usable picture. The message becomes the reason in the quarantine table."""


@contextmanager
def bad_image_for_any_error() -> Iterator[None]:
    """Turn whatever a picture raises into BadImage: it costs its row, and never the run."""
    from PIL import UnidentifiedImageError

    try:
        yield
    except BadImage:
        raise
    except NoColour as error:
        raise BadImage(str(error)) from error
    except UnidentifiedImageError as error:
        raise BadImage(f"not an image in a known format ({', '.join(PILLOW_FORMATS)})") from error
    except Exception as error:
        raise BadImage(f"{type(error).__name__}: {error}") from error


class Encoded(NamedTuple):
    """An image whose header has been read.

    height, width: of the upright picture, in pixels.
    format: Pillow's name of the format.
    pixels: `pixels(shrink)` decodes the image to uint8 RGB [ceil(height / shrink), ceil(width / shrink), 3], or at its full size
        if it is not a JPEG. Raises BadImage.
    """

    height: int
    width: int
    format: str
    pixels: Callable[[int], Picture]


@bad_image_for_any_error()
def read_header(data: bytes | memoryview, limits: Limits) -> Encoded:
    """Read the size of an encoded image and check the limits. No pixel is decoded. Raises BadImage."""
    if not len(data):
        raise BadImage("image is empty")
    if len(data) > limits.max_bytes:
        raise BadImage(f"image has {len(data)} bytes, more than limits.max_bytes")
    jpeg = bytes(data[:3]) == b"\xff\xd8\xff"
    return (_jpeg if jpeg else _pillow)(data, limits)


def decode(data: bytes | memoryview, limits: Limits) -> Picture:
    """Decode to uint8 RGB [h, w, 3], upright by its EXIF data. Raises BadImage with the reason."""
    return read_header(data, limits).pixels(1)


def shrink_for(rows: int, columns: int, size: int) -> int:
    """The largest factor in `SHRINKS`, or 1, with which a crop of a JPEG still has `size` pixels a side."""
    return next((shrink for shrink in SHRINKS if min(rows, columns) >= shrink * size), 1)


def _jpeg(data: bytes | memoryview, limits: Limits) -> Encoded:
    import simplejpeg

    try:
        height, width, colorspace, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError:  # libjpeg's warnings are errors here; Pillow takes what can be seen
        return _pillow(data, limits)
    _check_pixels(width, height, limits)
    if colorspace in ("CMYK", "YCCK"):
        return _pillow(data, limits)
    orientation = jpeg_orientation(data)

    @bad_image_for_any_error()
    def pixels(shrink: int) -> Picture:
        minimum = {"min_height": -(-height // shrink), "min_width": -(-width // shrink), "min_factor": shrink}
        try:
            picture: Picture = simplejpeg.decode_jpeg(data, colorspace="RGB", **minimum if shrink > 1 else {})
        except ValueError:
            return _pillow_pixels(data, orientation, shrink)
        return apply_orientation(picture, orientation)

    return Encoded(*_upright_size(height, width, orientation), "JPEG", pixels)


def _pillow(data: bytes | memoryview, limits: Limits) -> Encoded:
    with _open_image(data) as image:
        _check_pixels(image.width, image.height, limits)
        orientation = _orientation(image, data)
        height, width = _upright_size(image.height, image.width, orientation)
        return Encoded(height, width, str(image.format), partial(_pillow_pixels, data, orientation))


@bad_image_for_any_error()
def _pillow_pixels(data: bytes | memoryview, orientation: int, shrink: int) -> Picture:
    """The picture at its full size: nothing that Pillow decodes is shrunk."""
    with _open_image(data) as image:
        # A copy, because torch warns of Pillow's memory, which is read-only.
        return apply_orientation(np.array(to_rgb(image)), orientation)


def _orientation(image: Image.Image, data: bytes | memoryview) -> int:
    """The orientation of an image that Pillow loads. 1 for a TIFF, which Pillow turns upright itself.

    For a PNG, Pillow searches behind the pixels too, and decodes all of them to get there. So a PNG is searched only if its bytes
    have a mark of an orientation.
    """
    if image.format == "TIFF" or (image.format == "PNG" and not any(mark in bytes(data) for mark in PNG_ORIENTATION)):
        return 1
    return read_orientation(image.getexif)


def _open_image(data: bytes | memoryview) -> Image.Image:
    from PIL import Image

    return Image.open(io.BytesIO(data), formats=PILLOW_FORMATS)


def _upright_size(height: int, width: int, orientation: int) -> tuple[int, int]:
    return (width, height) if orientation in SIDEWAYS else (height, width)


def _check_pixels(width: int, height: int, limits: Limits) -> None:
    if width * height > limits.max_pixels:
        raise BadImage(f"image is {width}x{height}, more than limits.max_pixels")
