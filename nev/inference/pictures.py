"""Pictures as people have them, to what a vision tower sees: files, bytes, Pillow images and arrays to uint8 squares.

Paths and bytes are decoded by threads. Pillow images, arrays and open files belong to the caller, who may close or change them as
soon as the next picture is taken: the caller's thread reads them, one after another.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from nev.config.data import Limits
from nev.data.augment import eval_view
from nev.data.colour import to_rgb
from nev.data.decode import BadImage, Encoded, Picture, bad_image_for_any_error, read_header
from nev.data.orientation import apply_orientation, read_orientation

if TYPE_CHECKING:
    from PIL import Image

THREADS = min(8, os.cpu_count() or 1)  # that decode; a forward takes the rest of the time
Buffer = bytes | bytearray | memoryview
FORMS = "a path, the bytes of a file, a file open for reading, a Pillow image, or a uint8 array [height, width, 3]"


class Square(NamedTuple):
    """A picture as the tower sees it. pixels: uint8 [S, S, 3]; zeros for a bad picture. reason: why it is bad, else empty."""

    pixels: Picture
    reason: str


def is_single(images: object) -> bool:
    """Whether this is one picture, and not several. Raises TypeError for what is neither."""
    if isinstance(images, str | os.PathLike | Buffer) or hasattr(images, "getexif") or hasattr(images, "read"):
        return True
    shape = getattr(images, "shape", None)
    if shape is not None and len(shape) in (2, 3):
        return True
    if not isinstance(images, Iterable) or shape == ():
        raise TypeError(f"{type(images).__name__} is no picture and no list of pictures. A picture is {FORMS}")
    return False


def read_squares(images: Iterable[Any], size: int, limits: Limits, batch: int) -> Iterator[list[Square]]:
    """Decode pictures in threads, a batch ahead of the caller: the pictures of each batch, in order.

    size: S, side of the square, in pixels. batch: pictures of a batch.
    Raises TypeError for what is no picture.
    """
    rest, pending = iter(enumerate(images)), list[list[Future[Square]]]()
    with ThreadPoolExecutor(THREADS) as pool:
        while futures := [
            pool.submit(_make_square, _take(image, limits, number), size) for number, image in islice(rest, batch)
        ]:
            pending.append(futures)
            if len(pending) > 1:
                yield [future.result() for future in pending.pop(0)]
        for futures in pending:
            yield [future.result() for future in futures]


def read_square(image: Any, size: int, limits: Limits, number: int = 0) -> Square:
    """The view of evaluation: shortest side to `size`, centre square. number: of the picture, for messages.

    Raises TypeError for what is no picture.
    """
    return _make_square(_take(image, limits, number), size)


def _make_square(read: Callable[[], Encoded], size: int) -> Square:
    out: Picture = np.zeros((size, size, 3), np.uint8)
    try:
        eval_view(read(), out)
    except BadImage as error:
        out[:] = 0
        return Square(out, str(error))
    return Square(out, "")


def _take(image: Any, limits: Limits, number: int) -> Callable[[], Encoded]:
    """A function that opens the picture, for another thread: it holds nothing that the caller may close or change.

    The function raises BadImage. Raises TypeError for what is no picture.
    """
    try:
        if isinstance(image, str | os.PathLike):
            return partial(_open_file, image, limits)
        if isinstance(image, Buffer):
            return partial(read_header, bytes(image), limits)
        if hasattr(image, "getexif"):
            return partial(_as_encoded, _from_pillow(image, limits))
        if hasattr(image, "shape"):
            return partial(_as_encoded, _from_array(image, limits, number))
        if hasattr(image, "read"):
            return partial(read_header, _from_stream(image, limits, number), limits)
    except BadImage as error:
        return partial(_refuse, str(error))
    raise TypeError(f"picture {number} is {type(image).__name__}, not a picture: give {FORMS}")


def _refuse(reason: str) -> Encoded:
    raise BadImage(reason)


def _open_file(path: str | os.PathLike[str], limits: Limits) -> Encoded:
    try:
        return read_header(_read_file(os.fsdecode(path), limits), limits)
    except BadImage as error:
        raise BadImage(f"{error}: {os.fsdecode(path)}") from error


def _read_file(path: str, limits: Limits) -> bytes:
    if "://" in path:
        raise BadImage("pictures are not fetched from URLs: download the picture, and give its path or its bytes")
    try:
        file = Path(path).expanduser()
        if not stat.S_ISREG(file.stat().st_mode):  # a pipe would wait for its writer, a device may never end
            raise BadImage("not a regular file")
        with file.open("rb") as stream:
            return stream.read(limits.max_bytes + 1)  # read_header refuses what is longer
    except FileNotFoundError:
        hint = " (a sentence? Sentences go to encode_text)" if " " in path and not Path(path).suffix else ""
        raise BadImage(f"no such file{hint}") from None
    except BadImage:
        raise
    except (OSError, ValueError, RuntimeError) as error:  # RuntimeError: the home of an unknown user, ~name
        raise BadImage(f"cannot be read ({error})") from error


def _from_stream(stream: Any, limits: Limits, number: int) -> bytes:
    try:
        data = stream.read(limits.max_bytes + 1)
    except (OSError, ValueError) as error:
        raise BadImage(f"cannot be read ({error})") from error
    if not isinstance(data, bytes):
        raise TypeError(f"picture {number} is an open file that gives {type(data).__name__}: open it in mode 'rb'")
    return data


def _from_pillow(image: Image.Image, limits: Limits) -> Picture:
    _check_size(image.height, image.width, limits)
    with bad_image_for_any_error():  # Pillow decodes late
        upright = 1 if image.format == "TIFF" else read_orientation(image.getexif)  # Pillow turns a TIFF itself
        return apply_orientation(np.array(to_rgb(image)), upright)


def _from_array(image: Any, limits: Limits, number: int) -> Picture:
    pixels = np.asarray(image.cpu() if hasattr(image, "cpu") else image)
    if pixels.dtype != np.uint8:
        raise TypeError(f"picture {number} is an array of {pixels.dtype}: give uint8, 0 to 255, [height, width, 3]")
    if pixels.ndim not in (2, 3) or pixels.shape[2:] not in ((), (1,), (3,), (4,)):
        shape = "x".join(map(str, pixels.shape))
        raise TypeError(f"picture {number} is an array of {shape}: give [height, width, 3], red, green and blue")
    _check_size(pixels.shape[0], pixels.shape[1], limits)
    if pixels.shape[2:] == (3,):
        return np.array(pixels)
    if pixels.shape[2:] != (4,):
        return np.repeat(pixels.reshape(*pixels.shape[:2], 1), 3, axis=2)
    from PIL import Image

    return np.array(to_rgb(Image.fromarray(pixels)))


def _check_size(height: int, width: int, limits: Limits) -> None:
    if not height or not width:
        raise BadImage(f"image is {width}x{height}: it has no pixels")
    if height * width > limits.max_pixels:
        raise BadImage(f"image is {width}x{height}, more than limits.max_pixels ({limits.max_pixels:,})")


def _as_encoded(pixels: Picture) -> Encoded:
    height, width, _ = pixels.shape
    return Encoded(height, width, "", partial(_at_full_size, pixels))


def _at_full_size(pixels: Picture, shrink: int) -> Picture:
    return pixels
