"""Pictures as people have them, to what a vision tower sees: files, bytes, Pillow images and arrays to uint8 squares."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from nev.config.data import Limits
from nev.data.augment import eval_view
from nev.data.decode import BadImage, Encoded, Picture, read_header, to_rgb
from nev.data.orientation import apply_orientation, read_orientation

if TYPE_CHECKING:
    from PIL import Image

Input: TypeAlias = "str | os.PathLike[str] | bytes | Image.Image | NDArray[np.uint8]"
THREADS = min(8, os.cpu_count() or 1)  # that decode; a forward takes the rest of the time


class Square(NamedTuple):
    """A picture as the tower sees it. pixels: uint8 [S, S, 3]; zeros for a bad picture. reason: why it is bad, else empty."""

    pixels: Picture
    reason: str


def is_one(images: object) -> bool:
    """Whether this is one picture, and not several."""
    shape = getattr(images, "shape", None)
    if shape is not None:
        return len(shape) in (2, 3)
    return isinstance(images, str | os.PathLike | bytes | bytearray | memoryview) or hasattr(images, "getexif")


def read_squares(images: Iterable[Any], size: int, limits: Limits, batch: int) -> Iterator[list[Square]]:
    """Decode pictures in threads, a batch ahead of the caller: the pictures of each batch, in order.

    size: S, side of the square, in pixels. batch: pictures of a batch.
    Raises TypeError for what is no picture.
    """
    rest, pending = iter(images), list[list[Future[Square]]]()
    number = 0
    with ThreadPoolExecutor(THREADS) as pool:
        while chunk := list(islice(rest, batch)):
            pending.append([pool.submit(read_square, item, size, limits, number + n) for n, item in enumerate(chunk)])
            number += len(chunk)
            if len(pending) > 1:
                yield [future.result() for future in pending.pop(0)]
        for futures in pending:
            yield [future.result() for future in futures]


def read_square(image: Any, size: int, limits: Limits, number: int = 0) -> Square:
    """The view of evaluation: shortest side to `size`, centre square. number: of the picture, for messages.

    Raises TypeError for what is no picture.
    """
    out: Picture = np.zeros((size, size, 3), np.uint8)
    try:
        eval_view(_open(image, limits, number), out)
    except BadImage as error:
        out[:] = 0
        return Square(out, f"{error}: {os.fspath(image)}" if isinstance(image, str | os.PathLike) else str(error))
    return Square(out, "")


def _open(image: Any, limits: Limits, number: int) -> Encoded:
    """Raises BadImage, and TypeError for what is no picture."""
    if isinstance(image, bytes | bytearray | memoryview):
        return read_header(bytes(image), limits)
    if isinstance(image, str | os.PathLike):
        return read_header(_read_file(image, limits), limits)
    if hasattr(image, "getexif"):
        return _decoded(_from_pillow(image, limits))
    if hasattr(image, "shape"):
        return _decoded(_from_array(np.asarray(image), limits, number))
    raise TypeError(
        f"picture {number} is {type(image).__name__}, not a picture: give a path, the bytes of a file, a Pillow image, or a "
        "uint8 array [height, width, 3]"
    )


def _read_file(path: str | os.PathLike[str], limits: Limits) -> bytes:
    file, text = Path(path).expanduser(), os.fspath(path)
    if "://" in text:
        raise BadImage("pictures are not fetched from URLs: download the picture, and give its path or its bytes")
    try:
        if file.stat().st_size > limits.max_bytes:
            raise BadImage(
                f"the file has {file.stat().st_size:,} bytes, more than limits.max_bytes ({limits.max_bytes:,})"
            )
        return file.read_bytes()
    except FileNotFoundError:
        hint = " (a sentence? Sentences go to encode_text)" if " " in text and not file.suffix else ""
        raise BadImage(f"no such file{hint}") from None
    except (OSError, ValueError) as error:
        raise BadImage(f"cannot be read ({error})") from error


def _from_pillow(image: Image.Image, limits: Limits) -> Picture:
    if image.width * image.height > limits.max_pixels:
        raise BadImage(f"image is {image.width}x{image.height}, more than limits.max_pixels ({limits.max_pixels:,})")
    try:
        upright = 1 if image.format == "TIFF" else read_orientation(image.getexif)  # Pillow turns a TIFF itself
        return apply_orientation(np.array(to_rgb(image)), upright)
    except BadImage:
        raise
    except Exception as error:  # Pillow decodes late, and raises whatever its plugins raise
        raise BadImage(f"{type(error).__name__}: {error}") from error


def _from_array(pixels: NDArray[Any], limits: Limits, number: int) -> Picture:
    shape = "x".join(map(str, pixels.shape))
    if pixels.dtype != np.uint8:
        raise TypeError(f"picture {number} is an array of {pixels.dtype}: give uint8, 0 to 255, [height, width, 3]")
    if pixels.ndim == 2:
        pixels = np.repeat(pixels[..., None], 3, axis=2)
    if pixels.ndim != 3 or pixels.shape[2] not in (1, 3, 4) or 0 in pixels.shape:
        raise TypeError(f"picture {number} is an array of {shape}: give [height, width, 3], red, green and blue")
    if pixels.shape[0] * pixels.shape[1] > limits.max_pixels:
        raise BadImage(f"image is {shape}, more than limits.max_pixels ({limits.max_pixels:,})")
    if pixels.shape[2] == 3:
        return np.require(pixels, requirements=["C", "W"])  # a copy where torch would warn of the memory
    from PIL import Image

    return np.array(to_rgb(Image.fromarray(pixels.squeeze(2) if pixels.shape[2] == 1 else pixels)))


def _decoded(pixels: Picture) -> Encoded:
    height, width, _ = pixels.shape
    return Encoded(height, width, "", partial(_at_full_size, pixels))


def _at_full_size(pixels: Picture, shrink: int) -> Picture:
    return pixels
