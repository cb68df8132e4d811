"""The geometry of a space: against plain formulas over whole matrices, and on spaces whose answer is known."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.stats import skew

from nev.eval.metrics import neighbours
from nev.eval.metrics.geometry import geometry
from nev.eval.metrics.neighbours import nearest, others

Floats = NDArray[np.float32]


def unit(rows: NDArray[np.float64]) -> Floats:
    return np.asarray(rows / np.linalg.norm(rows, axis=1, keepdims=True), np.float32)


def drawn(rows: int, dim: int, seed: int) -> Floats:
    return unit(np.random.default_rng(seed).normal(size=(rows, dim)))


@given(
    n=st.integers(1, 40), m=st.integers(1, 60), k=st.integers(1, 12), chunk=st.integers(1, 70), seed=st.integers(0, 9)
)
def test_nearest_are_those_of_a_whole_matrix(n: int, m: int, k: int, chunk: int, seed: int) -> None:
    queries, candidates = drawn(n, 8, seed), drawn(m, 8, seed + 100)
    found = nearest(queries, candidates, k, chunk)
    order = np.argsort(-(queries @ candidates.T), axis=1)[:, :k]
    np.testing.assert_array_equal(found.rows, order)
    np.testing.assert_allclose(found.scores, np.take_along_axis(queries @ candidates.T, order, 1), atol=1e-6)


def test_nearest_holds_one_tile(monkeypatch: pytest.MonkeyPatch) -> None:
    tiles: list[int] = []
    topk = neighbours.torch.Tensor.topk

    def counting(tile: neighbours.torch.Tensor, k: int, dim: int) -> object:
        tiles.append(tile.numel())
        return topk(tile, k, dim=dim)

    monkeypatch.setattr(neighbours.torch.Tensor, "topk", counting)
    nearest(drawn(300, 4, 0), drawn(500, 4, 1), k=5, chunk=50)
    assert max(tiles) <= 50 * 50


@pytest.mark.slow
@settings(max_examples=40)
@given(n=st.integers(12, 40), extra=st.integers(0, 30), chunk=st.integers(1, 50), seed=st.integers(0, 5))
def test_equals_plain_formulas_at_any_chunk(n: int, extra: int, chunk: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    images, texts = drawn(n, 6, seed), drawn(n + extra, 6, seed + 50)
    owner = np.concatenate([np.arange(n), rng.integers(n, size=extra)])
    got = geometry(images, texts, owner, k=3, chunk=chunk)
    x, y = images.astype(float), texts.astype(float)
    gap = np.linalg.norm(x.mean(0) - y.mean(0))
    within = [((z - z.mean(0)) ** 2).sum(1).mean() for z in (x, y)]
    wanted = {
        "space/gap": gap,
        "space/relative_gap": gap / np.sqrt(np.mean(within)),
        "space/alignment": ((x[owner] - y) ** 2).sum(1).mean(),
        "space/hubness": skew(np.bincount(np.argsort(-(y @ x.T), 1)[:, :3].ravel(), minlength=n)),
    }
    for name, z in (("images", x), ("texts", y)):
        pairs = ~np.eye(len(z), dtype=bool)
        distances = ((z[:, None] - z[None]) ** 2).sum(2)
        wanted[f"space/uniformity_{name}"] = np.log(np.exp(-2 * distances[pairs]).mean())
        wanted[f"space/anisotropy_{name}"] = (z @ z.T)[pairs].mean()
    first = texts[:n]  # of each image: the owners of the first n texts are in order
    near = [np.argsort(-(z @ z.T - 9 * np.eye(n)), 1)[:, :3] for z in (x, first.astype(float))]
    wanted["space/overlap"] = np.mean([len(set(a) & set(b)) / 3 for a, b in zip(*near, strict=True)])
    for name, value in wanted.items():
        assert got[name] == pytest.approx(value, abs=2e-5), name


def test_one_space_and_two() -> None:
    texts = drawn(400, 16, 0)
    one = geometry(texts, texts, np.arange(400))
    assert (one["space/gap"], one["space/alignment"]) == pytest.approx((0, 0), abs=1e-6)
    assert one["space/overlap"] == 1
    assert one["space/separable"] < 0.55
    away = unit(texts + 3 * np.eye(16)[0])
    two = geometry(away, texts, np.arange(400))
    assert two["space/separable"] > 0.95
    assert two["space/relative_gap"] > 0.9
    assert two["space/anisotropy_images"] > 0.7 > 0.1 > two["space/anisotropy_texts"]
    assert two["space/uniformity_images"] > two["space/uniformity_texts"]


def test_equal_rows_are_not_their_own_neighbours() -> None:
    rows = np.repeat(drawn(1, 4, 0), 9, axis=0)
    found = others(rows, 3, chunk=4)
    assert found.shape == (9, 3)


def test_bad_input_is_named() -> None:
    rows = drawn(20, 4, 0)
    with pytest.raises(ValueError, match="at least 5 images and texts"):
        geometry(rows[:4], rows, np.zeros(20, int))
    with pytest.raises(ValueError, match="4 wide and texts 3"):
        geometry(rows, drawn(20, 3, 0), np.arange(20))
    with pytest.raises(ValueError, match=r"outside 0\.\.19"):
        geometry(rows, rows, np.arange(20) + 1)
    with pytest.raises(ValueError, match="k and chunk must be at least 1"):
        nearest(rows, rows, 0)
