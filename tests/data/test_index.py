"""The index: which shards and row groups there are, which columns, and every way in which a folder can be wrong."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from helpers.pictures import rows_of, write_shard

from nev.config.data import Columns
from nev.data.index import build_index
from nev.storage.reading import DataError

HF_IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def shards(folder: Path) -> Path:
    write_shard(folder / "b.parquet", rows_of(7), [4, 3])
    write_shard(folder / "a.parquet", rows_of(5, first=7), [5])
    return folder


def one_shard(folder: Path, *drop: str, **columns: pa.Array) -> Path:
    """One shard of three rows: uid, image and caption, without `drop`, with `columns`."""
    usual = {
        "uid": pa.array(["a", "b", "c"]),
        "image": pa.array([b"1", b"2", b"3"]),
        "caption": pa.array(["x", "y", "z"]),
    }
    kept = {name: values for name, values in (usual | columns).items() if name not in drop}
    folder.mkdir(parents=True, exist_ok=True)
    pa.parquet.write_table(pa.table(kept), folder / "a.parquet")
    return folder


def test_row_groups_are_listed_in_the_order_of_their_paths(tmp_path: Path) -> None:
    index = build_index(str(shards(tmp_path)), Columns())
    assert index.paths == ("a.parquet", "b.parquet")
    assert index.shard.tolist() == [0, 1, 1]
    assert index.group.tolist() == [0, 0, 1]
    assert index.rows.tolist() == [5, 4, 3]
    assert index.total_rows == 12
    assert (index.nbytes > 0).all()
    assert index.location(1) == str(tmp_path / "b.parquet")
    assert [index.shard_groups(shard) for shard in (0, 1)] == [slice(0, 1), slice(1, 3)]


def test_shards_in_subfolders_count_and_hidden_ones_do_not(tmp_path: Path) -> None:
    shards(tmp_path)
    write_shard(tmp_path / "more" / "c.parquet", rows_of(2), [2])
    before = build_index(str(tmp_path), Columns())
    assert before.paths == ("a.parquet", "b.parquet", "more/c.parquet")
    for hidden in ("_text/key/a.parquet", ".cache/a.parquet", "more/_tmp/a.parquet", "_part.parquet"):
        write_shard(tmp_path / hidden, rows_of(1), [1])
    (tmp_path / "classes.txt").write_text("cat\n")
    after = build_index(f"{tmp_path}/", Columns())
    assert after.paths == before.paths
    assert after.fingerprint == before.fingerprint


def test_a_link_to_a_folder_is_refused_and_one_to_a_shard_counts(tmp_path: Path) -> None:
    shards(tmp_path / "set")
    write_shard(tmp_path / "other" / "c.parquet", rows_of(2), [2])
    (tmp_path / "set/_text").mkdir()
    (tmp_path / "set/_text/key").symlink_to(tmp_path / "other")
    (tmp_path / "set/c.parquet").symlink_to(tmp_path / "other/c.parquet")
    assert build_index(str(tmp_path / "set"), Columns()).total_rows == 14
    (tmp_path / "set/more").symlink_to(tmp_path / "other")
    with pytest.raises(DataError, match=r"set/more: a link to a folder, which is not followed\. Copy"):
        build_index(str(tmp_path / "set"), Columns())


def test_the_fingerprint_is_of_the_data_not_of_its_place(tmp_path: Path) -> None:
    first = build_index(str(shards(tmp_path / "here")), Columns()).fingerprint
    shutil.copytree(tmp_path / "here", tmp_path / "there" / "deep")
    assert build_index(str(tmp_path / "there" / "deep"), Columns()).fingerprint == first

    def changed(name: str, rows: list[dict[str, Any]], groups: list[int]) -> str:
        folder = shutil.copytree(tmp_path / "here", tmp_path / name)
        write_shard(folder / "a.parquet", rows, groups)
        return build_index(str(folder), Columns()).fingerprint

    longer = [row | {"caption": row["caption"] + "!"} for row in rows_of(5, first=7)]
    (renamed := shutil.copytree(tmp_path / "here", tmp_path / "renamed")).joinpath("a.parquet").rename(
        renamed / "c.parquet"
    )
    others = {
        changed("one row more", rows_of(6, first=7), [6]),
        changed("other captions", longer, [5]),
        changed("other row groups", rows_of(5, first=7), [3, 2]),
        build_index(str(renamed), Columns()).fingerprint,
    }
    assert len(others | {first}) == 5


def test_empty_row_groups_are_passed_over(tmp_path: Path) -> None:
    write_shard(tmp_path / "a.parquet", rows_of(5), [2, 0, 3])
    index = build_index(str(tmp_path), Columns())
    assert index.rows.tolist() == [2, 3]
    assert index.group.tolist() == [0, 2]


@pytest.mark.parametrize(
    ("names", "found"),
    [
        (("uid", "image", "caption", "label"), ("uid", "image", "caption", "label")),
        (("__key__", "jpg", "txt", "cls"), ("__key__", "jpg", "txt", "cls")),
        (("id", "png", "text", "other"), ("id", "png", "text", None)),
        (("key", "webp", "captions", "other"), ("key", "webp", "captions", None)),
    ],
)
def test_usual_column_names_are_recognised(names: tuple[str, ...], found: tuple[str, ...], tmp_path: Path) -> None:
    values = [pa.array(["a"]), pa.array([b"1"]), pa.array([["x", "y"]]), pa.array([3])]
    pa.parquet.write_table(pa.table(dict(zip(names, values, strict=True))), tmp_path / "a.parquet")
    columns = build_index(str(tmp_path), Columns()).columns
    assert (columns.uid, columns.image, columns.caption, columns.label) == found


def test_named_columns_come_before_the_usual_ones(tmp_path: Path) -> None:
    one_shard(tmp_path, alt=pa.array(["x", "y", "z"]), thumb=pa.array([b"1", b"2", b"3"]), kind=pa.array([1, 2, None]))
    columns = build_index(str(tmp_path), Columns(caption="alt", image="thumb", label="kind")).columns
    assert columns == Columns(uid="uid", image="thumb", caption="alt", label="kind")


def test_the_hugging_face_image_struct_is_an_image(tmp_path: Path) -> None:
    one_shard(tmp_path, image=pa.array([{"bytes": b"1", "path": None}] * 3, HF_IMAGE))
    assert build_index(str(tmp_path), Columns()).columns.image == "image"


def test_absent_and_empty_folders_say_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"absent: no such folder\. `nev prepare` makes"):
        build_index(str(tmp_path / "absent"), Columns())
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "notes.txt").write_text("no shard")
    with pytest.raises(DataError, match=r"empty: no \.parquet shard in this folder\. Make some"):
        build_index(str(tmp_path / "empty"), Columns())
    one_shard(tmp_path / "file")
    with pytest.raises(DataError, match=r"a\.parquet: no such folder"):
        build_index(str(tmp_path / "file" / "a.parquet"), Columns())
    write_shard(tmp_path / "rowless" / "a.parquet", [], [0], pa.Table.from_pylist(rows_of(1)).schema)
    with pytest.raises(DataError, match=r"rowless: the shards hold no rows"):
        build_index(str(tmp_path / "rowless"), Columns())


@pytest.mark.parametrize("damage", ["cut short", "not parquet", "empty"])
def test_an_unreadable_shard_is_named_with_a_remedy(damage: str, tmp_path: Path) -> None:
    path = shards(tmp_path) / "b.parquet"
    whole = path.read_bytes()
    path.write_bytes({"cut short": whole[: len(whole) // 2], "not parquet": b"hello" * 50, "empty": b""}[damage])
    with pytest.raises(DataError, match=r"b\.parquet cannot be read .* delete it, or prepare"):
        build_index(str(tmp_path), Columns())


@pytest.mark.parametrize("role", ["uid", "image", "caption"])
def test_a_missing_column_is_named_with_those_that_are_there(role: str, tmp_path: Path) -> None:
    one_shard(tmp_path, role, other=pa.array([1, 2, 3]))
    with pytest.raises(DataError, match=rf"a\.parquet: no {role} column .*'other'.* data\.columns\.{role}=COLUMN"):
        build_index(str(tmp_path), Columns())
    with pytest.raises(DataError, match=rf"no column 'mine' \(data\.columns\.{role}\)"):
        build_index(str(tmp_path), Columns(**{role: "mine"}))


def test_every_shard_needs_the_columns(tmp_path: Path) -> None:
    shards(tmp_path)
    write_shard(tmp_path / "c.parquet", [{"uid": "x", "image": b"1", "text": "y"}], [1])
    with pytest.raises(DataError, match=r"c\.parquet: column \['caption'\] is missing"):
        build_index(str(tmp_path), Columns())


@pytest.mark.parametrize(
    ("role", "values"),
    [
        ("image", pa.array(["a.jpg", "b.jpg", "c.jpg"])),
        ("image", pa.array([{"path": "a"}] * 3)),
        ("caption", pa.array([1, 2, 3])),
        ("caption", pa.array([[1], [2], [3]])),
        ("label", pa.array(["cat", "dog", "cat"])),
    ],
)
def test_a_column_of_the_wrong_kind_is_refused_before_anything_starts(
    role: str, values: pa.Array, tmp_path: Path
) -> None:
    one_shard(tmp_path, mine=values)
    with pytest.raises(DataError, match=rf"a\.parquet: column 'mine' holds .* {role} must be"):
        build_index(str(tmp_path), Columns(**{role: "mine"}))


def test_words_in_a_column_called_label_are_no_labels(tmp_path: Path) -> None:
    one_shard(tmp_path, label=pa.array(["cat", "dog", "cat"]), cls=pa.array(np.array([0, 1, 0], np.int32)))
    assert build_index(str(tmp_path), Columns()).columns.label == "cls"
    one_shard(tmp_path, label=pa.array(["cat", "dog", "cat"]))
    assert build_index(str(tmp_path), Columns()).columns.label is None
