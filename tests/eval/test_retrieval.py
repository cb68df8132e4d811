"""Recall@k both ways: toy cases by hand, brute force, chance, ties, tiles, bad input."""

import itertools
import tracemalloc

import numpy as np
import pytest
from helpers.fresh import run_in_fresh_process
from hypothesis import given, settings
from hypothesis import strategies as st

from nev.eval.metrics import ranks
from nev.eval.metrics.ranks import best_ranks
from nev.eval.metrics.retrieval import retrieval


def unit(rows) -> np.ndarray:
    rows = np.asarray(rows, dtype=np.float64)
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def grid(n: int, dim: int, seed: int) -> np.ndarray:
    """Unit vectors along small integer ones, of which many coincide: ties are common and never near misses."""
    rows = np.random.default_rng(seed).integers(-1, 2, (n, dim))
    rows[:, 0] += 2 * (rows == 0).all(1)
    return unit(rows)


def owners(n: int, extra: int, seed: int) -> np.ndarray:
    """Every image at least once, some more often, in no order."""
    rng = np.random.default_rng(seed)
    return rng.permutation(np.concatenate([np.arange(n), rng.integers(0, n, extra)]))


def test_by_hand() -> None:
    images = unit([[1, 0, 0], [0, 1, 0], [0, 0, 1]])
    texts = unit([[3, 1, 2], [1, 2, 4], [1, 3, 2], [3, 2, 1]])
    got = retrieval(images, texts, np.array([0, 0, 1, 2]), ks=(1, 2, 3))
    # Ranks of the true image: text 0 first, text 1 third, text 2 first, text 3 third.
    assert [got[f"retrieval/text_to_image/r{k}"] for k in (1, 2, 3)] == [0.5, 0.5, 1]
    # Image 0 scores (.80, .22, .27, .80): text 3 ties with its best. Image 1 finds its own first, image 2 last.
    assert [got[f"retrieval/image_to_text/r{k}"] for k in (1, 2, 3)] == [1 / 3, 2 / 3, 2 / 3]
    assert [got[f"retrieval/text_to_image/r{k}_chance"] for k in (1, 2, 3)] == [1 / 3, 2 / 3, 1]
    # Two captions of four, then one of four, twice: (1/2 + 1/4 + 1/4) / 3, (5/6 + 1/2 + 1/2) / 3, (1 + 3/4 + 3/4) / 3.
    chances = [got[f"retrieval/image_to_text/r{k}_chance"] for k in (1, 2, 3)]
    assert chances == pytest.approx([1 / 3, 11 / 18, 5 / 6])


@settings(max_examples=80, deadline=None)
@given(
    n=st.integers(1, 15),
    extra=st.integers(0, 20),
    dim=st.integers(1, 4),
    chunk=st.integers(1, 40),
    seed=st.integers(0, 999),
)
def test_equals_brute_force_at_any_chunk(n: int, extra: int, dim: int, chunk: int, seed: int) -> None:
    owner = owners(n, extra, seed)
    images, texts = grid(n, dim, seed), grid(len(owner), dim, seed + 1)
    got = retrieval(images, texts, owner, ks=(1, 2, 5), chunk=chunk)
    score = images.astype(np.float64) @ texts.T.astype(np.float64)
    right = owner == np.arange(n)[:, None]

    def found(score: np.ndarray, right: np.ndarray, k: int) -> bool:
        order = np.lexsort((right, -score.round(5)))  # by score, and among equal ones the right ones last
        return bool(right[order[:k]].any())

    for k in (1, 2, 5):
        by_text = np.mean([found(score[:, j], right[:, j], k) for j in range(len(owner))])
        by_image = np.mean([found(score[i], right[i], k) for i in range(n)])
        assert got[f"retrieval/text_to_image/r{k}"] == pytest.approx(by_text)
        assert got[f"retrieval/image_to_text/r{k}"] == pytest.approx(by_image)


@pytest.mark.parametrize("k", [1, 2, 3, 5, 9])
def test_chance_is_what_all_orders_score_on_average(k: int) -> None:
    owner = np.array([0, 0, 0, 1, 2])
    got = retrieval(grid(3, 3, 0), grid(5, 3, 1), owner, ks=(k,))
    by_image = [(np.array(order)[:k] == i).any() for order in itertools.permutations(owner) for i in range(3)]
    by_text = [(np.array(order)[:k] == i).any() for order in itertools.permutations(range(3)) for i in owner]
    assert got[f"retrieval/image_to_text/r{k}_chance"] == pytest.approx(np.mean(by_image))
    assert got[f"retrieval/text_to_image/r{k}_chance"] == pytest.approx(np.mean(by_text))


def test_random_embeddings_score_about_chance_and_true_ones_all() -> None:
    rng = np.random.default_rng(0)
    owner = np.repeat(np.arange(400), 5)
    images = unit(rng.normal(size=(400, 32)))
    guess = retrieval(images, unit(rng.normal(size=(2000, 32))), owner)
    for key in ("text_to_image/r10", "image_to_text/r10"):
        assert guess[f"retrieval/{key}"] == pytest.approx(guess[f"retrieval/{key}_chance"], abs=0.02)
    near = retrieval(images, unit(images[owner] + 0.05 * rng.normal(size=(2000, 32))), owner)
    assert near["retrieval/text_to_image/r1"] == near["retrieval/image_to_text/r1"] == 1


@pytest.mark.parametrize("dim", [3, 384, 768])
def test_collapsed_embeddings_score_nothing(dim: int) -> None:
    one = unit(np.random.default_rng(1).normal(size=(1, dim)))
    got = retrieval(np.repeat(one, 60, 0), np.repeat(one, 300, 0), np.arange(300) % 60, chunk=37)
    for direction, k in itertools.product(("text_to_image", "image_to_text"), (1, 5, 10)):
        assert got[f"retrieval/{direction}/r{k}"] == 0 < got[f"retrieval/{direction}/r{k}_chance"]


def test_scores_are_held_one_tile_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = []
    original = ranks.scores
    monkeypatch.setattr(ranks, "scores", lambda a, b: shapes.append((len(a), len(b))) or original(a, b))
    retrieval(grid(50, 3, 0), grid(170, 3, 1), owners(50, 120, 0), chunk=16)
    assert max(rows * columns for rows, columns in shapes) == 16 * 16
    assert sum(rows * columns for rows, columns in shapes) == 2 * 50 * 170


def test_memory_stays_below_a_score_matrix() -> None:
    assert run_in_fresh_process(peak_bytes_of_retrieval, 3000, 12000) < 3000 * 12000 * 4 / 20


def peak_bytes_of_retrieval(pictures: int, captions: int) -> int:
    images, texts, owner = grid(pictures, 4, 0), grid(captions, 4, 1), owners(pictures, captions - pictures, 0)
    tracemalloc.start()
    retrieval(images, texts, owner, chunk=512)
    return tracemalloc.get_traced_memory()[1]


def test_bad_input_is_named() -> None:
    images, texts, owner = grid(3, 3, 0), grid(4, 3, 1), np.array([0, 1, 2, 0])
    broken = texts.copy()
    broken[3] = np.inf
    cases = [
        ((images, texts, np.array([0, 1, 1, 0])), "1 of 3 images have no text, the first is row 2"),
        ((images, texts, np.array([0, 1, 3, 2])), r"owner: 1 of 4 are outside 0\.\.2"),
        ((images, texts, np.array([0, 1, -1, 2])), "-1 at row 2"),
        ((images, texts, owner[:3]), "4 integers"),
        ((images, broken, owner), "texts: 1 of 4 rows hold NaN or infinity, the first is row 3"),
        ((images * 3, texts, owner), "images: 3 of 3 rows are not of unit length"),
        ((images, unit(np.ones((4, 2))), owner), "3 wide and texts 2"),
    ]
    for arguments, message in cases:
        with pytest.raises(ValueError, match=message):
            retrieval(*arguments)


@pytest.mark.parametrize("gap", [4e-7, -4e-7, 0.0])
@pytest.mark.parametrize("chunk", [1, 2, 100])
def test_scores_that_float32_hardly_tells_apart_are_ranked_exactly(gap: float, chunk: int) -> None:
    """Two candidates at cosines c and c + gap of the query: the right one is first only where it is truly nearer."""
    query = np.array([[1, 0, 0]], np.float32)

    def at(cosine: float, sign: int) -> list[float]:
        return [cosine, sign * (1 - cosine**2) ** 0.5, 0]

    candidates = np.array([at(0.6, 1), at(0.6 + gap, -1)], np.float32)
    exact = candidates.astype(np.float64)[:, 0]
    ranks = best_ranks(query, candidates, np.array([0]), np.array([0]), chunk)
    assert ranks[0] == int(exact[1] >= exact[0])


@pytest.mark.parametrize("chunk", [3, 1000])
def test_a_space_that_has_collapsed_scores_nothing(chunk: int) -> None:
    """All embeddings equal but for rounding: hundreds lie nearer than float32 tells, and the right one comes last."""
    rng = np.random.default_rng(0)
    rows = np.ones((200, 64)) + 1e-5 * rng.standard_normal((200, 64))
    rows = (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)
    ranks = best_ranks(rows, rows, np.arange(200), (np.arange(200) + 1) % 200, chunk)
    assert (ranks == 199).all()
