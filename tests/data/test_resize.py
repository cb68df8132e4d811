"""Pictures made smaller on their way into a shard: size, format, way up, and what stays as it was."""

import io
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from nev.config.data import Limits
from nev.data.prepare.resize import Resize, resize_image, shrink
from nev.data.rows import Row


def photograph(width: int, height: int, kind: str, exif: int | None = None, mode: str = "RGB") -> bytes:
    """A smooth picture, red from left to right and green from top to bottom."""
    x, y = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    image = Image.fromarray(np.stack([x, y, np.full_like(x, 60)], axis=2).astype(np.uint8)).convert(mode)
    out, tags = io.BytesIO(), Image.Exif()
    if exif:
        tags[0x0112] = exif
    image.save(out, kind, exif=tags) if exif else image.save(out, kind)
    return out.getvalue()


def opened(image: bytes | None) -> Image.Image:
    assert image
    return Image.open(io.BytesIO(image))


@pytest.mark.parametrize(
    ("kind", "wanted", "expected"),
    [
        ("JPEG", "keep", "JPEG"),
        ("WEBP", "keep", "WEBP"),
        ("PNG", "keep", "PNG"),
        ("GIF", "keep", "PNG"),
        ("BMP", "keep", "PNG"),
        ("JPEG", "webp", "WEBP"),
        ("PNG", "jpeg", "JPEG"),
    ],
)
@pytest.mark.parametrize("size", [(300, 200), (200, 300)])
def test_the_shorter_side_becomes_the_size_asked_for(kind: str, wanted: Any, expected: str, size: Any) -> None:
    small = opened(shrink(photograph(*size, kind), Resize(side=64, format=wanted), Limits()))
    assert small.format == expected
    assert small.size == tuple(side * 64 // 200 for side in size)
    there = np.asarray(small.convert("RGB"), float)
    once = Image.open(io.BytesIO(photograph(*size, kind))).convert("RGB").resize(small.size, Image.Resampling.BICUBIC)
    assert np.abs(there - np.asarray(once, float)).mean() < 4


def test_a_large_jpeg_looks_as_if_decoded_whole() -> None:
    speckles = np.random.default_rng(0).integers(0, 256, (100, 100), np.uint8)
    out = io.BytesIO()
    Image.fromarray(speckles).resize((800, 800), Image.Resampling.NEAREST).save(out, "JPEG", quality=95)
    small = opened(shrink(out.getvalue(), Resize(side=100, quality=100), Limits())).convert("L")
    whole = Image.open(out).resize((100, 100), Image.Resampling.BICUBIC)
    # Decoded at 1/4 it is 3 levels off; at 1/8, which leaves the resizing nothing to do, 20.
    assert np.abs(np.asarray(small, float) - np.asarray(whole, float)).mean() < 5


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF"])
def test_smaller_pictures_keep_their_bytes(kind: str) -> None:
    for size in ((64, 500), (20, 20)):
        data = photograph(*size, kind)
        assert shrink(data, Resize(side=64, format="webp"), Limits()) is data


def test_the_way_up_is_in_the_pixels_afterwards() -> None:
    turned = opened(shrink(photograph(400, 200, "JPEG", exif=6), Resize(side=50), Limits()))
    assert turned.size == (50, 100)
    assert 0x0112 not in turned.getexif()
    red, green, _ = np.asarray(turned, float)[-1, 0]
    assert red > 200  # the right side of the stored picture is the bottom of the upright one
    assert green > 200  # and its bottom the left side


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK"])
def test_every_mode_becomes_rgb(mode: str) -> None:
    kind = "JPEG" if mode == "CMYK" else "PNG"
    small = opened(shrink(photograph(90, 90, kind, mode=mode), Resize(side=30, format="jpeg"), Limits()))
    assert (small.mode, small.size) == ("RGB", (30, 30))


def test_quality_is_a_matter_of_bytes() -> None:
    rng = np.random.default_rng(0)
    out = io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (128, 128, 3), np.uint8)).save(out, "PNG")
    for kind in ("jpeg", "webp"):
        low, high = (shrink(out.getvalue(), Resize(side=64, format=kind, quality=q), Limits()) for q in (20, 95))
        assert low
        assert high
        assert len(low) < len(high) / 2


def test_rows_stay_in_order_and_bad_ones_are_counted() -> None:
    out = io.BytesIO()
    Image.new("L", (40_000, 4)).save(out, "PNG")  # too long for WebP once its shorter side is 2
    rows: list[Row] = [
        {"uid": str(at), "image": photograph(8 + at % 7, 8, "PNG") if at % 10 else b"torn", "caption": "x"}
        for at in range(100)
    ]
    rows[5]["image"] = out.getvalue()
    dropped: Counter[str] = Counter()
    kept = list(resize_image(rows, Resize(side=2, format="webp"), Limits(), dropped))
    assert [row["uid"] for row in kept] == [str(at) for at in range(100) if at % 10 and at != 5]
    assert {min(opened(row["image"]).size) for row in kept} == {2}
    assert dropped == {"image can't be resized": 11}


def test_photographs_shrink_to_a_part_of_their_bytes(data_folder: Path) -> None:
    for path in sorted((data_folder / "imagenet_sample").glob("*.JPEG"))[:10]:
        data = path.read_bytes()
        small = shrink(data, Resize(side=96), Limits())
        assert min(opened(small).size) == 96
        assert len(small or b"") < len(data) / 2
