"""Pictures stand the way up that EXIF says, in every format, and torn EXIF data do not cost a picture."""

import io
import struct
import zlib

import numpy as np
import pytest
from helpers.pictures import photo
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageFile, ImageOps, PngImagePlugin

from nev.config.data import Limits
from nev.data.decode import decode, read_header
from nev.data.orientation import TAG, jpeg_orientation

PHOTO = photo(0, 48, 40)


def turned(orientation: int, fmt: str = "JPEG") -> bytes:
    """The photograph with an EXIF block that says `orientation`."""
    exif = Image.Exif()
    exif[TAG] = orientation
    file = io.BytesIO()
    PHOTO.save(file, fmt, exif=exif, **({} if fmt == "TIFF" else {"quality": 95}))
    return file.getvalue()


@pytest.mark.parametrize("fmt", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_all_eight_are_turned_as_pillow_turns_them(orientation: int, fmt: str) -> None:
    data = turned(orientation, fmt)
    with Image.open(io.BytesIO(data)) as image:
        expected = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    header = read_header(data, Limits())
    found = header.pixels(1)
    assert (header.height, header.width, 3) == found.shape
    assert found.shape == expected.shape == ((48, 40, 3) if orientation >= 5 else (40, 48, 3))
    assert found.flags.c_contiguous
    assert abs(found.astype(int) - expected).max() <= 4  # two builds of libjpeg
    again = abs(found[::-1].astype(int) - expected).max()
    assert again > 4, "the photograph would look the same in another way up"


def test_a_png_is_decoded_once_and_its_header_alone_not_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    loads: list[str] = []
    load = ImageFile.ImageFile.load
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda self: loads.append("") or load(self))
    file = io.BytesIO()
    PHOTO.save(file, "PNG")
    for data in (file.getvalue(), turned(6, "PNG")):
        loads.clear()
        header = read_header(data, Limits())
        assert not loads
        header.pixels(1)
        assert len(loads) > 0


@pytest.mark.parametrize("place", ["Raw profile type exif", "XML:com.adobe.xmp", "eXIf behind the pixels"])
def test_a_png_says_its_way_up_in_other_places_too(place: str) -> None:
    file, text = io.BytesIO(), PngImagePlugin.PngInfo()
    exif = Image.Exif()
    exif[TAG] = 6
    if place.startswith("Raw"):
        text.add_text(place, f"\nexif\n{len(exif.tobytes())}\n{exif.tobytes().hex()}")
    elif place.startswith("XML"):
        text.add_itxt(place, '<rdf:Description tiff:Orientation="6"/>')
    PHOTO.save(file, "PNG", pnginfo=text)
    data = file.getvalue()
    if place.startswith("eXIf"):
        block = exif.tobytes()[6:]
        chunk = b"eXIf" + block
        end = data.index(b"IEND") - 4
        data = data[:end] + struct.pack(">I", len(block)) + chunk + struct.pack(">I", zlib.crc32(chunk)) + data[end:]
    header = read_header(data, Limits())
    assert (header.height, header.width) == (48, 40)
    assert header.pixels(1).shape == (48, 40, 3)


@pytest.mark.parametrize("orientation", [0, 9, 65535])
def test_values_outside_the_standard_are_upright(orientation: int) -> None:
    assert decode(turned(orientation), Limits()).shape == (40, 48, 3)


def test_without_exif_nothing_is_turned() -> None:
    file = io.BytesIO()
    PHOTO.save(file, "JPEG")
    assert jpeg_orientation(file.getvalue()) == 1


@given(at=st.integers(0, 60), value=st.integers(0, 255), cut=st.integers(0, 60))
def test_torn_exif_does_not_cost_the_picture(at: int, value: int, cut: int) -> None:
    data = bytearray(turned(6))
    begin = data.index(b"Exif\0\0")
    length = int.from_bytes(data[begin - 2 : begin], "big") - 2
    data[begin + 6 + at % (length - 6)] = value
    assert sorted(decode(bytes(data), Limits()).shape) == [3, 40, 48]
    assert isinstance(jpeg_orientation(bytes(data[: begin + min(cut, length)])), int)
