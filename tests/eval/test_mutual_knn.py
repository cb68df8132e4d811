"""Mutual nearest neighbours of two spaces."""

from __future__ import annotations

import numpy as np
import pytest
from helpers.arrays import Floats, drawn, unit
from hypothesis import given, settings
from hypothesis import strategies as st

from nev.eval.metrics.neighbours import mutual_knn, mutual_knn_chance


@given(n=st.integers(12, 40), k=st.integers(1, 8), seed=st.integers(0, 20), chunk=st.integers(1, 50))
@settings(max_examples=30)
def test_mutual_knn_is_the_share_of_common_neighbours(n: int, k: int, seed: int, chunk: int) -> None:
    left, right = drawn(n, 6, seed), drawn(n, 9, seed + 100)
    near = []
    for rows in (unit(left), unit(right)):
        cosines = rows.astype(float) @ rows.T.astype(float)
        np.fill_diagonal(cosines, -9)
        near.append(np.argsort(-cosines, axis=1)[:, :k])
    wanted = np.mean([len(set(a) & set(b)) / k for a, b in zip(*near, strict=True)])
    assert mutual_knn(left, right, k, chunk) == pytest.approx(wanted)
    assert mutual_knn(right, left, k, chunk) == pytest.approx(wanted)


@given(seed=st.integers(0, 20), scale=st.floats(1e-3, 1e3))
@settings(max_examples=20)
def test_mutual_knn_does_not_see_rotation_or_scale(seed: int, scale: float) -> None:
    left, right = drawn(50, 5, seed), drawn(50, 7, seed + 100)
    rotation = np.linalg.qr(np.random.default_rng(seed).normal(size=(7, 7)))[0]
    assert mutual_knn(left, scale * right @ rotation, 5) == pytest.approx(mutual_knn(left, right, 5), abs=0.01)
    assert mutual_knn(right, scale * right @ rotation, 5) == pytest.approx(1, abs=0.01)


def test_mutual_knn_of_unrelated_spaces_is_chance() -> None:
    n, k = 400, 10
    shares = [mutual_knn(drawn(n, 16, seed), drawn(n, 16, seed + 100), k) for seed in range(5)]
    # Of n k trials with probability k / (n - 1): the mean of five runs deviates by about 0.0005.
    assert np.mean(shares) == pytest.approx(mutual_knn_chance(n, k), abs=0.002)


@pytest.mark.parametrize(
    ("left", "right", "k"),
    [
        (drawn(20, 3, 0), drawn(19, 3, 0), 5),
        (drawn(5, 3, 0), drawn(5, 3, 0), 5),
        (np.zeros((20, 3)), drawn(20, 3, 0), 5),
        (drawn(20, 3, 0), np.full((20, 3), np.inf), 5),
    ],
)
def test_mutual_knn_refuses_what_has_no_neighbours(left: Floats, right: Floats, k: int) -> None:
    with pytest.raises(ValueError, match="rows"):
        mutual_knn(left, right, k)
