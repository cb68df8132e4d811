"""`reader.py` of an export: it sees the pixels that nev sees, and refuses what is no picture."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.models import SIZE
from helpers.pictures import encoded, photo
from helpers.wide_pictures import make_png, make_tiff
from PIL import Image

from nev.config.data import Limits
from nev.export.single_file import make_reader_file
from nev.export.templates import reader
from nev.inference.pictures import read_square

GREY = np.tile(np.linspace(0, 255, 64).astype(np.int64), (48, 1))


def png(mode: str, **options: Any) -> bytes:
    return encoded(photo(5, 70, 45).convert(mode), "PNG", **options)


PICTURES: dict[str, Callable[[], bytes]] = {
    "colour": lambda: png("RGB"),
    "grey": lambda: png("L"),
    "palette": lambda: png("P"),
    "palette, clear": lambda: png("P", transparency=3),
    "grey, clear": lambda: encoded(Image.merge("LA", photo(6, 50, 70).split()[:2]), "PNG"),
    "16 bits": lambda: encoded(Image.fromarray(np.arange(60 * 50, dtype=np.uint16).reshape(60, 50) * 20), "PNG"),
    "12 bits": lambda: make_tiff(GREY * 4095 // 255, 1, bits=12),
    "16 bits, white is zero": lambda: make_tiff((GREY * 257).astype("<u2"), 0),
    "16 bits, signed": lambda: make_tiff((GREY * 32767 // 255).astype("<i2"), 1, form=2),
    "16 bits, a clear grey": lambda: make_png(GREY * 257, 16, (int(GREY[0, 9]) * 257,)),
    "one bit": lambda: png("1"),
    "CMYK": lambda: encoded(photo(7, 64, 48).convert("CMYK"), "TIFF"),
    "as large as the square": lambda: encoded(photo(8, SIZE, SIZE), "PNG"),
    "smaller": lambda: encoded(photo(9, 9, 12), "PNG"),
    "torn EXIF": lambda: encoded(photo(10, 50, 40), "PNG", exif=b"Exif\0\0II*\0\xff\xff"),
}
IMAGE = {"size": SIZE, "max_bytes": 2**20, "max_pixels": 10**6}


@pytest.mark.parametrize("name", PICTURES)
def test_the_reader_sees_the_pixels_that_nev_sees(name: str) -> None:
    data = PICTURES[name]()
    expected = read_square(data, SIZE, Limits())
    assert not expected.reason
    assert abs(reader.read_square(data, IMAGE).astype(int) - expected.pixels).max() <= 1


def test_the_file_of_an_export_needs_no_nev(tmp_path: Path) -> None:
    (tmp_path / "reader.py").write_text(text := make_reader_file())
    assert "import nev" not in text
    assert "from nev" not in text
    spec: Any = importlib.util.spec_from_file_location("exported_reader", tmp_path / "reader.py")
    exported = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(exported)
    for name, make in PICTURES.items():
        assert np.array_equal(exported.read_square(make(), IMAGE), reader.read_square(make(), IMAGE)), name
    with pytest.raises(exported.BadImage, match=r"^floating-point pixels have no fixed white$"):
        exported.read_square(Image.new("F", (9, 9)), IMAGE)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("form", ["JPEG", "PNG", "TIFF"])
def test_the_reader_turns_pictures_as_nev_does(orientation: int, form: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(photo(11, 70, 44), form, exif=exif, **({"quality": 95} if form == "JPEG" else {}))
    difference = abs(reader.read_square(data, IMAGE).astype(int) - read_square(data, SIZE, Limits()).pixels)
    assert difference.max() <= (4 if form == "JPEG" else 1)  # two builds of libjpeg


def test_real_photographs_are_read_alike(data_folder: Path) -> None:
    files = sorted((data_folder / "imagenet_sample").glob("*.JPEG"))[:24]
    config = {**IMAGE, "size": 224, "max_bytes": 2**25, "max_pixels": 10**8}
    for file in files:
        difference = abs(reader.read_square(file, config).astype(int) - read_square(file, 224, Limits()).pixels)
        assert difference.mean() < 0.5
        assert difference.max() <= 8


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (b"no picture", "not a picture"),
        (b"", "not a picture"),
        (encoded(photo(0), "EPS"), "not a picture"),
        (encoded(photo(0), "PNG")[:60], "not a picture"),
        (encoded(Image.new("1", (2000, 501)), "PNG"), "2000x501 pixels, more than 1,000,000"),
        (b"x" * (2**20 + 1), "1,048,577 bytes, more than 1,048,576"),
        (Image.new("F", (9, 9)), "no fixed white"),
        ("/nowhere/photo.jpg", "No such file"),
        (7, "not a picture"),
    ],
)
def test_the_reader_refuses_what_is_no_picture(source: Any, message: str) -> None:
    with pytest.raises(reader.BadImage, match=message):
        reader.read_square(source, IMAGE)


def test_a_bad_picture_is_named_by_its_place_in_the_list(tmp_path: Path) -> None:
    numbers = {"mean": [0.5] * 3, "std": [0.5] * 3}
    (tmp_path / "preprocessing.json").write_text(json.dumps({"width": 8, "image": {**IMAGE, **numbers}}))
    model = reader.Model(tmp_path)
    with pytest.raises(reader.BadImage, match="picture 5: not a picture"):
        model.read_pixels([photo(0), b"no picture"], first=4)
