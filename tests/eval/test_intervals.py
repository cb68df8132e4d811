"""Bootstrap intervals: as wide as theory says, wider where queries hang together, the same for the same seed."""

from __future__ import annotations

import numpy as np
import pytest

from nev.eval.metrics.intervals import interval


def test_as_wide_as_the_binomial() -> None:
    hits = np.arange(2000) % 4 == 0
    low, high = interval(hits)
    wanted = 1.96 * np.sqrt(0.25 * 0.75 / 2000)
    assert (low, high) == pytest.approx((0.25 - wanted, 0.25 + wanted), abs=0.004)
    assert interval(hits) == (low, high)
    assert interval(hits, level=0.5).high < high


def test_it_covers_the_truth_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    covered = [low <= 0.3 <= high for low, high in (interval(rng.random(200) < 0.3, draws=300) for _ in range(300))]
    assert 0.9 < np.mean(covered) < 0.99


def test_captions_of_an_image_count_as_one() -> None:
    rng = np.random.default_rng(0)
    images = rng.random(300) < 0.5
    hits, image = np.repeat(images, 5), np.repeat(np.arange(300), 5)
    alone, together = interval(hits), interval(hits, image)
    assert together.high - together.low == pytest.approx(np.sqrt(5) * (alone.high - alone.low), rel=0.15)
    assert together == pytest.approx(interval(images), abs=0.01)


def test_images_with_more_captions_weigh_more() -> None:
    hits, image = np.array([1, 1, 1, 0] * 50), np.repeat(np.arange(100), 2)
    low, high = interval(hits, image)
    assert low < 0.75 < high


def test_where_nothing_varies() -> None:
    assert interval([1, 1, 1]) == (1, 1)
    assert interval([0.5]) == (0.5, 0.5)
    assert interval([0, 1], image=[7, 7]) == (0.5, 0.5)
    with pytest.raises(ValueError, match="at least one query"):
        interval([])
