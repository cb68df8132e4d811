"""Encoded image bytes to one uint8 RGB picture of (size, size, 3), by the least work.

JPEG goes through libjpeg-turbo (simplejpeg); everything else, and JPEGs that are not RGB or grey, through Pillow. Resizing is
torch's antialiased bicubic kernel on uint8 in NHWC, which is what torchvision calls underneath; torchvision itself is not
imported, since that costs a decoding process seconds at its start.
"""

from __future__ import annotations

import hashlib
import io
import random
import warnings
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from nev.config import Augment, Limits
from nev.data.orientation import jpeg_orientation, orientation_of, upright

if TYPE_CHECKING:
    from PIL import Image

# What Pillow may open. Among its other formats is EPS, which it hands to Ghostscript: a program in the bytes of a picture.
PILLOW_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF")

Picture = NDArray[np.uint8]


class BadImage(ValueError):
    """Bytes that are not a usable picture. The message is the reason kept in the quarantine table."""


def draw(seed: int, epoch: int, uid: str, purpose: str) -> random.Random:
    """A random stream that depends on these four alone, so that a resumed or resized run draws the same.

    `random.Random.random()` is the one stream that Python promises to keep over its releases.
    """
    key = hashlib.blake2b(f"{seed}/{epoch}/{purpose}/{uid}".encode(), digest_size=16).digest()
    return random.Random(int.from_bytes(key, "little"))


def decode(data: bytes | memoryview, limits: Limits) -> Picture:
    """Decode to uint8 RGB [h, w, 3], the way up that EXIF says. Size limits hold before any pixel is decoded.

    Raises BadImage with the reason.
    """
    if not len(data):
        raise BadImage("image is empty")
    if len(data) > limits.max_bytes:
        raise BadImage(f"image has {len(data)} bytes, more than limits.max_bytes")
    if bytes(data[:3]) == b"\xff\xd8\xff":
        return _jpeg(data, limits)
    return _pillow(data, limits)


def _jpeg(data: bytes | memoryview, limits: Limits) -> Picture:
    import simplejpeg

    try:
        height, width, colorspace, _ = simplejpeg.decode_jpeg_header(data)
        _check_pixels(width, height, limits)
        if colorspace in ("CMYK", "YCCK"):
            return _pillow(data, limits)
        pixels: Picture = simplejpeg.decode_jpeg(data, colorspace="RGB")
        return upright(pixels, jpeg_orientation(data))
    except BadImage:
        raise
    except ValueError as error:
        raise BadImage(f"JPEG: {error}") from error


def _pillow(data: bytes | memoryview, limits: Limits) -> Picture:
    from PIL import Image, UnidentifiedImageError

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(data), formats=PILLOW_FORMATS) as image:
                _check_pixels(image.width, image.height, limits)
                pixels = np.array(_rgb(image))  # a copy: Pillow's own memory is read-only, which torch warns about
                return upright(pixels, orientation_of(image.getexif))  # after loading: TIFF is upright by then
    except BadImage:
        raise
    except UnidentifiedImageError as error:
        raise BadImage(f"not an image in a known format ({', '.join(PILLOW_FORMATS)})") from error
    except Exception as error:
        raise BadImage(f"{type(error).__name__}: {error}") from error


def _rgb(image: Image.Image) -> Image.Image:
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


def train_view(picture: Picture, size: int, augment: Augment, rng: random.Random) -> Picture:
    """RandomResizedCrop and flip: uint8 [h, w, 3] -> uint8 [size, size, 3]."""
    height, width, _ = picture.shape
    top, left, rows, columns = random_crop(height, width, augment, rng)
    view = _resize(picture[top : top + rows, left : left + columns], size, size)
    return view[:, ::-1] if augment.flip and rng.random() < 0.5 else view


def random_crop(height: int, width: int, augment: Augment, rng: random.Random) -> tuple[int, int, int, int]:
    """(top, left, rows, columns) of a crop of random area and aspect, as torchvision draws it: ten tries, then the centre."""
    low, high = augment.ratio
    for _ in range(10):
        area = height * width * (augment.scale[0] + rng.random() * (augment.scale[1] - augment.scale[0]))
        ratio = float(np.exp(np.log(low) + rng.random() * (np.log(high) - np.log(low))))
        columns, rows = round((area * ratio) ** 0.5), round((area / ratio) ** 0.5)
        if 0 < columns <= width and 0 < rows <= height:
            return int(rng.random() * (height - rows + 1)), int(rng.random() * (width - columns + 1)), rows, columns
    columns = min(width, max(1, round(height * high)))
    rows = min(height, max(1, round(width / low)))
    return (height - rows) // 2, (width - columns) // 2, rows, columns


def eval_view(picture: Picture, size: int) -> Picture:
    """Shortest side to `size`, then the centre square: uint8 [h, w, 3] -> uint8 [size, size, 3]."""
    height, width, _ = picture.shape
    # Cropping the square first and resizing once gives the same field of view for the least work.
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    return _resize(picture[top : top + side, left : left + side], size, size)


def _resize(picture: Picture, height: int, width: int) -> Picture:
    if picture.shape[:2] == (height, width):
        return picture
    import torch

    pixels = torch.from_numpy(picture).permute(2, 0, 1).unsqueeze(0)  # NCHW with NHWC strides: no copy
    resized = torch.nn.functional.interpolate(pixels, (height, width), mode="bicubic", antialias=True)
    return resized.squeeze(0).permute(1, 2, 0).numpy()
