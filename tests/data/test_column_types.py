"""Tables as people have them: every Arrow type of one content is read alike, directly and by prepare."""

from __future__ import annotations

import uuid
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers.blocks import embedded, reader_of, whole
from helpers.pictures import encoded, photo
from helpers.sources import read

from nev.config.base import ConfigError
from nev.config.data import Columns
from nev.data.index import build_index
from nev.data.shard_labels import read_shard_labels
from nev.data.sources import SourceOptions
from nev.storage.reading import DataError

IMAGES = [encoded(photo(k)) for k in range(4)]
CAPTIONS = [f"caption {k}" for k in range(4)]
UIDS = [f"u{k}" for k in range(4)]
UUIDS = [uuid.UUID(int=k) for k in range(4)]
PLAIN: dict[str, Any] = {"uid": UIDS, "image": pa.array(IMAGES), "caption": CAPTIONS}
TEXT, BYTES = pa.string_view(), pa.binary_view()
TABLES: dict[str, dict[str, Any]] = {
    "views": {"uid": pa.array(UIDS, TEXT), "image": pa.array(IMAGES, BYTES), "caption": pa.array(CAPTIONS, TEXT)},
    "large": {
        "uid": pa.array(UIDS, pa.large_string()),
        "image": pa.array(IMAGES, pa.large_binary()),
        "caption": pa.array(CAPTIONS, pa.large_string()),
    },
    "lists of views": {"caption": pa.array([[c] for c in CAPTIONS], pa.list_(TEXT))},
    "large lists": {"caption": pa.array([[c] for c in CAPTIONS], pa.large_list(pa.large_string()))},
    "lists of a fixed size": {"caption": pa.array([[c] for c in CAPTIONS], pa.list_(pa.string(), 1))},
    "a struct of views": {
        "image": pa.array([{"bytes": b, "path": "x"} for b in IMAGES], pa.struct([("bytes", BYTES), ("path", TEXT)]))
    },
    "categories": {"uid": pa.array(UIDS).dictionary_encode(), "caption": pa.array(CAPTIONS).dictionary_encode()},
    "UUIDs": {"uid": pa.array([u.bytes for u in UUIDS], pa.uuid())},
    "whole uids": {"uid": pa.array([0, 1, 2, 3], pa.uint16())},
}


def write(folder: Path, name: str = "0", **changes: Any) -> str:
    folder.mkdir(exist_ok=True)
    pq.write_table(pa.table({**PLAIN, **changes}), folder / f"{name}.parquet")
    return str(folder)


@pytest.mark.parametrize("columns", TABLES.values(), ids=TABLES)
def test_every_type_of_one_content_is_read_alike(columns: dict[str, Any], tmp_path: Path) -> None:
    plain, other = write(tmp_path / "plain"), write(tmp_path / "other", **columns)
    blocks = []
    for folder in (plain, other):
        index = embedded(Path(folder))
        blocks.append(reader_of(index).read(whole(index)))
    uids = {"UUIDs": [str(u) for u in UUIDS], "whole uids": ["0", "1", "2", "3"]}
    expected = next((uids[name] for name in uids if TABLES[name] is columns), UIDS)
    assert blocks[1]["uid"].tolist() == expected
    if expected == UIDS:  # else other augmentation is drawn
        assert np.array_equal(blocks[0]["image"], blocks[1]["image"])
    assert np.array_equal(blocks[0]["text"], blocks[1]["text"])
    assert blocks[1]["valid"].all()
    rows = list(read("hf-parquet", [other], SourceOptions()))
    assert [row["uid"] for row in rows] == expected
    assert [row["image"] for row in rows] == IMAGES
    assert [
        row["caption"] if isinstance(row["caption"], str) else row["caption"][0] for row in rows if row["caption"]
    ] == CAPTIONS


def test_a_caption_column_without_a_value_costs_its_rows(tmp_path: Path) -> None:
    write(tmp_path / "set", "0")
    folder = write(tmp_path / "set", "1", uid=[f"v{k}" for k in range(4)], caption=pa.nulls(4))
    index = embedded(Path(folder))
    block = reader_of(index).read(whole(index))
    assert block["valid"].tolist() == [True] * 4 + [False] * 4
    assert set(block["reason"][4:]) == {"caption is empty"}
    assert [row["caption"] for row in read("hf-parquet", [folder], SourceOptions())][4:] == [None] * 4


@pytest.mark.parametrize("name", ["0", "9"])
def test_a_file_without_rows_is_passed_over(name: str, tmp_path: Path) -> None:
    folder = write(tmp_path / "set", "5")
    pq.write_table(pa.table({"uid": pa.nulls(0), "other": pa.nulls(0)}), tmp_path / f"set/{name}.parquet")
    assert build_index(folder, Columns()).total_rows == 4
    assert len(list(read("hf-parquet", [folder], SourceOptions()))) == 4


def test_files_without_rows_alone_are_refused(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    pq.write_table(pa.table({"uid": pa.nulls(0)}), tmp_path / "set/0.parquet")
    with pytest.raises(DataError, match="hold no rows"):
        build_index(str(tmp_path / "set"), Columns())


@pytest.mark.parametrize("labels", [[0.0, 1.0, None, 2.0], [0.0, 1.0, float("nan"), 2.0]])
def test_whole_floats_are_labels(labels: list[float | None], tmp_path: Path) -> None:
    folder = write(tmp_path / "set", label=pa.array(labels, pa.float64()))
    index = build_index(folder, Columns())
    assert index.columns.label == "label"
    assert read_shard_labels(index, 0).tolist() == [0, 1, -1, 2]
    block = reader_of(embedded(Path(folder)), with_labels=True).read(whole(index))
    assert block["label"].tolist() == [0, 1, -1, 2]
    assert [row["label"] for row in read("hf-parquet", [folder], SourceOptions())] == [0, 1, None, 2]


@pytest.mark.parametrize("first", [True, False])
def test_a_label_column_of_some_shards_counts_whichever_comes_first(first: bool, tmp_path: Path) -> None:
    with_labels, without = ("0", "1") if first else ("1", "0")
    write(tmp_path / "set", with_labels, label=[3, 4, 5, 6])
    folder = write(tmp_path / "set", without, uid=[f"v{k}" for k in range(4)])
    index = embedded(Path(folder))
    block = reader_of(index, with_labels=True).read(whole(index))
    labels = [[3, 4, 5, 6], [-1] * 4]
    assert block["label"].tolist() == [label for part in (labels if first else labels[::-1]) for label in part]
    assert [read_shard_labels(index, shard).tolist() for shard in range(2)] == (labels if first else labels[::-1])


def test_a_name_that_stands_twice_is_named(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    table = pa.Table.from_arrays(
        [pa.array(UIDS), pa.array(IMAGES), pa.array(CAPTIONS), pa.array(CAPTIONS)],
        ["uid", "image", "caption", "caption"],
    )
    pq.write_table(table, tmp_path / "set/0.parquet")
    with pytest.raises(DataError, match="column 'caption' stands twice"):
        build_index(str(tmp_path / "set"), Columns())
    with pytest.raises(ConfigError, match="column 'caption' stands twice"):
        list(read("hf-parquet", [str(tmp_path / "set")], SourceOptions()))


def test_fractions_are_no_labels_and_an_error_where_labels_are_needed(tmp_path: Path) -> None:
    folder = write(tmp_path / "set", label=[0.5, 1.0, 2.0, 0.25])
    index = build_index(folder, Columns())
    assert read_shard_labels(index, 0).tolist() == [-1, 1, 2, -1]
    with pytest.raises(DataError, match=r"the label 0\.5 is no whole number"):
        read_shard_labels(index, 0, needed=True)
    with pytest.raises(DataError, match=r"the label 0\.5 is no whole number"):
        list(read("hf-parquet", [folder], SourceOptions(columns=Columns(label="label"))))


@pytest.mark.parametrize("first", [True, False])
def test_text_under_a_usual_name_is_no_label(first: bool, tmp_path: Path) -> None:
    write(tmp_path / "set", "0" if first else "1", label=["cat"] * 4)
    folder = write(tmp_path / "set", "1" if first else "0", label=[1, 2, 3, 4])
    assert build_index(folder, Columns()).columns.label is None
    with pytest.raises(DataError, match="holds string, but the label must be a whole number"):
        build_index(folder, Columns(label="label"))


def test_a_named_label_may_be_in_any_shard(tmp_path: Path) -> None:
    write(tmp_path / "set", "0")
    folder = write(tmp_path / "set", "1", klass=[1, 2, 3, 4])
    assert build_index(folder, Columns(label="klass")).columns.label == "klass"
    with pytest.raises(DataError, match="no column 'absent'"):
        build_index(folder, Columns(label="absent"))
