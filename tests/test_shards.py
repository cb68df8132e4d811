"""Writing shards: layout, order, bounded memory, and that a split is whole or absent."""

import hashlib
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nev.config import ConfigError, Limits
from nev.data import shards
from nev.data.rows import Row, usable
from nev.data.shards import Layout, write_shards


def rows(count: int, **more: Any) -> list[Row]:
    made: list[Any] = [
        {"uid": f"row-{k}", "image": f"bytes of {k}".encode(), "caption": f"caption {k}", **more} for k in range(count)
    ]
    return made


def uids(paths: list[Path]) -> list[str]:
    return [uid for path in paths for uid in pq.read_table(path, columns=["uid"])["uid"].to_pylist()]


def test_rows_come_back_whole_in_row_groups_of_the_asked_size(tmp_path: Path) -> None:
    paths = write_shards(rows(50), tmp_path / "train", seed=0, layout=Layout(16, 4))
    assert [path.name for path in paths] == ["00000.parquet", "00001.parquet", "00002.parquet", "00003.parquet"]
    groups = [
        [file.row_group(k).num_rows for k in range(file.num_row_groups)]
        for file in (pq.read_metadata(path) for path in paths)
    ]
    assert groups == [[4] * 4, [4] * 4, [4] * 4, [2]]
    table = pa.concat_tables([pq.read_table(path) for path in paths])
    assert table.schema.names == ["uid", "image", "caption"]
    assert sorted(table.to_pylist(), key=lambda row: row["uid"]) == sorted(rows(50), key=lambda row: row["uid"])


def test_columns_and_how_they_are_stored(tmp_path: Path) -> None:
    made: list[Row] = [
        {"uid": "a", "image": b"x" * 100, "caption": ["one", "two"], "label": 3, "label_name": "cat"},
        {"uid": "b", "image": b"y" * 100, "caption": "three", "label": None},
    ]
    (path,) = write_shards(made, tmp_path, seed=0)
    kinds = [pa.string(), pa.binary(), pa.list_(pa.string()), pa.int64(), pa.string()]
    names = ["uid", "image", "caption", "label", "label_name"]
    assert pq.read_schema(path).equals(pa.schema(list(zip(names, kinds, strict=True))))
    captions = {row["uid"]: row["caption"] for row in pq.read_table(path).to_pylist()}
    assert captions == {"a": ["one", "two"], "b": ["three"]}
    group = pq.read_metadata(path).row_group(0)
    stored = {group.column(k).path_in_schema: group.column(k) for k in range(group.num_columns)}
    assert stored["image"].compression == "UNCOMPRESSED"
    assert stored["caption.list.element"].compression == stored["uid"].compression == "ZSTD"
    assert "RLE_DICTIONARY" not in stored["image"].encodings + stored["uid"].encodings
    assert stored["label"].statistics.null_count == 1
    assert stored["image"].statistics is None


def test_order_is_random_and_depends_on_the_seed_and_the_uids_alone(tmp_path: Path) -> None:
    first = uids(write_shards(rows(600), tmp_path / "a", seed=1))
    assert uids(write_shards(reversed(rows(600)), tmp_path / "b", seed=1)) == first
    assert uids(write_shards(rows(600), tmp_path / "c", seed=2)) != first
    at = [int(uid.removeprefix("row-")) for uid in first]
    # A random permutation has about as many rises as falls (standard deviation 7), and its halves have one mean.
    assert abs(sum(b > a for a, b in pairwise(at)) - 300) < 40
    assert abs(sum(at[:300]) / 300 - 300) < 50


def test_rows_beyond_the_memory_bound_give_the_same_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spills = []
    spill = shards._Buckets.spill
    monkeypatch.setattr(shards._Buckets, "spill", lambda self: (spills.append(self.held_bytes), spill(self)))
    made = [*rows(300, label=1), *rows(10)]
    dropped: tuple[Counter[str], Counter[str]] = (Counter(), Counter())
    held = write_shards(made, tmp_path / "a", seed=0, dropped=dropped[0])
    assert not spills
    spilt = write_shards(made, tmp_path / "b", seed=0, dropped=dropped[1], memory_bytes=60 * 1024)
    assert len(spills) == 5
    assert max(spills) < 62 * 1024
    assert dropped[0] == dropped[1] == {"duplicate uid": 10}
    assert [path.read_bytes() for path in held] == [path.read_bytes() for path in spilt]
    assert [path.name for path in (tmp_path / "b").iterdir()] == ["00000.parquet"]


def test_of_equal_uids_the_first_is_kept(tmp_path: Path) -> None:
    again: Row = {"uid": "row-1", "image": b"other", "caption": "other"}
    dropped: Counter[str] = Counter()
    (path,) = write_shards([*rows(3), again], tmp_path, seed=0, dropped=dropped)
    assert dropped == {"duplicate uid": 1}
    assert sorted(pq.read_table(path)["image"].to_pylist()) == [b"bytes of 0", b"bytes of 1", b"bytes of 2"]


def test_a_folder_with_shards_is_refused_unless_overwrite(tmp_path: Path) -> None:
    write_shards(rows(40), tmp_path, seed=0, layout=Layout(8, 8))
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match=r"already holds 5 shard\(s\).*--overwrite"):
        write_shards(rows(3), tmp_path, seed=0)
    write_shards(rows(3), tmp_path, seed=0, layout=Layout(overwrite=True))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["00000.parquet", "notes.txt"]
    (tmp_path / "foreign.parquet").write_bytes(b"")
    with pytest.raises(ConfigError, match=r"nev did not write \(foreign\.parquet"):
        write_shards(rows(3), tmp_path, seed=0, layout=Layout(overwrite=True))


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_run_that_fails_leaves_the_folder_as_it_was(tmp_path: Path, overwrite: bool) -> None:
    if overwrite:
        write_shards(rows(5), tmp_path, seed=0)
    before = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in tmp_path.iterdir()}

    def stop_while_writing(count: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_shards(rows(40), tmp_path, seed=0, layout=Layout(overwrite=overwrite), on_rows=stop_while_writing)
    assert {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in tmp_path.iterdir()} == before


def test_wrong_settings_and_empty_input_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"\(1000\) must be a positive multiple of rows per row group \(256\)"):
        write_shards(rows(3), tmp_path, seed=0, layout=Layout(rows_per_shard=1000))
    with pytest.raises(ConfigError, match="no rows to write"):
        write_shards([], tmp_path, seed=0)
    with pytest.raises(ConfigError, match="row 'row-0': needs a uid, an image and a caption"):
        write_shards(rows(1, image=None), tmp_path, seed=0)
    assert not list(tmp_path.iterdir())


def test_unusable_rows_are_counted_by_reason() -> None:
    def row(uid: str, image: bytes | None = b"x", caption: str | list[str] | None = "ok") -> Row:
        return {"uid": uid, "image": image, "caption": caption}

    made = [
        row("good"),
        row("cleaned", caption=["", " two ", None, "three"]),  # type: ignore[list-item]
        row(""),
        row("a", image=b""),
        row("b", image=None),
        row("c", image=b"x" * 11),
        row("d", caption=None),
        row("e", caption=" \n"),
        row("f", caption=[]),
        row("g", caption=[""]),
        {**row("h"), "reject": "status failed"},
    ]
    dropped: Counter[str] = Counter()
    kept = list(usable(made, dropped, Limits(max_bytes=10)))  # type: ignore[arg-type]
    assert [(row["uid"], row["caption"]) for row in kept] == [("good", ["ok"]), ("cleaned", ["two", "three"])]
    assert dropped == {
        "empty uid": 1,
        "empty image": 2,
        "image over 10 bytes": 1,
        "empty caption": 4,
        "status failed": 1,
    }
