"""Grey of 12, 16 and 32 bits, and transparent colours of a PNG: as the forms of 8 bits."""

from __future__ import annotations

import io

import numpy as np
import pytest
from helpers.wide_pictures import make_png, make_tiff
from numpy.typing import NDArray
from PIL import Image

from nev.config.data import Limits
from nev.data.decode import decode

GREY = np.tile(np.linspace(0, 255, 64).astype(np.int64), (48, 1))
WIDE = GREY * 257
SIGNED = GREY * 32767 // 255


def make_pgm(largest: int) -> bytes:
    return b"P5 64 48 %d\n" % largest + (GREY * largest // 255).astype(">u2").tobytes()


def save(pixels: NDArray[np.uint16], form: str) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, form)
    return file.getvalue()


FORMS = {
    "TIFF of 8 bits, white is zero": make_tiff((255 - GREY).astype("u1"), 0),
    "TIFF of 16 bits, white is zero": make_tiff((65535 - WIDE).astype("<u2"), 0),
    "TIFF of 16 bits": make_tiff(WIDE.astype("<u2"), 1),
    "TIFF of 16 bits, large end first": make_tiff(WIDE.astype(">u2"), 1, order=">"),
    "TIFF of 12 bits": make_tiff(GREY * 4095 // 255, 1, bits=12),
    "TIFF of signed 16 bits": make_tiff(SIGNED.astype("<i2"), 1, 2),
    "TIFF of signed 16 bits, large end first": make_tiff(SIGNED.astype(">i2"), 1, 2, ">"),
    "TIFF of 32 bits that holds 8": make_tiff(GREY.astype("<u4"), 1),
    "TIFF of signed 32 bits that holds 8": make_tiff(GREY.astype("<i4"), 1, 2),
    "TIFF of signed 32 bits that holds 16": make_tiff(WIDE.astype("<i4"), 1, 2),
    "TIFF of signed 32 bits": make_tiff((GREY << 23).astype("<i4"), 1, 2),
    "PNG of 16 bits": save(WIDE.astype(np.uint16), "PNG"),
    "JPEG 2000 of 16 bits": save(WIDE.astype(np.uint16), "JPEG2000"),
    "PGM of 16 bits": make_pgm(65535),
    "PGM of 10 bits": make_pgm(1023),
}


@pytest.mark.parametrize("data", FORMS.values(), ids=FORMS)
def test_grey_of_any_width_is_that_of_8_bits(data: bytes) -> None:
    pixels = decode(data, Limits()).astype(int)
    assert np.abs(pixels - GREY[:, :, None]).max() <= 1


@pytest.mark.parametrize("depth", [1, 2, 4, 8, 16])
def test_a_transparent_grey_is_over_white(depth: int) -> None:
    middle = 2**depth // 3
    pixels = np.zeros((48, 64), np.int64)
    pixels[24:] = middle
    for transparent in (0, middle):
        grey = decode(make_png(pixels, depth, (transparent,)), Limits())
        expected = np.where(pixels == transparent, 255, pixels * 255 // (2**depth - 1))
        assert np.array_equal(grey, np.repeat(expected[:, :, None], 3, axis=2)), (depth, transparent)


@pytest.mark.parametrize("depth", [8, 16])
def test_a_transparent_colour_is_over_white(depth: int) -> None:
    colour = (1000, 40000, 65535) if depth == 16 else (10, 200, 77)
    pixels = np.zeros((48, 64, 3), np.int64)
    pixels[24:] = colour
    colours = decode(make_png(pixels, depth, colour), Limits())
    assert (colours[24:] == 255).all()
    assert not colours[:24].any()
