"""From encoded bytes to uint8 RGB pixels: formats, limits, damage, decoding at a part of the size."""

import random
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from helpers.pictures import encoded, mutated, photo
from PIL import Image
from pydantic import ValidationError

from nev.config.data import Limits
from nev.data.decode import BadImage, decode, read_header

LIMITS = Limits()
PHOTO = photo(0, 48, 40)


def far(pixels: np.ndarray, image: Image.Image) -> int:
    """The largest difference to a picture, in levels."""
    return int(abs(pixels.astype(int) - np.asarray(image).astype(int)).max())


def chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def png_claiming(width: int, height: int) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


def jpeg_claiming(width: int, height: int) -> bytes:
    data = bytearray(encoded(PHOTO))
    at = data.index(b"\xff\xc0") + 5  # start of frame: marker, length, precision, then height and width
    data[at : at + 4] = struct.pack(">HH", height, width)
    return bytes(data)


@pytest.mark.parametrize("fmt", ["PNG", "BMP", "TIFF", "PPM", "GIF"])
def test_lossless_formats_give_their_pixels(fmt: str) -> None:
    image = PHOTO.quantize(64).convert("RGB") if fmt == "GIF" else PHOTO
    pixels = decode(encoded(image, fmt), LIMITS)
    assert pixels.dtype == np.uint8
    assert pixels.shape == (40, 48, 3)
    assert far(pixels, image) == 0


@pytest.mark.parametrize(
    ("fmt", "options"), [("JPEG", {}), ("JPEG", {"progressive": True}), ("WEBP", {}), ("AVIF", {})]
)
def test_lossy_formats_give_nearly_their_pixels(fmt: str, options: dict[str, bool]) -> None:
    pixels = decode(encoded(PHOTO, fmt, quality=95, **options), LIMITS)
    assert pixels.dtype == np.uint8
    assert pixels.shape == (40, 48, 3)
    assert far(pixels, PHOTO) <= 16


@pytest.mark.parametrize("fmt", ["JPEG", "PNG"])
def test_grey_becomes_rgb(fmt: str) -> None:
    pixels = decode(encoded(PHOTO.convert("L"), fmt, quality=95), LIMITS)
    assert (pixels == pixels[:, :, :1]).all()
    assert far(pixels, PHOTO.convert("L").convert("RGB")) <= 6


def test_sixteen_bits_become_eight_over_the_whole_range() -> None:
    levels = np.tile(np.linspace(0, 65535, 64).astype(np.uint16), (8, 1))
    pixels = decode(encoded(Image.fromarray(levels), "PNG"), LIMITS)
    assert (pixels == (levels >> 8)[:, :, None]).all()
    pgm = b"P5 64 8 65535\n" + levels.astype(">u2").tobytes()
    assert (decode(pgm, LIMITS) == pixels).all()


def test_palettes_and_transparency() -> None:
    assert far(decode(encoded(PHOTO.quantize(256), "PNG"), LIMITS), PHOTO.quantize(256).convert("RGB")) == 0
    glass = PHOTO.copy()
    glass.putalpha(Image.linear_gradient("L").resize(PHOTO.size))
    white = Image.alpha_composite(Image.new("RGBA", PHOTO.size, "white"), glass).convert("RGB")
    assert far(decode(encoded(glass, "PNG"), LIMITS), white) == 0
    keyed = Image.new("P", (8, 8), 1)
    keyed.putpalette([10, 20, 30, 200, 100, 50])
    keyed.paste(0, (0, 0, 4, 8))
    pixels = decode(encoded(keyed, "GIF", transparency=0), LIMITS)
    assert (pixels[:, :4] == 255).all()
    assert (pixels[:, 4:] == [200, 100, 50]).all()


def test_cmyk_becomes_rgb() -> None:
    pixels = decode(encoded(PHOTO.convert("CMYK"), "JPEG", quality=95), LIMITS)
    assert far(pixels, PHOTO) <= 16


def test_real_photographs_decode_as_pillow_decodes_them(data_folder: Path) -> None:
    paths = (
        sorted((data_folder / "satellite").rglob("cloudy/*"))[:10]
        + sorted((data_folder / "imagenet_sample").iterdir())[:10]
    )
    assert len(paths) == 20
    modes = set()
    for path in paths:
        with Image.open(path) as image:
            modes.add(image.mode)
            assert far(decode(path.read_bytes(), LIMITS), image.convert("RGB")) <= 4
    assert {"CMYK", "RGB"} <= modes


@pytest.mark.parametrize("view", [bytes, bytearray, memoryview])
def test_any_buffer_will_do(view: type) -> None:
    for fmt in ("JPEG", "PNG"):
        data = encoded(PHOTO, fmt)
        assert (decode(view(data), LIMITS) == decode(data, LIMITS)).all()


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "image is empty"),
        (b"<html>404</html>", "not an image in a known format"),
        (encoded(PHOTO)[:-2], "OSError: image file is truncated"),
        (encoded(PHOTO)[: len(encoded(PHOTO)) * 3 // 4], "OSError: image file is truncated"),
        (encoded(PHOTO)[:10], "OSError: Truncated File Read"),
        (encoded(PHOTO.convert("CMYK"))[:-40], "truncated"),
        (encoded(PHOTO, "PNG")[:-200], "OSError: .*truncated"),
        (encoded(PHOTO, "WEBP")[:-20], "WebP|Error"),
        (encoded(Image.fromarray(np.ones((4, 4), np.float32)), "TIFF"), "floating-point"),
        (b"GIF89a" + bytes(7) + b"," + bytes(9) + b"\x02\x02\x44\x01\x00;", "not an image"),  # 0 x 0
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n", "not an image"),
    ],
    ids=["empty", "html", "no end", "cut", "head", "cmyk cut", "png cut", "webp cut", "float", "no pixels", "eps"],
)
def test_what_is_no_picture_has_a_reason(data: bytes, reason: str) -> None:
    with pytest.raises(BadImage, match=reason) as first:
        decode(data, LIMITS)
    with pytest.raises(BadImage) as second:
        decode(bytes(data), LIMITS)
    assert str(first.value) == str(second.value)  # no addresses in it: the same row, the same block


@pytest.mark.parametrize(
    "data",
    [png_claiming(9000, 9000), jpeg_claiming(9000, 9000), png_claiming(2**31 - 1, 2**31 - 1)],
    ids=["png", "jpeg", "largest png"],
)
def test_a_picture_that_claims_to_be_huge_is_not_decoded(data: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    def decoded(*_: object, **__: object) -> None:
        raise AssertionError("pixels were decoded")

    monkeypatch.setattr("simplejpeg.decode_jpeg", decoded)
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", decoded)
    with pytest.raises(BadImage, match=r"9000x9000, more than limits\.max_pixels|exceeds limit"):
        decode(data, LIMITS)


def test_limits_hold_to_the_pixel_and_to_the_byte() -> None:
    for data in (encoded(PHOTO), encoded(PHOTO, "PNG")):
        assert decode(data, Limits(max_pixels=40 * 48, max_bytes=len(data))).shape == (40, 48, 3)
        with pytest.raises(BadImage, match=r"48x40, more than limits\.max_pixels"):
            decode(data, Limits(max_pixels=40 * 48 - 1))
        with pytest.raises(BadImage, match=rf"{len(data)} bytes, more than limits\.max_bytes"):
            decode(data, Limits(max_bytes=len(data) - 1))


@pytest.mark.parametrize("fmt", ["PNG", "JPEG"])
def test_the_limit_is_the_same_for_every_format(fmt: str) -> None:
    data = encoded(Image.new("L", (10_000, 9_500)), fmt)  # 95 M pixels: Pillow alone warns above 89 M
    header = read_header(data, Limits(max_pixels=100_000_000))
    assert (header.height, header.width) == (9_500, 10_000)
    with pytest.raises(ValidationError, match="max_pixels"):
        Limits(max_pixels=200_000_000)  # Pillow refuses those


def test_damaged_pictures_are_bad_images_and_nothing_worse() -> None:
    rng = random.Random(5)
    sources = [
        *(encoded(PHOTO, fmt) for fmt in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF")),
        encoded(PHOTO.convert("CMYK")),
        encoded(PHOTO.convert("L")),
        encoded(PHOTO, progressive=True),
    ]
    bad = 0
    limits = Limits(max_pixels=4_000_000)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for trial in range(480):
            data = mutated(sources[trial % len(sources)], rng)
            try:
                header = read_header(data, limits)
                pixels = header.pixels(1)
            except BadImage:
                bad += 1
                continue
            assert pixels.dtype == np.uint8
            assert pixels.shape == (header.height, header.width, 3)
    assert 100 < bad < 480


def test_no_warning_comes_out_of_a_picture() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for fmt in ("JPEG", "PNG", "GIF"):
            decode(encoded(PHOTO, fmt), LIMITS)
