"""The pictures of a run: valid PNGs of the stated size that show what they were given."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from nev.eval.report.plots import curve, gallery

GREEN = (0x2C, 0xA2, 0x5F)


def read(path: Path) -> np.ndarray:
    """A picture's pixels, after checking that it is a whole PNG with something on it."""
    with Image.open(path) as picture:
        assert picture.format == "PNG"
        pixels = np.asarray(picture.convert("RGB"))
    assert 0.005 < (pixels != 255).any(axis=2).mean() < 0.95
    return pixels


def shows(pixels: np.ndarray, colour: tuple[int, int, int]) -> int:
    return int((pixels == colour).all(axis=2).sum())


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 200, (height, width, 3), dtype=np.uint8)


def test_curve(tmp_path: Path) -> None:
    steps = np.arange(0, 1000, 10)
    loss = 5 * np.exp(-steps / 300) + np.random.default_rng(0).normal(0, 0.1, 100)
    loss[7] = np.nan  # a skipped step
    curve(tmp_path / "new" / "loss.png", {"train": (steps, loss)}, "loss of $x$ at $5", "nats")
    alone = read(tmp_path / "new" / "loss.png")
    assert alone.shape == (675, 1200, 3)
    assert shows(alone, (0x2F, 0x6D, 0xB3)) > 500
    points = {"top-1": ([0, 500, 1000], [0.1, 0.4, 0.5]), "top-5": ([0, 500, 1000], [0.5, 0.8, 0.9])}
    curve(tmp_path / "both.png", {"W = 1": (steps, loss), "W = 2": (steps, loss + 1)}, "t", "nats", points, "accuracy")
    both = read(tmp_path / "both.png")
    assert both.shape == (1050, 1200, 3)
    assert shows(both[650:], (0x3B, 0x9C, 0x6E)) > 100


def test_curve_of_one_step(tmp_path: Path) -> None:
    curve(tmp_path / "one.png", {"train": ([3], [2.5])}, "loss", "nats")
    assert shows(read(tmp_path / "one.png"), (0x2F, 0x6D, 0xB3)) > 20


def test_curve_refuses_what_it_cannot_draw(tmp_path: Path) -> None:
    for series, message in [
        ({}, "no series"),
        ({"loss": ([1, 2], [1.0])}, r"'loss' has \[2\] steps and \[1\] values"),
        ({"loss": ([], [])}, "'loss' has no finite value"),
        ({"loss": ([1, 2], [np.nan, np.inf])}, "'loss' has no finite value"),
    ]:
        with pytest.raises(ValueError, match=message):
            curve(tmp_path / "loss.png", series, "loss", "nats")
    assert not list(tmp_path.iterdir())


def test_smoothing_keeps_a_line_and_calms_noise() -> None:
    from nev.eval.report.plots import _running_mean

    line = np.linspace(3, 7, 200)
    smooth, window = _running_mean(line)
    assert window == 11
    np.testing.assert_allclose(smooth[5:-5], line[5:-5])
    noisy = np.random.default_rng(0).normal(size=200)
    by_hand = [noisy[max(i - 5, 0) : i + 6].mean() for i in range(200)]
    np.testing.assert_allclose(_running_mean(noisy)[0], by_hand, atol=1e-12)
    assert _running_mean(noisy[:10])[1] == 1


def test_gallery(tmp_path: Path) -> None:
    captions = ["a red ball", "a price of $5, or $6 " * 20, "two\nlines", ""]
    pictures = [[noise(32, 32), noise(40, 90), noise(300, 200)]] * 4
    scores = [[0.5, 0.4, -0.1]] * 4
    frames = {}
    for name, true in [("none", []), ("one", [(1, 2)]), ("two", [(1, 2), (3, 0)])]:
        correct = [[(row, column) in true for column in range(3)] for row in range(4)]
        gallery(tmp_path / f"{name}.png", captions, pictures, scores, correct)
        pixels = read(tmp_path / f"{name}.png")
        assert pixels.shape == (18 + 264 * 4, 363 + 225 * 3, 3)
        frames[name] = [shows(row, GREEN) for row in np.split(pixels[18:], 4)]
    assert frames["none"] == [0, 0, 0, 0]
    assert [count > 1000 for count in frames["one"]] == [False, True, False, False]
    assert [count > 1000 for count in frames["two"]] == [False, True, False, True]


def test_gallery_shows_the_pictures_where_they_belong(tmp_path: Path) -> None:
    red, blue = (np.full((50, 50, 3), colour, np.uint8) for colour in ((250, 0, 0), (0, 0, 250)))
    gallery(tmp_path / "g.png", ["a", "b"], [[red, blue], [blue]], [[1, 0.5], [1]], [[False, False], [False]])
    upper, lower = np.split(read(tmp_path / "g.png")[18:], 2)
    first, second = slice(345, 345 + 225), slice(345 + 225, 345 + 450)
    whole = 200 * 200
    assert shows(upper[:, first], (250, 0, 0)) > whole
    assert shows(upper[:, second], (0, 0, 250)) > whole
    assert shows(lower[:, first], (0, 0, 250)) > whole
    assert shows(lower[:, second], (255, 255, 255)) == lower[:, second].shape[0] * 225


def test_gallery_turns_no_picture_upside_down(tmp_path: Path) -> None:
    picture = np.zeros((50, 50, 3), np.uint8)
    picture[:25], picture[25:] = (250, 0, 0), (0, 0, 250)
    gallery(tmp_path / "g.png", ["a"], [[picture]], [[1]], [[False]])
    drawn = read(tmp_path / "g.png")
    red, blue = ((drawn == colour).all(-1).nonzero()[0].mean() for colour in ((250, 0, 0), (0, 0, 250)))
    assert red < blue


def test_gallery_refuses_unequal_lengths_and_other_pictures(tmp_path: Path) -> None:
    row, scores, correct = [noise(8, 8), noise(8, 8)], [0.2, 0.1], [True, False]
    for arguments, message in [
        (([], [], [], []), "at least one"),
        ((["a", "b"], [row], [scores], [correct]), "not 2, 1, 1 and 1"),
        ((["a"], [row], [scores, scores], [correct]), "not 1, 1, 2 and 1"),
        ((["a"], [row], [scores], []), "not 1, 1, 1 and 0"),
        ((["a"], [row], [scores[:1]], [correct]), "query 0 has 2 pictures, 1 scores and 2 marks"),
        ((["a"], [row], [scores], [correct[:1]]), "2 pictures, 2 scores and 1 marks"),
        ((["a"], [[]], [[]], [[]]), "at least one"),
        ((["a"], [[row[0], row[1] / 255]], [scores], [correct]), "uint8"),
        ((["a"], [[row[0], row[1][..., 0]]], [scores], [correct]), r"\[8, 8\]"),
    ]:
        with pytest.raises(ValueError, match=message):
            gallery(tmp_path / "g.png", *arguments)
    assert not list(tmp_path.iterdir())


def test_matplotlib_is_imported_late_and_pyplot_never(tmp_path: Path) -> None:
    code = (
        "import sys; from nev.eval.report.plots import curve; assert 'matplotlib' not in sys.modules;"
        f"curve({str(tmp_path / 'c.png')!r}, {{'a': ([0, 1], [1, 2])}}, 't', 'y');"
        "assert 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
