"""Texts and images in one list: by hand, and in spaces with a gap and without."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nev.eval.metrics.mixed_retrieval import choose_queries, mixed_retrieval, text_retrieval
from nev.eval.metrics.ranks import Floats
from nev.ops.vectors import shift_mean


def unit(rows: object) -> Floats:
    array = np.asarray(rows, float)
    return np.asarray(array / np.linalg.norm(array, axis=1, keepdims=True), np.float32)


def test_by_hand() -> None:
    # Two images with two texts each. Texts lie on the first two axes, images a little above them.
    texts = unit([[1, 0.1, 0], [1, 0, 0], [0.1, 1, 0], [0, 1, 0]])
    images = unit([[1, 0, 0.2], [0, 1, 0.2]])
    got = mixed_retrieval(images, texts, np.array([0, 0, 1, 1]), k=2)
    assert got["mixed/images_in_list"] == 0.5  # two images, and the two texts that do not ask
    assert got["mixed/images_found"] == 0.5  # the other text first, then the own image
    assert got["mixed/own_image"] == 1
    assert mixed_retrieval(images, texts, np.array([0, 0, 1, 1]), k=1)["mixed/own_image"] == 0


def test_who_asks() -> None:
    assert choose_queries(np.array([0, 0, 1, 2, 2, 2])).tolist() == [0, 3]
    assert choose_queries(np.array([0, 1, 2, 3, 4])).tolist() == [0, 2, 4]


def test_a_gap_hides_images_and_the_shift_brings_them_back() -> None:
    rng = np.random.default_rng(0)
    meaning = rng.normal(size=(200, 32))
    owner = np.repeat(np.arange(200), 2)
    texts = unit(meaning[owner] + 0.3 * rng.normal(size=(400, 32)))
    near = unit(meaning + 0.3 * rng.normal(size=(200, 32)))
    together = mixed_retrieval(near, texts, owner)
    assert together["mixed/images_found"] == pytest.approx(together["mixed/images_in_list"], abs=0.05)
    away = unit(near + 2 * np.eye(32)[0])
    apart = mixed_retrieval(away, texts, owner)
    assert apart["mixed/images_found"] < 0.3 < apart["mixed/images_found_shifted"]
    assert apart["mixed/own_image"] <= apart["mixed/own_image_shifted"]


def ranked_by_hand(
    images: Floats, texts: Floats, owner: np.ndarray, standardise: bool
) -> tuple[list[int], list[float]]:
    """The rank of each query's image, and the share of other images' texts below it; one query after another."""
    queries = choose_queries(owner)
    rest = [text for text in range(len(texts)) if text not in queries]
    ranks, above = [], []
    for query in queries:
        of_images, of_texts = images @ texts[query], texts[rest] @ texts[query]
        if standardise:
            of_images, of_texts = ((side - side.mean()) / side.std() for side in (of_images, of_texts))
        mine = of_images[owner[query]]
        ranks.append(int((of_images > mine).sum() + (of_texts > mine).sum()))
        others = [score for score, text in zip(of_texts, rest, strict=True) if owner[text] != owner[query]]
        above.append(float(np.mean([score < mine for score in others])))
    return ranks, above


@given(st.integers(0, 10**6), st.integers(1, 50))
def test_ranks_and_auc_against_a_loop(seed: int, tile_scores: int) -> None:
    rng = np.random.default_rng(seed)
    images, texts, owner = unit(rng.normal(size=(12, 6)) + 0.5), unit(rng.normal(size=(30, 6))), rng.integers(0, 12, 30)
    owner[:3] = [0, 1, 1]
    found = mixed_retrieval(images, texts, owner, k=3, tile_scores=tile_scores)
    shifted = shift_mean(images, images.mean(0), texts.mean(0))
    for name, pictures, standardise in (
        ("", images, False),
        ("_shifted", shifted, False),
        ("_standardised", images, True),
    ):
        ranks, above = ranked_by_hand(pictures, texts, owner, standardise)
        assert found[f"mixed/own_image{name}"] == pytest.approx(np.mean(np.array(ranks) < 3))
        assert found[f"mixed/own_image_median{name}"] == pytest.approx(np.median(ranks) + 1)
        assert found[f"mixed/auc{name}"] == pytest.approx(np.mean(above))
        assert found[f"mixed/own_image_r100{name}"] == 1, "the list is shorter"


def test_auc_grades_what_recall_calls_nothing() -> None:
    """Two gaps: behind both no image is among the first ten, and one is far nearer to showing some."""
    rng = np.random.default_rng(3)
    meaning = rng.normal(size=(300, 32))
    owner = np.repeat(np.arange(300), 2)
    texts = unit(meaning[owner] + 0.5 * rng.normal(size=(600, 32)) + 8 * np.eye(32)[1])
    graded = []
    for gap in (20.0, 30.0):
        images = unit(meaning + 0.5 * rng.normal(size=(300, 32)) + gap * np.eye(32)[0] + 8 * np.eye(32)[1])
        graded.append(mixed_retrieval(images, texts, owner))
    near, far = graded
    assert near["mixed/own_image"] == far["mixed/own_image"] == 0
    assert near["mixed/auc"] > 3 * far["mixed/auc"]
    for repair in ("shifted", "standardised"):
        assert near[f"mixed/own_image_{repair}"] > 0.5
        assert near[f"mixed/auc_{repair}"] > 0.9


def test_equal_scores_are_half_above_and_rank_behind() -> None:
    rows = np.repeat(unit([[1.0, 0.0]]), 4, 0)
    found = mixed_retrieval(rows, np.repeat(rows, 2, 0), np.repeat(np.arange(4), 2), k=3)
    assert found["mixed/auc"] == found["mixed/auc_standardised"] == 0.5
    assert found["mixed/own_image_median"] == 8, "of eight in the list the last"


def test_shifted_images_are_centred_on_the_texts() -> None:
    rng = np.random.default_rng(1)
    images, texts = unit(rng.normal(size=(50, 8)) + 2), unit(rng.normal(size=(60, 8)))
    moved = shift_mean(images, images.mean(0), texts.mean(0))
    np.testing.assert_allclose(np.linalg.norm(moved, axis=1), 1, atol=1e-6)
    before = np.linalg.norm(images.mean(0) - texts.mean(0))
    assert np.linalg.norm(moved.mean(0) - texts.mean(0)) < before / 3


def test_bad_input_is_named() -> None:
    rows = unit(np.eye(4))
    with pytest.raises(ValueError, match="4 wide and texts 3"):
        mixed_retrieval(rows, unit(np.eye(3)), np.arange(3))
    with pytest.raises(ValueError, match="not of unit length"):
        mixed_retrieval(rows * 2, rows, np.arange(4))


@given(st.integers(0, 10**6))
def test_what_the_texts_find_alone_against_a_loop(seed: int) -> None:
    rng = np.random.default_rng(seed)
    owner = rng.integers(0, 12, 30)
    texts = unit(rng.normal(size=(30, 4)))
    seen: dict[int, list[int]] = {}
    for text, image in enumerate(owner):
        seen.setdefault(int(image), []).append(text)
    asked = [own[0] for own in seen.values() if len(own) > 1]
    kept = [text for text in range(30) if text not in asked]
    found = []
    for text in asked:
        ranked = sorted(kept, key=lambda other: -float(texts[other] @ texts[text]))
        found.append(min(ranked.index(other) for other in seen[int(owner[text])] if other in kept))
    expected = {f"texts/own_r{k}": float(np.mean(np.array(found) < k)) for k in (1, 10)} if asked else {}
    assert text_retrieval(texts, owner) == pytest.approx(expected)


def test_without_a_second_caption_texts_have_nothing_to_find() -> None:
    assert text_retrieval(unit(np.eye(3)), np.arange(3)) == {}
