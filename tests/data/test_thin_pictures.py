"""Pictures of one to three pixels, and whatever else one picture raises: each costs its row at most, never a run."""

from __future__ import annotations

import io
import random

import numpy as np
import pytest
from helpers.pictures import encoded
from PIL import Image, ImageOps

from nev.config.data import Augment, Jitter, Limits
from nev.data import augment as views
from nev.data.augment import eval_view, train_view
from nev.data.decode import PILLOW_FORMATS, BadImage, decode, read_header
from nev.embed.thumbnails import make_views

SIZES = [(w, h) for w in (1, 2, 3) for h in (1, 2, 3, 40)] + [(40, h) for h in (1, 2, 3)]
AUGMENTS = [
    Augment(),
    Augment(scale=(0.01, 1.0), ratio=(0.1, 10.0), flip=True),
    Augment(jitter=Jitter(brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1), flip=True),
    Augment(auto="rand-m9-mstd0.5-inc1"),
    Augment(auto="augmix-m3-w3"),
]
# AVIF's own header turns a picture, and these have no EXIF that Pillow writes.
WITHOUT_EXIF = {"GIF", "BMP", "PPM", "JPEG2000"}


def draw(width: int, height: int, seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize("form", PILLOW_FORMATS)
def test_every_size_orientation_and_augmentation_gives_the_picture(form: str) -> None:
    rng = random.Random(3)
    for number, (width, height) in enumerate(SIZES):
        for orientation in range(1, 2 if form in WITHOUT_EXIF else 9):
            exif = Image.Exif()
            exif[0x0112] = orientation
            more = {} if form in WITHOUT_EXIF else {"exif": exif}
            data = encoded(draw(width, height, number), form, **more)
            expected = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
            assert np.array_equal(decode(data, Limits()), np.asarray(expected)), (form, width, height, orientation)
            image, out = read_header(data, Limits()), np.zeros((32, 32, 3), np.uint8)
            eval_view(image, out)
            for augment in AUGMENTS:
                train_view(image, out, augment, rng)
            square, thumbnail = make_views(data, 32, Limits(), 16)
            assert not square.reason
            assert thumbnail


def test_any_exception_of_a_picture_is_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    image, out = read_header(encoded(draw(9, 9, 0)), Limits()), np.zeros((32, 32, 3), np.uint8)

    def fail(*_: object) -> None:
        raise ZeroDivisionError("of a library")

    monkeypatch.setattr(views, "resize_into", fail)
    with pytest.raises(BadImage, match="ZeroDivisionError: of a library"):
        eval_view(image, out)
    with pytest.raises(BadImage, match="ZeroDivisionError: of a library"):
        train_view(image, out, Augment(), random.Random(0))
