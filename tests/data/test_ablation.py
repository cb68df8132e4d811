"""What ablations do to the texts of training: wrong captions, collapse, corrupt, and fewer rows."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from helpers.blocks import embedded, reader_of, three_shards, whole
from helpers.pictures import WIDTH
from helpers.training import prepare_job, train_reader
from hypothesis import given
from hypothesis import strategies as st

from nev.config.base import ConfigError
from nev.config.experiment import Experiment
from nev.data.ablation import AblationReader, change_texts, draw_normal, normalise_rows, permute_captions
from nev.data.block import BlockReader
from nev.data.block_plan import Segment
from nev.data.sidecar import decode_vectors
from nev.data.text_sidecar import mean_vector, text_sidecars
from nev.models.text import TextTower
from nev.storage.reading import read_column

Make = Callable[..., Experiment]


@given(st.integers(0, 60), st.floats(0, 1), st.integers(0, 2**32))
def test_captions_are_permuted_among_some_rows(rows: int, share: float, seed: int) -> None:
    whose = permute_captions(rows, share, seed, 1, 2)
    assert sorted(whose) == list(range(rows))
    assert np.array_equal(whose, permute_captions(rows, share, seed, 1, 2))
    moved = np.flatnonzero(whose != np.arange(rows))
    assert len(moved) != 1
    if share == 0:
        assert not len(moved)
    if share == 1 and rows > 1:
        assert len(moved) == rows


def test_about_the_share_is_permuted_and_each_row_group_by_itself() -> None:
    moved = np.mean([np.mean(permute_captions(500, 0.3, 7, 0, group) != np.arange(500)) for group in range(40)])
    assert moved == pytest.approx(0.3, abs=0.02)
    assert not np.array_equal(permute_captions(500, 0.3, 7, 0, 0), permute_captions(500, 0.3, 7, 0, 1))
    assert not np.array_equal(permute_captions(500, 0.3, 7, 0, 0), permute_captions(500, 0.3, 8, 0, 0))


def test_numbers_are_normal_and_a_row_has_its_own() -> None:
    found = np.concatenate([draw_normal(0, 0, str(row), 384) for row in range(300)])
    assert np.mean(found) == pytest.approx(0, abs=0.01)
    assert np.std(found) == pytest.approx(1, abs=0.01)
    assert np.mean(np.abs(found) > 1.96) == pytest.approx(0.05, abs=0.005)
    first = draw_normal(0, 0, "a", 8)
    assert np.array_equal(first, draw_normal(0, 0, "a", 8))
    for other in (draw_normal(1, 0, "a", 8), draw_normal(0, 1, "a", 8), draw_normal(0, 0, "b", 8)):
        assert not np.array_equal(first, other)


def test_a_block_has_the_captions_of_other_rows_of_its_row_group_in_every_epoch(tmp_path: Path) -> None:
    index = embedded(three_shards(tmp_path))
    own = reader_of(index).read(whole(index))
    mixed = change_texts(reader_of(index), permuted=1.0).read(whole(index))
    assert np.array_equal(mixed["uid"], own["uid"])
    assert np.array_equal(mixed["image"], own["image"])
    top = 0
    for group, rows in enumerate(index.rows.tolist()):
        whose = permute_captions(rows, 1.0, 3, int(index.shard[group]), int(index.group[group]))
        assert np.array_equal(mixed["text"][top : top + rows], own["text"][top : top + rows][whose])
        top += rows
    assert np.array_equal(mixed["text"], change_texts(reader_of(index), permuted=1.0).read(whole(index, 5))["text"])
    part = change_texts(reader_of(index), permuted=1.0).read([Segment(2, 1, 4)])
    assert np.array_equal(part["text"], mixed["text"][7:10]), "a part of a row group has what the whole has"


def test_collapse_and_corrupt(tmp_path: Path) -> None:
    index = embedded(three_shards(tmp_path))
    key = str(reader_of(index).text_key)
    columns = [
        read_column(text_sidecars(index, key, WIDTH).location(shard), "vectors") for shard in range(len(index.paths))
    ]
    everything = np.concatenate([decode_vectors(column, WIDTH)[0] for column in columns]).astype(np.float64)
    mean = mean_vector(index, key, WIDTH)
    assert mean == pytest.approx(everything.mean(0), abs=1e-6)
    first = decode_vectors(columns[0], WIDTH)[0].astype(np.float64)
    assert mean_vector(index, key, WIDTH, captions=1) == pytest.approx(first.mean(0), abs=1e-6)

    vectors = normalise_rows(np.random.default_rng(0).normal(size=(50, 64)) + 1).astype(np.float16)
    uids = [str(row) for row in range(50)]
    middle = vectors.mean(0, dtype=np.float32)
    centred = change_texts(reader_of(index), mean=middle).move_vectors(vectors, 0, uids)
    assert np.linalg.norm(centred.mean(0, dtype=np.float32)) < 0.2 < np.linalg.norm(middle)
    noise = change_texts(reader_of(index), noise=0.5)
    noisy = noise.move_vectors(vectors, 0, uids).astype(np.float32)
    assert np.linalg.norm(noisy, axis=1) == pytest.approx(1, abs=2e-3)
    cosines = (noisy * vectors.astype(np.float32)).sum(1)
    assert np.mean(cosines) == pytest.approx(1 / np.sqrt(1 + 0.5**2), abs=0.02)
    assert np.array_equal(noise.move_vectors(vectors, 0, uids)[7:9], noise.move_vectors(vectors[7:9], 0, uids[7:9]))


def test_a_block_has_moved_vectors_and_rows_without_a_caption_have_none(tmp_path: Path) -> None:
    index = embedded(three_shards(tmp_path))
    plain = reader_of(index).read(whole(index, 2))
    reader = change_texts(reader_of(index), mean=mean_vector(index, str(reader_of(index).text_key), WIDTH), noise=0.5)
    moved = reader.read(whole(index, 2))
    has_text = plain["text"].any(axis=1)
    expected = reader.move_vectors(plain["text"][has_text], 2, plain["uid"][has_text].tolist())
    assert np.array_equal(moved["text"][has_text], expected)
    assert not moved["text"][~has_text].any()
    assert not np.array_equal(moved["text"], plain["text"])
    assert all(np.array_equal(moved[name], plain[name]) for name in plain if name != "text")
    again = pickle.loads(pickle.dumps(reader)).read(whole(index, 2))  # noqa: S301
    assert np.array_equal(again["text"], moved["text"]), "a task reads as the driver does"


@pytest.mark.slow
def test_a_run_is_given_what_its_config_says(tiny: Make, text: TextTower) -> None:
    config = tiny(data__permuted_captions=0.25, text__noise=0.1, text__center=True, data__used_rows=0.5)
    reader = train_reader(config, text)
    assert isinstance(reader, AblationReader)
    assert (reader.permuted, reader.noise) == (0.25, 0.1)
    assert reader.mean is not None
    assert reader.mean.shape == (text.width,)
    job = prepare_job(config, text)
    assert job.plan.rows.tolist() == [rows // 2 for rows in reader.index.rows.tolist()]
    assert job.plan.fingerprint != prepare_job(tiny(), text).plan.fingerprint
    assert type(train_reader(tiny(), text)) is BlockReader


def test_online_texts_cannot_be_changed(tiny: Make) -> None:
    with pytest.raises(ConfigError, match="and here the text tower runs online"):
        tiny(lock="none", text__noise=0.1)
