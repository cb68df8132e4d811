"""JPEGs of which libjpeg warns and which every viewer shows: Pillow's pixels, upright. What Pillow refuses stays bad."""

from __future__ import annotations

import io

import numpy as np
import pytest
from helpers.pictures import encoded, photo
from PIL import Image, ImageOps

from nev.config.data import Limits
from nev.data.augment import eval_view
from nev.data.decode import BadImage, decode, read_header

XMP = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="8"/></x:xmpmeta>'


def make_jpeg(**options: object) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded(photo(1, 320, 240), quality=92, **{"exif": exif, **options})


def split(data: bytes) -> tuple[list[bytes], bytes]:
    """The segments behind the first marker, and the scan with all after it."""
    at, segments = 2, []
    while data[at + 1] != 0xDA:
        end = at + 2 + int.from_bytes(data[at + 2 : at + 4], "big")
        segments.append(data[at:end])
        at = end
    return segments, data[at:]


def join(segments: list[bytes], scan: bytes) -> bytes:
    return b"\xff\xd8" + b"".join(segments) + scan


def before(marker: int, junk: bytes) -> bytes:
    """A JPEG with bytes before the first segment of a kind."""
    segments, scan = split(make_jpeg())
    at = next(number for number, segment in enumerate(segments) if segment[1] == marker)
    return join([*segments[:at], junk, *segments[at:]], scan)


def with_sos_parameters(parameters: bytes) -> bytes:
    segments, scan = split(make_jpeg())
    end = 2 + int.from_bytes(scan[2:4], "big")
    return join(segments, scan[: end - 3] + parameters + scan[end:])


WHOLE = make_jpeg()
BENIGN = {
    "whole": WHOLE,
    "parameters of a scan as Samsung's cameras write them": with_sos_parameters(b"\0\0\0"),
    "parameters of a scan: any": with_sos_parameters(b"\1\2\3"),
    "a byte before DQT": before(0xDB, b"\0"),
    "bytes before DHT": before(0xC4, b"junk\0\1\2"),
    "bytes before SOF": before(0xC0, b"\1\2"),
    "fill bytes before APP1": before(0xE1, b"\xff\xff"),
    "fill bytes before DQT": before(0xDB, b"\xff"),
    "a byte before APP1": before(0xE1, b"\0"),
    "bytes before the end": WHOLE[:-2] + b"\1\2\3" + WHOLE[-2:],
    "bytes behind the end": WHOLE + bytes(99),
    "another picture behind the end": WHOLE + make_jpeg(),
    "progressive, a byte before DHT": before(0xC4, b"\0"),
    "an unknown segment": before(0xDB, b"\xff\xef\0\4ab"),
}


@pytest.mark.parametrize("data", BENIGN.values(), ids=BENIGN)
def test_the_pixels_are_pillow_s(data: bytes) -> None:
    expected = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB"))
    assert np.array_equal(decode(data, Limits()), expected)
    assert np.array_equal(decode(memoryview(data), Limits()), expected)
    small, whole = (np.zeros((32, 32, 3), np.uint8) for _ in range(2))
    eval_view(read_header(data, Limits()), small)
    eval_view(read_header(WHOLE, Limits()), whole)
    assert np.array_equal(small, whole)


def test_a_large_crop_of_a_damaged_header_has_its_pixels() -> None:
    image = read_header(BENIGN["parameters of a scan: any"], Limits())
    assert image.pixels(2).shape in ((320, 240, 3), (160, 120, 3))


@pytest.mark.parametrize("share", [0.1, 0.5, 0.67, 0.95])
def test_a_scan_that_is_cut_off_is_bad(share: float) -> None:
    for data in (WHOLE, make_jpeg(progressive=True)):
        with pytest.raises(BadImage):
            decode(data[: int(len(data) * share)], Limits())


@pytest.mark.parametrize("orientation", range(10))
def test_an_orientation_in_xmp_alone_counts(orientation: int) -> None:
    xmp = XMP.replace(b'"8"', f'"{orientation}"'.encode())
    for exif in (Image.Exif(), None):
        more = {} if exif is None else {"exif": exif}
        data = encoded(photo(1, 40, 24), xmp=xmp, **more)
        expected = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB"))
        assert np.array_equal(decode(data, Limits()), expected)
    both = make_jpeg(xmp=xmp)
    assert decode(both, Limits()).shape == (320, 240, 3), "EXIF comes first"


def test_headers_that_never_end_cost_no_time() -> None:
    for data in (b"\xff\xd8" + b"\xff\xe1\0\0" * 300_000, b"\xff\xd8" + b"\xff\xe1\0\3a\0" * 200_000):
        with pytest.raises(BadImage):
            decode(data, Limits())
