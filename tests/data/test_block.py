"""Rows to arrays: shapes hold whatever a row is, and a vector is its row's own."""

import pickle
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from helpers.blocks import SIZE, embedded, equal, reader_of, three_shards, whole
from helpers.pictures import WIDTH, encoded, photo, rows_of, seen, trained_on, vector_of, write_shard
from helpers.plans import block_rows as rows_in_block

from nev.config.data import Augment, Columns, Limits
from nev.data.augment import seeded_random
from nev.data.block_plan import Segment, sequential_blocks
from nev.data.decode import read_header
from nev.data.index import build_index
from nev.data.plan import Plan
from nev.data.rows import parse_captions
from nev.storage.reading import DataError

BROKEN: list[tuple[str, Any, Any, str]] = [
    ("good", encoded(photo(1)), "a caption", ""),
    ("truncated", encoded(photo(2))[:-90], "a caption", "OSError: image file is truncated"),
    ("null image", None, "a caption", "image is null"),
    ("empty image", b"", "a caption", "image is empty"),
    ("garbage", b"\x00garbage" * 9, "a caption", "not an image in a known format"),
    ("null caption", encoded(photo(3)), None, "caption is empty"),
    ("blank caption", encoded(photo(4)), " \n\t", "caption is empty"),
    ("neither", None, "", "caption is empty"),
    ("last", encoded(photo(5), "PNG"), "another", ""),
]


@pytest.mark.parametrize("layout", ["plain", "lists", "struct"])
def test_rows_that_cannot_be_used_are_masked_with_a_reason(layout: str, tmp_path: Path) -> None:
    rows = [{"uid": uid, "image": image, "caption": caption} for uid, image, caption, _ in BROKEN]
    kinds: dict[str, Any] = {"uid": pa.string(), "image": pa.binary(), "caption": pa.string()}
    if layout == "lists":
        kinds["caption"] = pa.list_(pa.string())
        for row in rows:
            row["caption"] = row["caption"] if row["caption"] is None else [row["caption"], None, "  "]
    if layout == "struct":
        kinds["image"] = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
        for row in rows[:3] + rows[4:]:
            row["image"] = {"bytes": row["image"], "path": "x.jpg"}
        rows[2]["image"] = None  # the struct itself is null
        rows[3]["image"] = {"bytes": b"", "path": None}
    write_shard(tmp_path / "a.parquet", rows, [4, 5], pa.schema(kinds))
    used = np.full((9, SIZE, SIZE, 3), 200, np.uint8)  # memory that held another block
    segments = [Segment(0, 0, 4), Segment(1, 0, 5)]
    reader = reader_of(embedded(tmp_path))
    block = reader.decode(reader.load(segments), pictures=used)
    assert block["image"] is used
    assert equal(block, reader_of(embedded(tmp_path)).read(segments))
    assert {name: (column.shape, column.dtype) for name, column in block.items()} == {
        "image": ((9, SIZE, SIZE, 3), np.uint8),
        "text": ((9, WIDTH), np.float16),
        "valid": ((9,), np.bool_),
        "uid": ((9,), object),
        "reason": ((9,), object),
        "shard": ((9,), np.int32),
        "row_group": ((9,), np.int32),
        "row": ((9,), np.int32),
    }
    assert block["uid"].tolist() == [uid for uid, *_ in BROKEN]
    for row, (_, _, caption, reason) in enumerate(BROKEN):
        assert block["valid"][row] == (reason == "")
        assert block["reason"][row].startswith(reason)
        assert bool(block["reason"][row]) == bool(reason)
        assert block["image"][row].any() == (reason == "")
        named = parse_captions(caption)
        assert np.array_equal(block["text"][row], vector_of(named[0]) if named else np.zeros(WIDTH))


def test_rows_over_the_limits_are_masked(tmp_path: Path) -> None:
    rows = [*rows_of(2), {"uid": "large", "image": encoded(photo(7, 64, 64)), "caption": "c"}]
    write_shard(tmp_path / "a.parquet", rows, [3])
    block = reader_of(embedded(tmp_path), limits=Limits(max_pixels=1000)).read([Segment(0, 0, 3)])
    assert block["valid"].tolist() == [True, True, False]
    assert block["reason"][2] == "image is 64x64, more than limits.max_pixels"


def test_every_row_gets_its_own_picture_and_its_own_vector(tmp_path: Path) -> None:
    index = embedded(three_shards(tmp_path))
    block = reader_of(index).read(whole(index, 4))
    expected = rows_of(27)
    assert block["uid"].tolist() == [row["uid"] for row in expected]
    assert block["shard"].tolist() == [0] * 12 + [1] * 9 + [2] * 6
    assert block["row_group"].tolist() == [0] * 5 + [1] + [2] * 6 + [0] * 9 + [0] * 2 + [1] * 4
    assert block["row"].tolist() == [*range(5), 0, *range(6), *range(9), *range(2), *range(4)]
    middle = reader_of(index).read([Segment(2, 3, 5, 4)])
    assert (middle["row_group"].tolist(), middle["row"].tolist()) == ([2, 2], [3, 4])
    for row, given in enumerate(expected):
        image = read_header(given["image"], Limits())
        view = trained_on(image, SIZE, Augment(), seeded_random(3, 4, str(given["uid"]), "augment"))
        assert np.array_equal(block["image"][row], view)
        assert np.array_equal(block["text"][row], vector_of(given["caption"]))


@pytest.mark.parametrize("window", [0, 1, 3])
@pytest.mark.parametrize("block_rows", [1, 4, 7])
def test_blocks_that_straddle_row_groups_hold_the_same_rows(block_rows: int, window: int, tmp_path: Path) -> None:
    index = embedded(three_shards(tmp_path))
    reader = reader_of(index)
    at = {uid: row for row, uid in enumerate(f"row-{k}" for k in range(27))}
    reference = reader.read(whole(index, 1))
    plan = Plan(index.rows, 0, block_rows, block_rows, window)
    blocks = range(plan.blocks_per_epoch, 2 * plan.blocks_per_epoch)
    assert block_rows == 1 or any(len({row[:2] for row in rows_in_block(plan, number)}) > 1 for number in blocks)
    seen = []
    for number in blocks:
        block = next(reader.read_blocks(plan.make_window(number)))
        rows = [at[uid] for uid in block["uid"]]
        assert len(rows) == block_rows
        assert equal(block, {name: column[rows] for name, column in reference.items()})
        seen += rows
    assert len(set(seen)) == len(seen) == 27 // block_rows * block_rows


def test_augmentation_is_drawn_anew_each_epoch_and_never_in_evaluation(tmp_path: Path) -> None:
    index = embedded(three_shards(tmp_path))
    strong = Augment(scale=(0.2, 0.9), flip=True)
    train = [reader_of(index, augment=strong).read(whole(index, epoch)) for epoch in (0, 1, 0)]
    assert equal(train[0], train[2])
    assert (train[0]["image"] != train[1]["image"]).reshape(27, -1).any(1).all()
    still = [reader_of(index, augment=None, seed=epoch).read(whole(index, epoch))["image"] for epoch in (0, 1)]
    assert np.array_equal(still[0], still[1])
    assert np.array_equal(still[0][5], seen(read_header(rows_of(6)[5]["image"], Limits()), SIZE))


def test_one_of_several_captions_is_drawn_each_epoch(tmp_path: Path) -> None:
    rows = [
        row | {"caption": [f"{row['uid']} said {k}" for k in range(1 + n % 5)]} for n, row in enumerate(rows_of(20))
    ]
    rows[7]["caption"] = ["", "the only one", None]
    write_shard(tmp_path / "a.parquet", rows, [11, 9])
    index = embedded(tmp_path)
    reader = reader_of(index)
    owner = {
        vector_of(c).tobytes(): (n, k)
        for n, row in enumerate(rows)
        for k, c in enumerate(parse_captions(row["caption"]))
    }
    drawn: dict[int, Counter[int]] = {n: Counter() for n in range(20)}
    orders = set()
    for epoch in range(120):
        found = [owner[vector.tobytes()] for vector in reader_of(index).read(whole(index, epoch))["text"]]
        assert [n for n, _ in found] == list(range(20))
        for n, k in found:
            drawn[n][k] += 1
        again = reader.read(whole(index, epoch)[1:])["text"]  # asked for alone, a row draws the same
        assert [owner[vector.tobytes()] for vector in again] == found[11:]
        orders.add(tuple(found))
    assert len(orders) == 120
    for n, row in enumerate(rows):
        count = len(parse_captions(row["caption"]))
        assert set(drawn[n]) == set(range(count))
        assert all(abs(times - 120 / count) < 5 * (120 / count) ** 0.5 for times in drawn[n].values())


def test_captions_of_a_row() -> None:
    assert parse_captions("  a cat ") == ["a cat"]
    assert parse_captions(["a", "", None, " b "]) == ["a", "b"]  # type: ignore[list-item]
    assert parse_captions(None) == parse_captions([]) == parse_captions(" ") == []


def test_labels_come_with_evaluation_blocks(tmp_path: Path) -> None:
    rows = [row | {"label": None if n == 2 else n} for n, row in enumerate(rows_of(5))]
    write_shard(tmp_path / "a.parquet", rows, [3, 2])
    index = build_index(str(tmp_path), Columns())
    reader = reader_of(index, with_labels=True, text_key=None, augment=None)
    blocks = [reader.read(segments) for segments in sequential_blocks(index.rows, 2)]
    labels = np.concatenate([block["label"] for block in blocks])
    assert labels.dtype == np.int64
    assert labels.tolist() == [0, 1, -1, 3, 4]
    assert "text" not in blocks[0]


def test_a_reader_can_be_sent_to_another_process(tmp_path: Path) -> None:
    index = embedded(three_shards(tmp_path))
    reader = reader_of(index)
    block = reader.read(whole(index, 2))
    copy = pickle.loads(pickle.dumps(reader))  # noqa: S301
    assert equal(copy.read(whole(index, 2)), block)
    assert equal(reader.read(whole(index, 2)), block)


def test_more_shards_than_open_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nev.data.shard_files.OPEN_FILES", 2)
    for k in range(6):
        write_shard(tmp_path / f"{k}.parquet", rows_of(2, first=2 * k), [1, 1])
    index = embedded(tmp_path)
    reader = reader_of(index)
    block = reader.read([*whole(index), *whole(index)])
    assert block["uid"].tolist() == 2 * [f"row-{k}" for k in range(12)]
    assert len(reader._files) == 2


def test_a_shard_that_is_lost_or_cut_under_way_is_named(tmp_path: Path) -> None:
    index = embedded(three_shards(tmp_path))
    path = tmp_path / "b.parquet"
    content = path.read_bytes()
    path.unlink()
    with pytest.raises(DataError, match=r"b\.parquet: row group 0 cannot be read"):
        reader_of(index).read([Segment(3, 0, 9)])
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(DataError, match=r"b\.parquet: row group 0 cannot be read"):
        reader_of(index).read([Segment(3, 0, 9)])
    write_shard(path, rows_of(4), [4])
    with pytest.raises(DataError, match=r"b\.parquet: row group 0 has lost rows"):
        reader_of(index).read([Segment(3, 0, 9)])


def test_real_photographs_become_blocks(data_folder: Path, tmp_path: Path) -> None:
    paths = (
        sorted((data_folder / "imagenet_sample").iterdir())[:6]
        + sorted((data_folder / "satellite/cloudy").iterdir())[:6]
    )
    rows = [{"uid": path.name, "image": path.read_bytes(), "caption": path.stem} for path in paths]
    write_shard(tmp_path / "a.parquet", rows, [5, 7])
    index = embedded(tmp_path)
    block = reader_of(index, image_size=64).read(whole(index))
    assert block["valid"].all()
    assert block["image"].shape == (12, 64, 64, 3)
    assert (block["image"].reshape(12, -1).std(1) > 2).all()
    assert np.array_equal(block["text"], [vector_of(path.stem) for path in paths])
