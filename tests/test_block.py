"""Rows to arrays, and the text sidecars beside them: shapes hold whatever a row is, and a vector is its row's own."""

import pickle
import shutil
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_helpers import WIDTH, encode, encoded, photo, rows_of, vector_of, write_shard

from nev.config import Augment, Columns, Limits
from nev.data.block import Block, BlockReader
from nev.data.decode import decode, draw, eval_view, train_view
from nev.data.index import DataError, Index, build_index
from nev.data.plan import Plan, Segment, in_order
from nev.data.rows import captions_of
from nev.data.sidecar import (
    check_sidecars,
    missing_sidecars,
    sidecar_key,
    sidecar_location,
    vectors_of,
    write_sidecar,
)

KEY = sidecar_key("tower", "caption")
SIZE = 16


def embedded(folder: Path, key: str = KEY) -> Index:
    """The index of a folder, with the sidecars that it lacks written."""
    index = build_index(str(folder), Columns())
    for shard in missing_sidecars(index, key):
        write_sidecar(index, shard, key, WIDTH, encode)
    return index


def reader_of(index: Index, **changed: Any) -> BlockReader:
    settings = {"image_size": SIZE, "limits": Limits(), "seed": 3, "augment": Augment(), "text_key": KEY}
    return BlockReader(index, text_width=WIDTH, **(settings | changed))


def whole(index: Index) -> list[Segment]:
    return [Segment(group, 0, int(rows)) for group, rows in enumerate(index.rows)]


def equal(one: Block, other: Block) -> bool:
    return one.keys() == other.keys() and all(np.array_equal(one[name], other[name]) for name in one)


def three_shards(folder: Path) -> Path:
    """27 rows in row groups of unequal sizes; one shard holds the Hugging Face struct."""
    rows = rows_of(27)
    write_shard(folder / "a.parquet", rows[:12], [5, 1, 6])
    write_shard(folder / "b.parquet", rows[12:21], [9])
    for row in rows[21:]:
        row["image"] = {"bytes": row["image"], "path": None}
    write_shard(folder / "c.parquet", rows[21:], [2, 4])
    return folder


BROKEN: list[tuple[str, Any, Any, str]] = [
    ("good", encoded(photo(1)), "a caption", ""),
    ("truncated", encoded(photo(2))[:-90], "a caption", "JPEG: "),
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
    block = reader_of(embedded(tmp_path)).read([Segment(0, 0, 4), Segment(1, 0, 5)], epoch=0)
    assert {name: (column.shape, column.dtype) for name, column in block.items()} == {
        "image": ((9, SIZE, SIZE, 3), np.uint8),
        "text": ((9, WIDTH), np.float16),
        "valid": ((9,), np.bool_),
        "uid": ((9,), object),
        "reason": ((9,), object),
        "shard": ((9,), np.int32),
    }
    assert block["uid"].tolist() == [uid for uid, *_ in BROKEN]
    for row, (_, _, caption, reason) in enumerate(BROKEN):
        assert block["valid"][row] == (reason == "")
        assert block["reason"][row].startswith(reason)
        assert bool(block["reason"][row]) == bool(reason)
        assert block["image"][row].any() == (reason == "")
        named = captions_of(caption)
        assert np.array_equal(block["text"][row], vector_of(named[0]) if named else np.zeros(WIDTH))


def test_rows_over_the_limits_are_masked(tmp_path: Path) -> None:
    rows = [*rows_of(2), {"uid": "large", "image": encoded(photo(7, 64, 64)), "caption": "c"}]
    write_shard(tmp_path / "a.parquet", rows, [3])
    block = reader_of(embedded(tmp_path), limits=Limits(max_pixels=1000)).read([Segment(0, 0, 3)], 0)
    assert block["valid"].tolist() == [True, True, False]
    assert block["reason"][2] == "image is 64x64, more than limits.max_pixels"


def test_every_row_gets_its_own_picture_and_its_own_vector(tmp_path: Path) -> None:
    index = embedded(three_shards(tmp_path))
    block = reader_of(index).read(whole(index), epoch=4)
    expected = rows_of(27)
    assert block["uid"].tolist() == [row["uid"] for row in expected]
    assert block["shard"].tolist() == [0] * 12 + [1] * 9 + [2] * 6
    for row, given in enumerate(expected):
        view = train_view(decode(given["image"], Limits()), SIZE, Augment(), draw(3, 4, str(given["uid"]), "augment"))
        assert np.array_equal(block["image"][row], view)
        assert np.array_equal(block["text"][row], vector_of(given["caption"]))


@pytest.mark.parametrize("block_rows", [1, 4, 7])
def test_blocks_that_straddle_row_groups_hold_the_same_rows(block_rows: int, tmp_path: Path) -> None:
    index = embedded(three_shards(tmp_path))
    reader = reader_of(index)
    at = {uid: row for row, uid in enumerate(f"row-{k}" for k in range(27))}
    reference = reader.read(whole(index), epoch=1)
    plan = Plan(index.rows, 0, block_rows, block_rows)
    blocks = range(plan.blocks_per_epoch, 2 * plan.blocks_per_epoch)
    assert block_rows == 1 or any(len(plan.segments(number)) > 1 for number in blocks)
    seen = []
    for number in blocks:
        block = reader.read(plan.segments(number), epoch=1)
        rows = [at[uid] for uid in block["uid"]]
        assert len(rows) == block_rows
        assert equal(block, {name: column[rows] for name, column in reference.items()})
        seen += rows
    assert len(set(seen)) == len(seen) == 27 // block_rows * block_rows


def test_augmentation_is_drawn_anew_each_epoch_and_never_in_evaluation(tmp_path: Path) -> None:
    index = embedded(three_shards(tmp_path))
    strong = Augment(scale=(0.2, 0.9), flip=True)
    train = [reader_of(index, augment=strong).read(whole(index), epoch) for epoch in (0, 1, 0)]
    assert equal(train[0], train[2])
    assert (train[0]["image"] != train[1]["image"]).reshape(27, -1).any(1).all()
    still = [reader_of(index, augment=None, seed=epoch).read(whole(index), epoch)["image"] for epoch in (0, 1)]
    assert np.array_equal(still[0], still[1])
    assert np.array_equal(still[0][5], eval_view(decode(rows_of(6)[5]["image"], Limits()), SIZE))


def test_one_of_several_captions_is_drawn_each_epoch(tmp_path: Path) -> None:
    rows = [
        row | {"caption": [f"{row['uid']} said {k}" for k in range(1 + n % 5)]} for n, row in enumerate(rows_of(20))
    ]
    rows[7]["caption"] = ["", "the only one", None]
    write_shard(tmp_path / "a.parquet", rows, [11, 9])
    index = embedded(tmp_path)
    reader = reader_of(index)
    owner = {
        vector_of(c).tobytes(): (n, k) for n, row in enumerate(rows) for k, c in enumerate(captions_of(row["caption"]))
    }
    drawn: dict[int, Counter[int]] = {n: Counter() for n in range(20)}
    orders = set()
    for epoch in range(120):
        found = [owner[vector.tobytes()] for vector in reader_of(index).read(whole(index), epoch)["text"]]
        assert [n for n, _ in found] == list(range(20))
        for n, k in found:
            drawn[n][k] += 1
        again = reader.read(whole(index)[1:], epoch)["text"]  # asked for alone, a row draws the same
        assert [owner[vector.tobytes()] for vector in again] == found[11:]
        orders.add(tuple(found))
    assert len(orders) == 120
    for n, row in enumerate(rows):
        count = len(captions_of(row["caption"]))
        assert set(drawn[n]) == set(range(count))
        assert all(abs(times - 120 / count) < 5 * (120 / count) ** 0.5 for times in drawn[n].values())


def test_captions_of_a_row() -> None:
    assert captions_of("  a cat ") == ["a cat"]
    assert captions_of(["a", "", None, " b "]) == ["a", "b"]  # type: ignore[list-item]
    assert captions_of(None) == captions_of([]) == captions_of(" ") == []


def test_labels_come_with_evaluation_blocks(tmp_path: Path) -> None:
    rows = [row | {"label": None if n == 2 else n} for n, row in enumerate(rows_of(5))]
    write_shard(tmp_path / "a.parquet", rows, [3, 2])
    index = build_index(str(tmp_path), Columns())
    reader = reader_of(index, with_labels=True, text_key=None, augment=None)
    blocks = [reader.read(segments, 0) for segments in in_order(index.rows, 2)]
    labels = np.concatenate([block["label"] for block in blocks])
    assert labels.dtype == np.int64
    assert labels.tolist() == [0, 1, -1, 3, 4]
    assert "text" not in blocks[0]


def test_a_reader_can_be_sent_to_another_process(tmp_path: Path) -> None:
    index = embedded(three_shards(tmp_path))
    reader = reader_of(index)
    block = reader.read(whole(index), 2)
    copy = pickle.loads(pickle.dumps(reader))  # noqa: S301
    assert equal(copy.read(whole(index), 2), block)
    assert equal(reader.read(whole(index), 2), block)


def test_more_shards_than_open_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nev.data.block.OPEN_FILES", 2)
    for k in range(6):
        write_shard(tmp_path / f"{k}.parquet", rows_of(2, first=2 * k), [1, 1])
    index = embedded(tmp_path)
    reader = reader_of(index)
    block = reader.read([*whole(index), *whole(index)], 0)
    assert block["uid"].tolist() == 2 * [f"row-{k}" for k in range(12)]
    assert len(reader._files) == 2


def test_a_shard_that_is_lost_or_cut_under_way_is_named(tmp_path: Path) -> None:
    index = embedded(three_shards(tmp_path))
    path = tmp_path / "b.parquet"
    content = path.read_bytes()
    path.unlink()
    with pytest.raises(DataError, match=r"b\.parquet: row group 0 cannot be read"):
        reader_of(index).read([Segment(3, 0, 9)], 0)
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(DataError, match=r"b\.parquet: row group 0 cannot be read"):
        reader_of(index).read([Segment(3, 0, 9)], 0)
    write_shard(path, rows_of(4), [4])
    with pytest.raises(DataError, match=r"b\.parquet: row group 0 has lost rows"):
        reader_of(index).read([Segment(3, 0, 9)], 0)


def test_sidecars_lie_beside_their_shards_row_for_row(tmp_path: Path) -> None:
    rows = [row | {"caption": [row["caption"], "shared by all"][: n % 3]} for n, row in enumerate(rows_of(9))]
    write_shard(tmp_path / "deep" / "a.parquet", rows, [4, 0, 5])
    index = build_index(str(tmp_path), Columns())
    asked: list[str] = []

    def counting(captions: Sequence[str]) -> np.ndarray:
        asked.extend(captions)
        return encode(captions)

    assert write_sidecar(index, 0, KEY, WIDTH, counting) == sum(n % 3 for n in range(9))
    assert len(asked) == len(set(asked)) == 7  # each distinct caption once
    path = tmp_path / "_text" / KEY[:16] / "deep" / "a.parquet"
    assert sidecar_location(index, 0, KEY) == str(path)
    file = pq.ParquetFile(path)
    assert [file.metadata.row_group(group).num_rows for group in range(3)] == [4, 0, 5]
    table = file.read()
    assert table["uid"].to_pylist() == [row["uid"] for row in rows]
    vectors, starts = vectors_of(table["vectors"], WIDTH)
    assert vectors.dtype == np.float16
    assert np.diff(starts).tolist() == [n % 3 for n in range(9)]
    assert np.array_equal(vectors, [vector_of(caption) for row in rows for caption in row["caption"]])
    check_sidecars(index, KEY, WIDTH)
    block = reader_of(index).read(whole(index), 0)
    assert block["valid"].tolist() == [n % 3 > 0 for n in range(9)]


def test_a_shard_without_any_caption_has_a_sidecar_too(tmp_path: Path) -> None:
    write_shard(tmp_path / "a.parquet", [row | {"caption": ""} for row in rows_of(3)], [3])
    index = embedded(tmp_path)
    check_sidecars(index, KEY, WIDTH)
    block = reader_of(index).read(whole(index), 0)
    assert block["reason"].tolist() == ["caption is empty"] * 3
    assert not block["text"].any()


def test_missing_sidecars_are_counted_and_named(tmp_path: Path) -> None:
    index = embedded(three_shards(tmp_path))
    check_sidecars(index, KEY, WIDTH)
    Path(sidecar_location(index, 1, KEY)).unlink()
    assert missing_sidecars(index, KEY) == [1]
    with pytest.raises(
        DataError, match=r"1 of 3 shards .* \(first: b\.parquet\)\. Write them with `python pipelines/embed_text"
    ):
        check_sidecars(index, KEY, WIDTH)
    with pytest.raises(DataError, match=r"3 of 3 shards have no text sidecar of this encoder"):
        check_sidecars(index, sidecar_key("another tower", "caption"), WIDTH)


def test_the_key_names_the_tower_and_the_column() -> None:
    keys = {sidecar_key(tower, column) for tower in ("a", "b", "a\nb") for column in ("caption", "b", "text")}
    assert len(keys) == 9
    assert sidecar_key("a", "caption") == sidecar_key("a", "caption")


def other_key(index: Index, path: Path) -> None:
    other = KEY[:16] + "0" * 48  # lies at the same place, since the folder has 16 digits of the key
    write_sidecar(index, 0, other, WIDTH, encode)


def other_width(index: Index, path: Path) -> None:
    write_sidecar(index, 0, KEY, WIDTH // 2, lambda captions: encode(captions)[:, : WIDTH // 2])


def cut_short(index: Index, path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def without_metadata(index: Index, path: Path) -> None:
    pq.write_table(pq.read_table(path).replace_schema_metadata(None), path)


def other_groups(index: Index, path: Path) -> None:
    table = pq.read_table(path)
    pq.write_table(table, path, row_group_size=4)


def shard_grew(index: Index, path: Path) -> None:
    write_shard(Path(index.location(0)), rows_of(13), [5, 1, 7])


def shard_split_otherwise(index: Index, path: Path) -> None:
    write_shard(Path(index.location(0)), rows_of(12), [6, 6])


def captions_changed(index: Index, path: Path) -> None:
    write_shard(Path(index.location(0)), [row | {"caption": "other words"} for row in rows_of(12)], [5, 1, 6])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (other_key, r"nev\.key is "),
        (other_width, r"nev\.width is 4, this run needs 8"),
        (cut_short, "not readable"),
        (without_metadata, r"nev\.key is None"),
        (other_groups, "its rows are not those of the shard"),
        (shard_grew, r"nev\.shard is "),
        (shard_split_otherwise, r"nev\.shard is "),
        (captions_changed, r"nev\.shard is "),
    ],
)
def test_a_sidecar_that_does_not_match_is_refused_with_a_remedy(change: Any, message: str, tmp_path: Path) -> None:
    index = embedded(three_shards(tmp_path))
    path = Path(sidecar_location(index, 0, KEY))
    change(index, path)
    with pytest.raises(DataError, match=rf"{path.name}: {message}(.|\n)*write it again"):
        check_sidecars(build_index(str(tmp_path), Columns()), KEY, WIDTH)


@pytest.mark.parametrize("groups", [[6], [3, 3]])
def test_rows_in_another_order_are_noticed_though_no_size_tells(groups: list[int], tmp_path: Path) -> None:
    """Preparing a small set again with another seed leaves row groups of the same rows and bytes."""
    rows = [row | {"image": encoded(photo(n), "BMP"), "caption": f"{n} apples"} for n, row in enumerate(rows_of(6))]
    write_shard(tmp_path / "a.parquet", rows, groups)
    before = embedded(tmp_path)
    write_shard(tmp_path / "a.parquet", rows[::-1], groups)
    after = build_index(str(tmp_path), Columns())
    assert after.fingerprint == before.fingerprint  # what footers can tell is the same
    with pytest.raises(DataError, match=r"a\.parquet: its rows are not those of the shard.*write it again"):
        reader_of(after).read(whole(after), 0)
    if len(groups) == 1:
        with pytest.raises(DataError, match="its rows are not those of the shard"):
            check_sidecars(after, KEY, WIDTH)


def test_a_sidecar_is_whole_or_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_shard(tmp_path / "a.parquet", rows_of(6), [3, 3])
    index = build_index(str(tmp_path), Columns())

    def failing(captions: Sequence[str]) -> np.ndarray:
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        write_sidecar(index, 0, KEY, WIDTH, failing)
    assert missing_sidecars(index, KEY) == [0]
    with pytest.raises(ValueError, match=r"gave \(6, 8\) for 6 captions of width 4"):
        write_sidecar(index, 0, KEY, WIDTH // 2, encode)
    assert missing_sidecars(index, KEY) == [0]

    written = pq.ParquetWriter.write_table
    calls = []

    def breaking(self: pq.ParquetWriter, *args: Any, **options: Any) -> None:
        calls.append(1)
        if len(calls) == 2:
            raise OSError("disk full")
        written(self, *args, **options)

    monkeypatch.setattr(pq.ParquetWriter, "write_table", breaking)
    with pytest.raises(OSError, match="disk full"):
        write_sidecar(index, 0, KEY, WIDTH, encode)
    monkeypatch.undo()
    assert missing_sidecars(index, KEY) == [0]
    with pytest.raises(DataError, match="no text sidecar"):
        check_sidecars(index, KEY, WIDTH)
    assert write_sidecar(index, 0, KEY, WIDTH, encode) == 6
    check_sidecars(index, KEY, WIDTH)
    assert build_index(str(tmp_path), Columns()).fingerprint == index.fingerprint  # sidecars are no shards


def test_a_copy_of_the_folder_takes_its_sidecars_along(tmp_path: Path) -> None:
    embedded(three_shards(tmp_path / "here"))
    shutil.copytree(tmp_path / "here", tmp_path / "there")
    check_sidecars(build_index(str(tmp_path / "there"), Columns()), KEY, WIDTH)


def test_real_photographs_become_blocks(data_folder: Path, tmp_path: Path) -> None:
    paths = (
        sorted((data_folder / "imagenet_sample").iterdir())[:6]
        + sorted((data_folder / "satellite/cloudy").iterdir())[:6]
    )
    rows = [{"uid": path.name, "image": path.read_bytes(), "caption": path.stem} for path in paths]
    write_shard(tmp_path / "a.parquet", rows, [5, 7])
    index = embedded(tmp_path)
    block = reader_of(index, image_size=64).read(whole(index), 0)
    assert block["valid"].all()
    assert block["image"].shape == (12, 64, 64, 3)
    assert (block["image"].reshape(12, -1).std(1) > 2).all()
    assert np.array_equal(block["text"], [vector_of(path.stem) for path in paths])


def test_vectors_of_any_slice_of_a_column() -> None:
    counts = [2, 0, 1, 3, 1]
    vectors = np.arange(7 * WIDTH, dtype="<f2").reshape(7, WIDTH)
    cuts = np.cumsum([0, *counts])
    array = pa.array([vectors[cuts[k] : cuts[k + 1]].tobytes() for k in range(5)], pa.binary())
    for column in (pa.chunked_array([array]), pa.chunked_array([array[:2], array[2:]])):
        for start in range(6):
            for stop in range(start, 6):
                found, starts = vectors_of(column.slice(start, stop - start), WIDTH)
                mine = [found[starts[k] : starts[k + 1]] for k in range(stop - start)]
                assert [len(part) for part in mine] == counts[start:stop]
                assert np.array_equal(np.concatenate([vectors[:0], *mine]), vectors[cuts[start] : cuts[stop]])
