"""Image sidecars: what is read back, what is drawn, what is refused."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.blocks import SIZE, embedded, reader_of, three_shards, whole
from helpers.pictures import rows_of, write_shard
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from nev.config.data import Augment, Columns, Data
from nev.data.augment import seeded_fractions
from nev.data.block_plan import Segment
from nev.data.image_sidecar import (
    FeatureRows,
    Features,
    Moments,
    check_image_sidecars,
    image_recipe,
    read_statistics,
    write_image_sidecar,
)
from nev.data.index import Index, build_index
from nev.data.sidecar import missing_sidecars, read_uid_column, sidecars_to_write
from nev.storage.reading import DataError, read_column

SHAPE, VIEWS = (5,), 3
DATA = Data(train="nowhere", image_size=SIZE, augment=Augment())


def features(
    trunk: str = "trunk", views: int = VIEWS, seed: int = 3, data: Data = DATA, shape: tuple[int, ...] = SHAPE
) -> Features:
    return Features(image_recipe(trunk, "image", data, seed, training=True), shape, views)


def numbers(uid: str, shape: tuple[int, ...] = SHAPE, views: int = VIEWS) -> np.ndarray:
    """The features of a picture: they depend on its uid alone."""
    seed = int.from_bytes(uid.encode()[-4:], "little")
    return np.random.default_rng(seed).normal(size=(views, *shape)).astype(np.float16)


def groups_of(
    index: Index, shard: int, bad: tuple[str, ...], shape: tuple[int, ...], views: int
) -> Iterator[FeatureRows]:
    uids = read_uid_column(read_column(index.location(shard), "uid"))
    for group in range(len(index.rows))[index.shard_groups(shard)]:
        names, uids = uids[: index.rows[group]], uids[index.rows[group] :]
        vectors = np.stack([numbers(uid, shape, views) for uid in names])
        yield FeatureRows(names, vectors, ["broken" if uid in bad else "" for uid in names])


def write(index: Index, stored: Features, bad: tuple[str, ...] = ()) -> None:
    for shard in missing_sidecars(stored.sidecars(index)):
        write_image_sidecar(
            stored.sidecars(index), shard, stored.views, groups_of(index, shard, bad, stored.shape, stored.views)
        )


@pytest.fixture
def index(tmp_path: Path) -> Index:
    return embedded(three_shards(tmp_path))


def test_each_epoch_draws_a_view_by_seed_epoch_and_uid(index: Index) -> None:
    write(index, features())
    reader = reader_of(index, features=features())
    drawn = set()
    for epoch in range(6):
        block = reader.read(whole(index, epoch))
        assert block["image"].dtype == np.float16
        assert block["image"].shape == (27, *SHAPE)
        for uid, row in zip(block["uid"], block["image"], strict=True):
            view = int(seeded_fractions(3, epoch, [uid], "view")[0] * VIEWS)
            drawn.add(view)
            assert np.array_equal(row, numbers(uid)[view])
    assert drawn == {0, 1, 2}


def test_the_block_is_that_of_pictures_but_for_the_pictures(index: Index) -> None:
    """Texts, uids, places: as without sidecars. No picture is opened."""
    write(index, features())
    pixels = reader_of(index).read(whole(index, 2))
    vectors = reader_of(index, features=features()).read(whole(index, 2))
    assert pixels.keys() == vectors.keys()
    for name in pixels.keys() - {"image", "valid", "reason"}:
        assert np.array_equal(pixels[name], vectors[name]), name
    assert vectors["valid"].all()


def test_a_part_of_a_row_group_and_tokens(index: Index) -> None:
    stored = features(shape=(4, 2), views=1)
    write(index, stored)
    block = reader_of(index, features=stored).read([Segment(2, 1, 4), Segment(0, 0, 2)])
    assert block["image"].shape == (5, 4, 2)
    for uid, row in zip(block["uid"], block["image"], strict=True):
        assert np.array_equal(row, numbers(uid, (4, 2), 1)[0])


def test_a_picture_that_could_not_be_used_keeps_its_reason(index: Index) -> None:
    uids = read_uid_column(read_column(index.location(0), "uid"))
    write(index, features(), bad=(uids[1], uids[7]))
    block = reader_of(index, features=features()).read(whole(index))
    assert {uid: reason for uid, reason in zip(block["uid"], block["reason"], strict=True) if reason} == {
        uids[1]: "broken",
        uids[7]: "broken",
    }
    assert np.flatnonzero(~block["valid"]).tolist() == [1, 7]
    assert not block["image"][~block["valid"]].any()


def test_rows_without_a_caption_are_left_out_as_with_pictures(tmp_path: Path) -> None:
    rows = rows_of(8)
    rows[3]["caption"] = None
    write_shard(tmp_path / "a.parquet", rows, [8])
    index = embedded(tmp_path)
    write(index, features())
    block = reader_of(index, features=features()).read(whole(index))
    assert np.flatnonzero(~block["valid"]).tolist() == [3]
    assert block["reason"][3] == "caption is empty"


def test_empty_row_groups_and_empty_shards(tmp_path: Path) -> None:
    """A sidecar has the row groups of its shard, those without rows too."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.table({name: [row[name] for row in rows_of(6)] for name in ("uid", "image", "caption")})
    with pq.ParquetWriter(tmp_path / "a.parquet", table.schema) as writer:
        for part in (table.slice(0, 0), table.slice(0, 2), table.slice(0, 0), table.slice(2)):
            writer.write_table(part, row_group_size=8)
    pq.write_table(table.slice(0, 0), tmp_path / "b.parquet")
    index = embedded(tmp_path)
    assert index.group.tolist() == [1, 3]
    write(index, features())
    check_image_sidecars(index, features(), every_row=True)
    block = reader_of(index, features=features()).read(whole(index))
    assert block["uid"].tolist() == table["uid"].to_pylist()


def test_statistics_are_those_of_all_usable_features(index: Index) -> None:
    uids = [uid for shard in range(3) for uid in read_uid_column(read_column(index.location(shard), "uid"))]
    write(index, features(), bad=(uids[0],))
    everything = np.concatenate([numbers(uid) for uid in uids[1:]]).astype(np.float64)
    found = read_statistics(check_image_sidecars(index, features()))
    np.testing.assert_allclose(found, [everything.mean(0), everything.std(0)], rtol=1e-6)


HALVES = arrays.arrays(np.float16, st.tuples(st.integers(0, 5), st.just(2)), elements=st.floats(-100, 100, width=16))


@given(st.lists(HALVES, min_size=1, max_size=5))
def test_moments_add_up(parts: list[np.ndarray]) -> None:
    total = Moments(0, np.zeros(2), np.zeros(2))
    for part in parts:
        total += Moments.from_text(Moments.of(part).to_text())
    rows = np.concatenate(parts).astype(np.float64)
    assert total.count == len(rows)
    if len(rows):
        np.testing.assert_allclose(total.mean, rows.mean(0), atol=1e-9)
        np.testing.assert_allclose(total.squares / len(rows), rows.var(0), atol=1e-7)


def test_what_is_missing_is_told_with_what_is_there_instead(index: Index) -> None:
    write(index, features("other trunk"))
    larger = DATA.model_copy(update={"image_size": 99})
    write(index, features(data=larger))
    with pytest.raises(DataError) as caught:
        check_image_sidecars(index, features())
    message = str(caught.value)
    assert "3 of 3 shards have no image sidecar of this trunk and view (first: a.parquet)" in message
    assert "trunk other trunk there, trunk here" in message
    assert "image_size 99 there, 16 here" in message
    assert "nev embed-images --config CONFIG" in message


def test_views_that_are_not_there_are_refused(index: Index) -> None:
    write(index, features(views=2))
    check_image_sidecars(index, features(views=1))
    with pytest.raises(DataError, match=r"have 2 view\(s\) of a picture, and vision\.views is 3"):
        check_image_sidecars(index, features(views=3))
    few = features(views=3).sidecars(index)
    assert sidecars_to_write(few, lambda metadata: int(metadata["nev.views"]) >= 3) == [0, 1, 2]
    assert sidecars_to_write(few) == []


def test_a_shard_that_changed_is_refused(index: Index, tmp_path: Path) -> None:
    write(index, features())
    write_shard(tmp_path / "b.parquet", rows_of(30)[21:], [9])
    after = build_index(str(tmp_path), Columns())
    with pytest.raises(DataError, match=r"b\.parquet: .*its rows are not those of the shard|nev\.shard is"):
        check_image_sidecars(after, features())


def test_rows_in_another_order_are_found_when_they_are_read(index: Index, tmp_path: Path) -> None:
    """The footer of a shard with several row groups does not show that rows changed places; the texts' uids do."""
    stored = features()
    sidecars = stored.sidecars(index)

    def turned(shard: int) -> Iterator[FeatureRows]:
        for group in groups_of(index, shard, (), SHAPE, VIEWS):
            yield FeatureRows(group.uid[::-1], group.features[::-1], group.reason[::-1])

    for shard in range(3):
        write_image_sidecar(sidecars, shard, VIEWS, turned(shard))
    with pytest.raises(DataError, match="its rows are not those of the shard"):
        reader_of(index, features=stored).read(whole(index))
    with pytest.raises(DataError, match="its rows are not those of the shard"):
        check_image_sidecars(index, stored, every_row=True)


def test_a_write_that_fails_leaves_nothing(index: Index) -> None:
    stored = features()

    def torn() -> Iterator[FeatureRows]:
        yield next(groups_of(index, 0, (), SHAPE, VIEWS))
        raise RuntimeError("the trunk died")

    with pytest.raises(RuntimeError, match="died"):
        write_image_sidecar(stored.sidecars(index), 0, VIEWS, torn())
    with pytest.raises(ValueError, match="zip"):  # too few row groups
        write_image_sidecar(stored.sidecars(index), 0, VIEWS, iter(()))
    assert missing_sidecars(stored.sidecars(index)) == [0, 1, 2]
    folder = Path(stored.sidecars(index).location(0)).parent
    assert not folder.exists() or not [*folder.iterdir()]


def test_the_recipe_names_all_that_features_depend_on() -> None:
    base: dict[str, Any] = {"trunk": "t", "column": "image", "data": DATA, "seed": 1, "training": True}

    def key(**changes: Any) -> str:
        return Features(image_recipe(**{**base, **changes}), SHAPE, 1).sidecars(None).key  # type: ignore[arg-type]

    def data(**changes: Any) -> Data:
        return DATA.model_copy(update=changes)

    keys = [
        key(),
        key(trunk="u"),
        key(column="thumb"),
        key(seed=2),
        key(training=False),
        key(data=data(image_size=8)),
        key(data=data(mean=(0.5, 0.5, 0.5))),
        key(data=data(std=(0.5, 0.5, 0.5))),
        key(data=data(augment=Augment(flip=True))),
    ]
    assert len(set(keys)) == len(keys)
    assert key(training=False, seed=9) == key(training=False), "the evaluation view has no seed"
    assert key(data=data(augment=None)) == key(training=False), "one view for both sets"
    assert key(data=data(block_rows=7, train="elsewhere")) == key()
