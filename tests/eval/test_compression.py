"""Smaller vectors: cut, in bytes, in bits. Scores are those of the vectors as an index would hold them."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nev.eval.metrics.compression import compressions, cut, quantise
from nev.eval.metrics.retrieval import retrieval
from nev.ops.vectors import round_to, truncate


def unit(seed: int, rows: int, width: int) -> np.ndarray:
    found = np.random.default_rng(seed).standard_normal((rows, width)).astype(np.float32)
    return found / np.linalg.norm(found, axis=1, keepdims=True)


@given(st.integers(0, 2**32 - 1), st.sampled_from([32, 100, 384]))
def test_bits_score_as_hamming_distance(seed: int, width: int) -> None:
    queries, rows = unit(seed, 5, width), unit(seed + 1, 20, width)
    held = quantise(queries, "binary") @ quantise(rows, "binary").T
    bits = [np.packbits(side > 0, axis=1) for side in (queries, rows)]
    distance = np.bitwise_count(bits[0][:, None] ^ bits[1][None]).sum(-1)
    assert held == pytest.approx(1 - 2 * distance / width, abs=1e-5)


@given(st.integers(0, 2**32 - 1))
def test_bytes_score_as_products_of_bytes(seed: int) -> None:
    queries, rows = unit(seed, 5, 64), unit(seed + 1, 20, 64)
    sides = [round_to(side, "int8") for side in (queries, rows)]
    for side, stored in zip((queries, rows), sides, strict=True):  # half a byte, and the rounding of float32
        assert abs(127 * side / np.abs(side).max(axis=1, keepdims=True) - stored).max() <= 0.5 + 1e-4
    products = sides[0].astype(np.int64) @ sides[1].astype(np.int64).T
    lengths = [np.linalg.norm(side.astype(np.float64), axis=1) for side in sides]
    expected = products / lengths[0][:, None] / lengths[1]
    assert quantise(queries, "int8") @ quantise(rows, "int8").T == pytest.approx(expected, abs=1e-5)


def test_a_cut_row_is_unit_and_has_the_first_numbers() -> None:
    rows = unit(0, 7, 64)
    short = truncate(rows, 16)
    assert np.linalg.norm(short, axis=1) == pytest.approx(np.ones(7), abs=1e-6)
    assert np.allclose(short / short[:, :1], rows[:, :16] / rows[:, :1], rtol=1e-4)


def test_a_row_that_loses_its_length_stays_usable() -> None:
    rows = np.zeros((2, 64), np.float32)
    rows[0, 63] = rows[1, 0] = 1  # the first has nothing in its first half
    assert np.linalg.norm(cut(rows, 32), axis=1) == pytest.approx([1, 1])
    assert np.linalg.norm(quantise(rows * [[1e-9], [1]], "int8"), axis=1) == pytest.approx([1, 1])


def test_every_width_and_precision_with_its_bytes() -> None:
    left, right = unit(0, 10, 384), unit(1, 12, 384)
    found = list(compressions(left, right, lambda a, b: float(a.shape[1])))
    assert [(one.width, one.precision, one.bytes, one.score) for one in found[:6]] == [
        (384, "float32", 1536, 384),
        (384, "int8", 384, 384),
        (384, "binary", 48, 384),
        (192, "float32", 768, 192),
        (192, "int8", 192, 192),
        (192, "binary", 24, 192),
    ]
    assert sorted({one.width for one in found}) == [48, 96, 192, 384]


def test_search_survives_bytes_and_suffers_from_bits() -> None:
    images = unit(0, 300, 64)
    texts = images + 0.9 * unit(1, 300, 64)
    texts = (texts / np.linalg.norm(texts, axis=1, keepdims=True)).astype(np.float32)

    def recall(left: np.ndarray, right: np.ndarray) -> float:
        return retrieval(left, right, np.arange(300))["retrieval/text_to_image/r1"]

    scores = {(one.width, one.precision): one.score for one in compressions(images, texts, recall)}
    assert scores[64, "float32"] > 0.9
    assert scores[64, "int8"] == pytest.approx(scores[64, "float32"], abs=0.02)
    assert scores[32, "binary"] < scores[64, "binary"] < 1
