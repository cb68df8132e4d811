"""The map of the space: PCA of sampled vectors, compared with an independent computation."""

from __future__ import annotations

import numpy as np
import pytest
from helpers.search import draw_pair
from sklearn.decomposition import PCA

from nev.search.projection import fit_projection


def test_positions_are_those_of_pca() -> None:
    images, texts, _ = draw_pair(120, 90)
    both = np.concatenate([images, texts])
    projection = fit_projection(both * 3)
    reference = PCA(2).fit(both)
    expected = reference.transform(both)
    found = projection.project(both)
    signs = np.sign((found * expected).sum(axis=0))
    assert np.allclose(found, expected * signs, atol=1e-5)
    assert projection.explained == pytest.approx(tuple(reference.explained_variance_ratio_), abs=1e-6)


def test_the_gap_between_kinds_is_seen() -> None:
    images, texts, _ = draw_pair(120, 90)
    projection = fit_projection(np.concatenate([images, texts]))
    left, right = projection.project(images)[:, 0], projection.project(texts)[:, 0]
    assert max(left.min(), right.min()) > min(left.max(), right.max()), "no picture lies among texts"


def test_the_order_of_vectors_does_not_matter() -> None:
    images, texts, _ = draw_pair(60, 40)
    both = np.concatenate([images, texts])
    shuffled = both[np.random.default_rng(0).permutation(100)]
    query = images[:5]
    assert np.allclose(fit_projection(both).project(query), fit_projection(shuffled).project(query), atol=1e-5)


@pytest.mark.parametrize("count", [0, 1, 2])
def test_few_vectors_have_a_map_too(count: int) -> None:
    images, _, _ = draw_pair(5, 5)
    projection = fit_projection(images[:count])
    positions = projection.project(images)
    assert positions.shape == (5, 2)
    assert positions.dtype == np.float32
    assert np.isfinite(positions).all()
    assert len(projection.explained) == 2
    assert projection.explained[1] == pytest.approx(0, abs=1e-6)
