"""Rows drawn of a set, and a reader of these alone."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from helpers.arrays import unit
from helpers.pictures import WIDTH, encode
from helpers.samples import make_small_set, sample_of
from hypothesis import given, settings
from hypothesis import strategies as st

from nev.data.index import Index
from nev.data.sample import MAX_GROUPS, draw_rows, read_caption_vectors, read_captions
from nev.data.text_sidecar import write_sidecar
from nev.storage.reading import DataError

KEY = "0" * 64


@given(counts=st.lists(st.integers(1, 9), min_size=1, max_size=30), count=st.integers(1, 200), seed=st.integers(0, 5))
@settings(max_examples=50)
def test_a_draw_is_a_function_of_its_seed(counts: list[int], count: int, seed: int) -> None:
    rows = np.array(counts)
    draw = draw_rows(rows, count, seed)
    assert len({(group, row) for group, row in draw.tolist()}) == len(draw) == min(count, sum(counts))
    assert (draw[:, 1] < rows[draw[:, 0]]).all()
    np.testing.assert_array_equal(draw, draw_rows(rows, count, seed))
    np.testing.assert_array_equal(draw[: count // 2], draw_rows(rows, count // 2, seed))


def test_every_row_is_drawn_equally_often() -> None:
    rows = np.array([1, 5, 2])
    hits = Counter(tuple(row) for seed in range(1000) for row in draw_rows(rows, 2, seed).tolist())
    assert len(hits) == 8
    assert all(abs(count - 250) < 5 * 14 for count in hits.values())


def test_a_large_set_is_sampled_from_few_row_groups() -> None:
    draw = draw_rows(np.full(100_000, 1000), 5000, 0)
    assert len(np.unique(draw[:, 0])) <= MAX_GROUPS
    assert draw_rows(np.full(1000, 2), 1000, 0).shape == (1000, 2)  # more row groups where these are small


@pytest.fixture(scope="module")
def small_set(tmp_path_factory: pytest.TempPathFactory) -> Index:
    return make_small_set(tmp_path_factory.mktemp("small"))


def test_a_sample_has_the_rows_that_were_drawn(small_set: Index) -> None:
    rows = [77, 3, 7, 11, 12, 73]  # none of the middle shard
    sample = sample_of(small_set, rows)
    assert sample.index.paths == ("0.parquet", "2.parquet")
    assert sample.total == 6
    blocks = [sample.read(segments) for segments in sample.blocks(batch=2)]
    assert [len(block["image"]) for block in blocks] == [2, 2, 2]
    assert [uid for block in blocks for uid in block["uid"]] == [f"row-{row}" for row in sorted(rows)]
    whole = sample_of(small_set, list(range(78)))
    pixels = np.concatenate([whole.read(segments)["image"] for segments in whole.blocks(64)])
    np.testing.assert_array_equal(np.concatenate([block["image"] for block in blocks]), pixels[sorted(rows)])
    assert read_captions(sample)[:3] == [["caption 3", "more of 3"], [], ["caption 11"]]


def test_vectors_of_a_sample_come_from_sidecars_that_fit(small_set: Index) -> None:
    sample = sample_of(small_set, [0, 7, 30, 77])
    with pytest.raises(DataError, match="no text sidecar"):
        read_caption_vectors(sample, KEY, WIDTH)
    for shard in range(3):
        write_sidecar(small_set, shard, KEY, WIDTH, encode)
    vectors, owner = read_caption_vectors(sample, KEY, WIDTH)
    assert owner.tolist() == [0, 0, 2, 2, 3]  # the row without a caption has none
    wanted = unit(encode(["caption 0", "more of 0", "caption 30", "more of 30", "caption 77"]))
    np.testing.assert_allclose(vectors, wanted, atol=1e-3)
