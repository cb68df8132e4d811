"""Embeddings in fewer bytes, and moved between modalities."""

from __future__ import annotations

import numpy as np
import pytest

from nev.ops.vectors import PRECISIONS, are_usable, round_to, scale_to_unit, shift_mean, truncate

ROWS = scale_to_unit(np.random.default_rng(0).normal(size=(50, 96)))


@pytest.mark.parametrize(
    ("precision", "size", "least"),
    [("float32", 384, 1), ("float16", 192, 1 - 1e-6), ("int8", 96, 0.999), ("binary", 12, 0.7)],
)
def test_bytes_and_what_they_keep(precision: str, size: int, least: float) -> None:
    stored = round_to(ROWS, precision)
    assert stored[0].nbytes == size
    numbers = np.unpackbits(stored, axis=1) * 2.0 - 1 if precision == "binary" else stored.astype(np.float32)
    cosines = (scale_to_unit(numbers) * ROWS).sum(axis=1)
    assert cosines.min() >= least - 1e-6


def test_rows_without_a_direction_get_none() -> None:
    zeros = np.zeros((2, 8), np.float32)
    for precision in PRECISIONS:
        assert not round_to(zeros, precision).any()
    rows = np.array([[0, 0, 0, 0], [1, np.nan, 0, 0], [np.inf, 1, 0, 0], [3, 0, 4, 0]], np.float32)
    mean = np.full(4, 0.5, np.float32)
    for scaled in (scale_to_unit(rows), truncate(rows, 3), shift_mean(rows, mean, -mean)):
        assert not scaled[0].any()
        assert np.isnan(scaled[1:3]).any(axis=1).all()
        assert np.linalg.norm(scaled[3]) == pytest.approx(1)
    assert are_usable(rows).tolist() == [False, False, False, True]


def test_the_shift_takes_one_mean_to_the_other() -> None:
    images, texts = ROWS[:25] + 0.5, ROWS[25:] - 0.5
    moved = images - images.mean(0) + texts.mean(0)
    expected = moved / np.linalg.norm(moved, axis=1, keepdims=True)
    np.testing.assert_allclose(shift_mean(images, images.mean(0), texts.mean(0)), expected, atol=1e-6)
