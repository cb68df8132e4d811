"""From an encoded image to the square that a tower sees: crop, resize, flip, colours.

All random numbers of a picture come from one `random.Random`, seeded by (seed, epoch, uid). So a resumed run, and a run with
another number of workers, see the same pixels. The crop is drawn before the picture is decoded, since the header has the size.
Pictures are resized directly into the row of the block by torch's antialiased bicubic kernel on uint8 in NHWC, which torchvision
uses too. torchvision and timm are imported only for colour changes, since they add seconds to the start of a decoding process.
"""

from __future__ import annotations

import functools
import hashlib
import math
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from nev.common.imports import import_uninterrupted
from nev.config.base import ConfigError
from nev.config.data import Augment, Jitter
from nev.data.decode import BadImage, Encoded, Picture, bad_image_for_any_error, shrink_for

if TYPE_CHECKING:
    from PIL import Image

OPENAI_MEAN = (122, 116, 104)  # mean colour of OpenAI CLIP, in 0..255; timm's operations fill edges with it


class Box(NamedTuple):
    """A rectangle of a picture, in pixels."""

    top: int
    left: int
    rows: int
    columns: int


def seeded_random(seed: int, epoch: int, uid: str, purpose: str) -> random.Random:
    """A random generator that depends on these four arguments alone.

    Call only its `random()`: Python promises that this stream stays the same over releases.
    """
    key = hashlib.blake2b(f"{seed}/{epoch}/{purpose}/{uid}".encode(), digest_size=16).digest()
    return random.Random(int.from_bytes(key, "little"))


def seeded_fractions(seed: int, epoch: int, uids: Sequence[str], purpose: str) -> list[float]:
    """A number in [0, 1) for each uid, which depends on these four arguments alone. A tenth of the time of `seeded_random`."""
    start = hashlib.blake2b(f"{seed}/{epoch}/{purpose}/".encode(), digest_size=6)
    fractions = []
    for uid in uids:
        key = start.copy()
        key.update(uid.encode())
        fractions.append(int.from_bytes(key.digest(), "little") / 2**48)
    return fractions


@bad_image_for_any_error()
def train_view(image: Encoded, out: Picture, augment: Augment, rng: random.Random) -> None:
    """Write the training view into `out`, uint8 [size, size, 3], contiguous: random crop, flip, colour jitter, auto-augment.

    A large JPEG is decoded at 1/2, 1/4 or 1/8 of its size where the crop still has `size` pixels a side. Raises BadImage.
    """
    box = random_crop(image.height, image.width, augment, rng)
    shrink = shrink_for(box.rows, box.columns, len(out))
    resize_into(out, _crop_pixels(image, box, shrink))
    if augment.flip and rng.random() < 0.5:
        out[:] = out[:, ::-1].copy()
    if augment.jitter:
        out[:] = apply_jitter(out, augment.jitter, rng)
    if augment.auto:
        out[:] = _apply_auto_augment(out, augment.auto, rng)


@bad_image_for_any_error()
def eval_view(image: Encoded, out: Picture) -> None:
    """Write the evaluation view into `out`, uint8 [size, size, 3], contiguous: shortest side to `size`, then the centre square.

    The picture is decoded at its full size, as by other tools. Raises BadImage.
    """
    # The square is cropped before the only resize: the same field of view with less work.
    side = min(image.height, image.width)
    box = Box((image.height - side) // 2, (image.width - side) // 2, side, side)
    resize_into(out, _crop_pixels(image, box, shrink=1))


def random_crop(height: int, width: int, augment: Augment, rng: random.Random) -> Box:
    """A crop of random area and aspect ratio, as torchvision draws it: ten tries, then the centre."""
    low, high = augment.ratio
    for _ in range(10):
        area = height * width * (augment.scale[0] + rng.random() * (augment.scale[1] - augment.scale[0]))
        ratio = math.exp(math.log(low) + rng.random() * (math.log(high) - math.log(low)))
        columns, rows = round((area * ratio) ** 0.5), round((area / ratio) ** 0.5)
        if 0 < columns <= width and 0 < rows <= height:
            return Box(
                int(rng.random() * (height - rows + 1)), int(rng.random() * (width - columns + 1)), rows, columns
            )
    columns = min(width, max(1, round(height * high)))
    rows = min(height, max(1, round(width / low)))
    return Box((height - rows) // 2, (width - columns) // 2, rows, columns)


def _crop_pixels(image: Encoded, box: Box, shrink: int) -> Picture:
    """The pixels of a box, as a view of the picture decoded at 1/shrink of its size."""
    picture = image.pixels(shrink)
    height, width, _ = picture.shape
    if (height, width) != (image.height, image.width):
        if shrink == 1 or (height, width) != (-(-image.height // shrink), -(-image.width // shrink)):
            raise BadImage(f"the header says {image.width}x{image.height}, the pixels are {width}x{height}")
        rows, columns = round(box.rows / shrink), round(box.columns / shrink)
        top, left = min(round(box.top / shrink), height - rows), min(round(box.left / shrink), width - columns)
        box = Box(top, left, rows, columns)
    return picture[box.top : box.top + box.rows, box.left : box.left + box.columns]


def resize_into(out: Picture, picture: Picture) -> None:
    """Resize by the antialiased bicubic filter: uint8 [h, w, 3] -> `out`, uint8 [size, size, 3], contiguous."""
    if picture.shape == out.shape:
        out[:] = picture
        return
    import torch

    # NCHW with NHWC strides, without a copy. `torch.nn.functional.interpolate` is this operator without `out`.
    source, target = (torch.from_numpy(pixels).permute(2, 0, 1).unsqueeze(0) for pixels in (picture, out))
    torch.ops.aten._upsample_bicubic2d_aa.out(source, out.shape[:2], False, None, None, out=target)


def apply_jitter(picture: Picture, jitter: Jitter, rng: random.Random) -> Picture:
    """torchvision's ColorJitter: brightness, contrast, saturation and hue in random order. uint8 [h, w, 3] -> the same."""
    import_uninterrupted("torchvision.transforms.v2.functional")
    import torch
    from torchvision.transforms.v2 import functional

    changes: dict[str, tuple[Callable[..., Any], float]] = {
        "brightness": (functional.adjust_brightness, jitter.brightness),
        "contrast": (functional.adjust_contrast, jitter.contrast),
        "saturation": (functional.adjust_saturation, jitter.saturation),
        "hue": (functional.adjust_hue, jitter.hue),
    }
    pixels = torch.from_numpy(picture).permute(2, 0, 1)
    for name in sorted(changes, key=lambda _: rng.random()):
        change, strength = changes[name]
        offset = (2 * rng.random() - 1) * strength
        if strength:
            pixels = change(pixels, offset if name == "hue" else 1 + offset)
    changed: Picture = pixels.permute(1, 2, 0).numpy()
    return changed


def _apply_auto_augment(picture: Picture, name: str, rng: random.Random) -> Picture:
    from PIL import Image

    change = auto_augment(name, len(picture))
    try:
        with _seed_global_random(rng):
            return np.asarray(change(Image.fromarray(picture)))
    except ValueError as error:  # timm's policy v0 draws bits that Pillow refuses
        raise BadImage(f"augmentation {name}: {error}") from error


@functools.lru_cache(maxsize=4)
def auto_augment(name: str, size: int) -> Callable[[Image.Image], Image.Image]:
    """Make timm's automatic augmentation of a name: 'rand-m9-mstd0.5-inc1', 'augmix-m3-w3', 'original', 'v0', '3a', ...

    size: side of the pictures, in pixels. Raises ConfigError for a name that timm does not know.
    """
    import_uninterrupted("timm.data.auto_augment")
    from timm.data import auto_augment as timm_augment

    kind = name.split("-")[0]
    makers = {"rand": timm_augment.rand_augment_transform, "augmix": timm_augment.augment_and_mix_transform}
    make = makers.get(kind, timm_augment.auto_augment_transform)
    try:
        change: Callable[[Image.Image], Image.Image] = make(
            name, {"translate_const": int(size * 0.45), "img_mean": OPENAI_MEAN}
        )
    except (AssertionError, ValueError, KeyError) as error:
        raise ConfigError(
            f"data.augment.auto: timm has no augmentation {name!r} ({error}). "
            "Examples: rand-m9-mstd0.5-inc1, augmix-m3-w3, original-mstd0.5, v0, 3a."
        ) from error
    return change


@contextmanager
def _seed_global_random(rng: random.Random) -> Iterator[None]:
    """Seed the modules `random` and `numpy.random`, from which timm draws, and restore their states at the end."""
    state, numpy_state = random.getstate(), np.random.get_state()
    random.seed(int(rng.random() * 2**53))
    np.random.seed(int(rng.random() * 2**32))
    try:
        yield
    finally:
        random.setstate(state)
        np.random.set_state(numpy_state)
