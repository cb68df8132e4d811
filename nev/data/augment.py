"""From an encoded image to the square that a tower sees: crop, resize, flip, colours.

Every draw comes from one `random.Random` seeded by (seed, epoch, uid), so that a resumed or resized run sees the same pixels.
The crop is drawn from the header, before anything is decoded. Resizing is torch's antialiased bicubic kernel on uint8 in
NHWC, which is what torchvision calls underneath, straight into the row of the block. torchvision and timm are imported only
where colours are asked for, since they cost a decoding process seconds at its start.
"""

from __future__ import annotations

import functools
import hashlib
import math
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from nev.common.imports import import_uninterrupted
from nev.config.base import ConfigError
from nev.config.data import Augment, Jitter
from nev.data.decode import BadImage, Encoded, Picture, shrink_for

if TYPE_CHECKING:
    from PIL import Image

OPENAI_MEAN = (122, 116, 104)  # what timm's operations fill an edge with: the mean colour of OpenAI CLIP, in 0..255


class Box(NamedTuple):
    """A rectangle of a picture, in pixels."""

    top: int
    left: int
    rows: int
    columns: int


def draw(seed: int, epoch: int, uid: str, purpose: str) -> random.Random:
    """A random stream that depends on these four alone, so that a resumed or resized run draws the same.

    `random.Random.random()` is the one stream that Python promises to keep over its releases.
    """
    key = hashlib.blake2b(f"{seed}/{epoch}/{purpose}/{uid}".encode(), digest_size=16).digest()
    return random.Random(int.from_bytes(key, "little"))


def train_view(image: Encoded, out: Picture, augment: Augment, rng: random.Random) -> None:
    """RandomResizedCrop, flip, colour jitter, auto-augment, into `out`: uint8 [size, size, 3], contiguous.

    A large JPEG is decoded at 1/2, 1/4 or 1/8 where its crop still has `size` pixels a side. Raises BadImage.
    """
    box = random_crop(image.height, image.width, augment, rng)
    shrink = shrink_for(box.rows, box.columns, len(out))
    resize_into(out, _cut(image, box, shrink))
    if augment.flip and rng.random() < 0.5:
        out[:] = out[:, ::-1].copy()
    if augment.jitter:
        out[:] = apply_jitter(out, augment.jitter, rng)
    if augment.auto:
        out[:] = _auto_augmented(out, augment.auto, rng)


def eval_view(image: Encoded, out: Picture) -> None:
    """Shortest side to `size`, then the centre square, into `out`: uint8 [size, size, 3], contiguous.

    The whole of the picture's pixels are decoded, as other tools evaluate. Raises BadImage.
    """
    # Cropping the square first and resizing once gives the same field of view for the least work.
    side = min(image.height, image.width)
    box = Box((image.height - side) // 2, (image.width - side) // 2, side, side)
    resize_into(out, _cut(image, box, shrink=1))


def random_crop(height: int, width: int, augment: Augment, rng: random.Random) -> Box:
    """A crop of random area and aspect, as torchvision draws it: ten tries, then the centre."""
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


def _cut(image: Encoded, box: Box, shrink: int) -> Picture:
    """The pixels of a box, a view of the decoded picture. Where that is 1/shrink of the size, so is the box."""
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
    """Antialiased bicubic: uint8 [h, w, 3] -> `out`, uint8 [size, size, 3], contiguous, with no array in between."""
    if picture.shape == out.shape:
        out[:] = picture
        return
    import torch

    # NCHW with NHWC strides: neither is a copy. `torch.nn.functional.interpolate` is this operator without its `out`.
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


def _auto_augmented(picture: Picture, name: str, rng: random.Random) -> Picture:
    from PIL import Image

    change = auto_augment(name, len(picture))
    try:
        with _global_randomness(rng):
            return np.asarray(change(Image.fromarray(picture)))
    except ValueError as error:  # timm's policy v0 draws bits that Pillow refuses
        raise BadImage(f"augmentation {name}: {error}") from error


@functools.lru_cache(maxsize=4)
def auto_augment(name: str, size: int) -> Callable[[Image.Image], Image.Image]:
    """timm's automatic augmentation of this name: 'rand-m9-mstd0.5-inc1', 'augmix-m3-w3', 'original', 'v0', '3a', ...

    Raises ConfigError for a name that timm does not know.
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
def _global_randomness(rng: random.Random) -> Iterator[None]:
    """timm draws from the modules `random` and `numpy.random`: seed them for the moment, then put them back."""
    kept, kept_numpy = random.getstate(), np.random.get_state()
    random.seed(int(rng.random() * 2**53))
    np.random.seed(int(rng.random() * 2**32))
    try:
        yield
    finally:
        random.setstate(kept)
        np.random.set_state(kept_numpy)
