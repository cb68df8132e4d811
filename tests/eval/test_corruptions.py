"""Corrupted pictures: each is what its definition says, grows with severity, and is the same every time."""

from __future__ import annotations

import io
from itertools import pairwise

import numpy as np
import pytest
from PIL import Image

from nev.data.augment import seeded_random
from nev.eval.suite.corruptions import CORRUPTIONS, SEVERITIES, corrupt


def picture(size: int) -> np.ndarray:
    at = np.linspace(0, 1, size)
    shape = np.stack(
        [at[:, None] * np.ones(size), np.sin(9 * at)[None] ** 2 * np.ones((size, 1)), at[None] * at[:, None]], 2
    )
    return (40 + 170 * shape).astype(np.uint8)


def change(name: str, severity: int, size: int = 32, uid: str = "a") -> np.ndarray:
    return corrupt(picture(size), name, severity, seeded_random(severity, 0, uid, name))


@pytest.mark.parametrize("size", [32, 224])
@pytest.mark.parametrize("name", CORRUPTIONS)
def test_each_grows_with_severity_and_keeps_shape_and_type(name: str, size: int) -> None:
    changed = [change(name, severity, size) for severity in SEVERITIES]
    assert all(one.dtype == np.uint8 and one.shape == (size, size, 3) for one in changed)
    distances = [np.abs(one.astype(float) - picture(size)).mean() for one in changed]
    assert distances[0] > 0
    if name == "pixelate" and size == 32:  # from 32 px to 30, 28, 27, 24, 20: where the pixels fall weighs as much
        return
    assert distances[-1] > 1.2 * distances[0]
    assert all(later > 0.8 * sooner for sooner, later in pairwise(distances))


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_the_same_picture_is_corrupted_alike_every_time(name: str) -> None:
    before = picture(32).copy()
    assert np.array_equal(change(name, 3), change(name, 3))
    assert np.array_equal(before, picture(32))
    noisy = name.endswith("noise")
    assert np.array_equal(change(name, 3), change(name, 3, uid="b")) != noisy


def test_jpeg_is_what_a_jpeg_of_that_quality_is() -> None:
    buffer = io.BytesIO()
    Image.fromarray(picture(224)).save(buffer, "JPEG", quality=7)
    assert np.abs(np.asarray(Image.open(buffer)).astype(int) - change("jpeg", 5, 224)).mean() < 1


def test_pixelate_is_a_shrunk_picture() -> None:
    small = (
        Image.fromarray(picture(224))
        .resize((56, 56), Image.Resampling.BOX)
        .resize((224, 224), Image.Resampling.NEAREST)
    )
    assert np.abs(np.asarray(small).astype(int) - change("pixelate", 5, 224)).max() <= 1


def test_noise_has_its_deviation() -> None:
    grey = np.full((224, 224, 3), 128, np.uint8)
    noisy = corrupt(grey, "gaussian_noise", 1, seeded_random(0, 0, "a", "a"))
    assert (noisy / 255.0).std() == pytest.approx(0.08, rel=0.02)
    salted = corrupt(grey, "impulse_noise", 5, seeded_random(0, 0, "a", "a"))
    assert np.mean(salted == 0) == pytest.approx(0.135, rel=0.05)
    assert np.mean(salted == 255) == pytest.approx(0.135, rel=0.05)


def test_brightness_keeps_hue_and_saturation() -> None:
    import colorsys

    plain, bright = picture(32), change("brightness", 3)
    for row, column in ((3, 5), (20, 9), (30, 30)):
        before, after = (colorsys.rgb_to_hsv(*(one[row, column] / 255.0)) for one in (plain, bright))
        assert after[2] == pytest.approx(min(before[2] + 0.15, 1), abs=0.01)
        assert after[:2] == pytest.approx(before[:2], abs=0.03)
    black = corrupt(np.zeros((32, 32, 3), np.uint8), "brightness", 1, seeded_random(0, 0, "a", "a"))
    assert (black == round(0.05 * 255)).all()


def test_contrast_draws_to_the_mean() -> None:
    plain, flat = picture(224).astype(float), change("contrast", 5, 224).astype(float)
    assert flat.mean((0, 1)) == pytest.approx(plain.mean((0, 1)), abs=1)
    assert flat.std((0, 1)) == pytest.approx(0.05 * plain.std((0, 1)), abs=0.5)
