"""From encoded bytes to one uint8 RGB picture: formats, limits, damage, resizing, cropping, random draws."""

import random
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from data_helpers import encoded, photo
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from nev.config import Augment, Limits
from nev.data.decode import BadImage, decode, draw, eval_view, random_crop, train_view

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
        (encoded(PHOTO)[:-2], "JPEG: "),
        (encoded(PHOTO)[: len(encoded(PHOTO)) * 3 // 4], "JPEG: "),
        (encoded(PHOTO)[:10], "JPEG: "),
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


def mutated(data: bytes, rng: random.Random) -> bytes:
    """Real bytes with a few bytes changed, a run cut out, doubled or overwritten, or the end lost."""
    changed = bytearray(data)
    start = rng.randrange(len(changed))
    length = rng.randrange(1, 64)
    kind = rng.randrange(5)
    if kind == 0:
        for _ in range(rng.randrange(1, 20)):
            changed[rng.randrange(len(changed))] = rng.randrange(256)
    elif kind == 1:
        del changed[start : start + length]
    elif kind == 2:
        changed[start:start] = changed[start : start + length]
    elif kind == 3:
        changed[start : start + length] = rng.randbytes(length)
    else:
        del changed[start:]
    # Half of the damage goes into the header, which decoders believe.
    if kind == 0 and rng.random() < 0.5:
        changed[rng.randrange(min(64, len(changed)))] = rng.randrange(256)
    return bytes(changed)


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
                pixels = decode(data, limits)
            except BadImage:
                bad += 1
                continue
            assert pixels.dtype == np.uint8
            assert pixels.ndim == 3
            assert pixels.shape[2] == 3
            assert train_view(pixels, 16, Augment(), draw(0, 0, "u", "augment")).shape == (16, 16, 3)
            assert eval_view(pixels, 16).shape == (16, 16, 3)
    assert 100 < bad < 480


def test_damaged_real_photographs(data_folder: Path) -> None:
    rng = random.Random(6)
    paths = (
        sorted((data_folder / "imagenet_sample").iterdir())[:8]
        + sorted((data_folder / "satellite/cloudy").iterdir())[:4]
    )
    bad = 0
    for trial in range(120):
        try:
            pixels = decode(mutated(paths[trial % len(paths)].read_bytes(), rng), LIMITS)
            assert pixels.shape[2] == 3
        except BadImage:
            bad += 1
    assert bad > 20


def test_no_warning_comes_out_of_a_picture() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for fmt in ("JPEG", "PNG", "GIF"):
            train_view(decode(encoded(PHOTO, fmt), LIMITS), 16, Augment(), draw(0, 0, "u", "augment"))


@pytest.mark.parametrize(("height", "width"), [(40, 48), (37, 91), (500, 333), (8, 8), (1, 7)])
def test_resizing_is_torchvisions_antialiased_bicubic(height: int, width: int) -> None:
    from torchvision.transforms.v2 import functional as vision

    image = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    whole = Augment(scale=(1, 1), ratio=(width / height, width / height))
    ours = train_view(image, 32, whole, draw(0, 0, "u", "augment"))
    theirs = vision.resize(Image.fromarray(image), [32, 32], vision.InterpolationMode.BICUBIC, antialias=True)
    assert ours.shape == (32, 32, 3)
    assert far(ours, theirs) <= 1


def test_the_evaluation_view_is_the_centre_square() -> None:
    from torchvision.transforms.v2 import functional as vision

    for width, height in ((60, 40), (40, 60), (41, 40), (32, 32)):
        image = photo(1, width, height)
        side = min(width, height)
        square = vision.center_crop(image, [side, side])
        expected = vision.resize(square, [32, 32], vision.InterpolationMode.BICUBIC, antialias=True)
        assert far(eval_view(np.asarray(image).copy(), 32), expected) <= 1


def test_flips_are_half_of_the_views_and_mirror_the_same_crop() -> None:
    image = np.asarray(PHOTO).copy()
    plain, flipped = Augment(scale=(0.5, 1)), Augment(scale=(0.5, 1), flip=True)
    mirrored = 0
    for trial in range(200):
        straight = train_view(image, 8, plain, draw(0, trial, "u", "augment"))
        other = train_view(image, 8, flipped, draw(0, trial, "u", "augment"))
        turned = bool((other == straight[:, ::-1]).all())
        assert turned or (other == straight).all()
        mirrored += turned
    assert 70 < mirrored < 130


@given(
    st.integers(1, 400),
    st.integers(1, 400),
    st.tuples(st.floats(0.01, 1), st.floats(0.01, 1)).map(sorted),
    st.tuples(st.floats(0.2, 5), st.floats(0.2, 5)).map(sorted),
    st.integers(),
)
def test_crops_stay_inside(height: int, width: int, scale: list[float], ratio: list[float], seed: int) -> None:
    augment = Augment(scale=(scale[0], scale[1]), ratio=(ratio[0], ratio[1]))
    top, left, rows, columns = random_crop(height, width, augment, random.Random(seed))
    assert 0 <= top < top + rows <= height
    assert 0 <= left < left + columns <= width


def test_crops_are_spread_as_torchvisions() -> None:
    import torch
    from torchvision.transforms.v2 import RandomResizedCrop

    augment = Augment(scale=(0.3, 0.9), ratio=(0.75, 4 / 3))
    torch.manual_seed(0)
    theirs = RandomResizedCrop(8, augment.scale, augment.ratio)
    rng = random.Random(0)
    picture = [torch.empty(3, 200, 300)]
    names = ("top", "left", "height", "width")
    expected = np.array([[theirs.make_params(picture)[name] for name in names] for _ in range(4000)])
    drawn = np.array([random_crop(200, 300, augment, rng) for _ in range(4000)])
    error = (expected.var(0) / 4000 + drawn.var(0) / 4000) ** 0.5
    assert (abs(drawn.mean(0) - expected.mean(0)) < 4.5 * error).all()
    assert (abs(drawn.std(0) / expected.std(0) - 1) < 0.08).all()
    area = drawn[:, 2] * drawn[:, 3] / (200 * 300)
    assert area.min() > 0.29
    assert area.max() < 0.91


@pytest.mark.parametrize(("height", "width", "crop"), [(1000, 20, (486, 0, 27, 20)), (20, 1000, (0, 486, 20, 27))])
def test_a_strip_falls_back_to_the_centre_with_the_nearest_aspect(
    height: int, width: int, crop: tuple[int, int, int, int]
) -> None:
    assert random_crop(height, width, Augment(scale=(0.9, 1.0)), random.Random(0)) == crop


def test_a_draw_depends_on_seed_epoch_uid_and_purpose_alone() -> None:
    streams = {
        key: draw(*key).random()  # type: ignore[arg-type]
        for key in [
            (0, 0, "a", "x"),
            (1, 0, "a", "x"),
            (0, 1, "a", "x"),
            (0, 0, "b", "x"),
            (0, 0, "a", "y"),
            (11, 0, "a", "x"),
            (1, 10, "a", "x"),
        ]
    }
    assert len(set(streams.values())) == len(streams)
    random.seed(3)
    assert all(draw(*key).random() == value for key, value in streams.items())  # type: ignore[arg-type]
    assert draw(7, 3, "uid-1", "augment").random() == 0.2072710528393188
    values = [draw(0, epoch, "a", "x").random() for epoch in range(2000)]
    assert abs(np.mean(values) - 0.5) < 0.03
    assert abs(np.corrcoef(values[:-1], values[1:])[0, 1]) < 0.1
