"""The index cache: a listing that is known opens no shard, one that differs does, and nothing wrong with it stops a run."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from helpers.pictures import rows_of, write_shard
from hypothesis import given
from hypothesis import strategies as st

from nev.config.data import Columns
from nev.data import index as index_module
from nev.data import index_cache
from nev.data.index import Index, build_index
from nev.data.tars import Tar
from nev.storage.reading import DataError


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the shards that are opened."""
    names: list[str] = []
    really = index_module.open_parquet

    def counting(fs: object, path: str, info: dict[str, object] | None = None) -> object:
        names.append(Path(path).name)
        return really(fs, path, info)

    monkeypatch.setattr(index_module, "open_parquet", counting)
    return names


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_shard(tmp_path / "set" / "a.parquet", rows_of(5), [2, 0, 3])
    write_shard(tmp_path / "set" / "more" / "b.parquet", rows_of(4, first=5), [4])
    return tmp_path / "set"


def cache_file() -> Path:
    (only,) = index_cache.cache_folder().iterdir()
    return only


def same(one: Index, other: Index) -> bool:
    arrays = ("shard", "group", "rows", "nbytes")
    return (
        (one.root, one.paths, one.columns, one.fingerprint)
        == (other.root, other.paths, other.columns, other.fingerprint)
        and all(np.array_equal(getattr(one, name), getattr(other, name)) for name in arrays)
        and all(getattr(one, name).dtype == getattr(other, name).dtype for name in arrays)
    )


def test_the_second_build_opens_no_shard_and_gives_the_same_index(folder: Path, opened: list[str]) -> None:
    first = build_index(str(folder), Columns())
    assert sorted(opened) == ["a.parquet", "b.parquet"]
    assert first.group.tolist() == [0, 2, 0]
    assert same(build_index(str(folder), Columns()), first)
    assert len(opened) == 2
    cache_file().unlink()
    assert same(build_index(str(folder), Columns()), first)
    assert len(opened) == 4


def test_over_s3_the_second_build_costs_a_listing(folder: Path, s3: object, opened: list[str]) -> None:
    from nev.storage.files import filesystem

    fs, _ = filesystem("s3://bucket")
    fs.put(str(folder), "bucket/set", recursive=True)
    first = build_index("s3://bucket/set", Columns())
    assert same(build_index("s3://bucket/set", Columns()), first)
    assert sorted(opened) == ["a.parquet", "b.parquet"]
    assert first.fingerprint == build_index(str(folder), Columns()).fingerprint
    write_shard(folder / "a.parquet", rows_of(5, first=20), [5])
    fs.put_file(str(folder / "a.parquet"), "bucket/set/a.parquet")
    assert build_index("s3://bucket/set", Columns()).rows.tolist() == [5, 4]


def test_what_changes_in_the_folder_is_seen(folder: Path, opened: list[str]) -> None:
    def reads() -> bool:
        before = len(opened)
        build_index(str(folder), Columns())
        return len(opened) > before

    assert reads()
    shard, whole = folder / "a.parquet", (folder / "a.parquet").read_bytes()
    times = shard.stat().st_atime_ns, shard.stat().st_mtime_ns
    os.utime(shard, ns=(times[0], times[1] + 1))
    assert reads()
    shard.write_bytes(whole)
    assert reads()
    copy = folder / "copy"
    copy.write_bytes(whole)
    copy.replace(shard)
    os.utime(shard, ns=times)  # same bytes, same times, another file
    assert reads()
    (folder / "more" / "b.parquet").rename(folder / "more" / "c.parquet")
    assert reads()
    (folder / "more" / "c.parquet").unlink()
    assert reads()
    assert not reads()
    (folder / "notes.txt").write_text("no shard")
    assert not reads()


def test_columns_and_layout_have_entries_of_their_own(
    folder: Path, opened: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    build_index(str(folder), Columns())
    build_index(str(folder), Columns(caption="caption"))
    assert len(opened) == 4
    monkeypatch.setattr(index_cache, "LAYOUT", index_cache.LAYOUT + 1)
    build_index(str(folder), Columns())
    assert len(opened) == 6


def test_a_damaged_entry_is_rebuilt_with_a_warning(
    folder: Path, opened: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    first = build_index(str(folder), Columns())
    whole = cache_file().read_bytes()
    middle = len(whole) // 2
    damaged = [
        b"",
        whole[:10],
        whole[:-1],
        whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :],
        b"x" * 99,
    ]
    for number, content in enumerate(damaged, start=1):
        cache_file().write_bytes(content)
        with caplog.at_level(logging.WARNING, "nev.index"):
            assert same(build_index(str(folder), Columns()), first)
        assert len(opened) == 2 + 2 * number
        assert "is damaged" in caplog.records[-1].message
        assert cache_file().read_bytes() == whole


def test_a_cache_folder_that_cannot_be_used_stops_nothing(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    first = build_index(str(folder), Columns())
    (tmp_path / "a file").write_text("not a folder")
    monkeypatch.setenv("NEV_CACHE", str(tmp_path / "a file"))
    with caplog.at_level(logging.WARNING, "nev.index"):
        assert same(build_index(str(folder), Columns()), first)
    assert "cannot be written" in caplog.records[-1].message


def test_errors_are_not_cached_and_half_an_entry_is_not_left(folder: Path, opened: list[str]) -> None:
    whole = (folder / "a.parquet").read_bytes()
    (folder / "a.parquet").write_bytes(whole[:100])
    for _ in range(2):
        with pytest.raises(DataError, match="cannot be read"):
            build_index(str(folder), Columns())
    with pytest.raises(DataError, match="no column 'mine'"):
        build_index(str(folder / "more"), Columns(caption="mine"))
    assert not index_cache.cache_folder().exists()
    (folder / "a.parquet").write_bytes(whole)
    assert build_index(str(folder), Columns()).rows.tolist() == [2, 3, 4]
    assert len(list(index_cache.cache_folder().iterdir())) == 1


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NEV_CACHE", "/own")
    assert index_cache.cache_folder() == Path("/own/index")
    monkeypatch.delenv("NEV_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert index_cache.cache_folder() == Path("/xdg/nev/index")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/someone")
    assert index_cache.cache_folder() == Path("/home/someone/.cache/nev/index")


names = st.none() | st.text(st.characters(codec="utf-8"), min_size=1)
counts = st.integers(0, 2**62)


@given(st.builds(Columns, uid=names, image=names, caption=names, label=names), st.lists(st.tuples(counts, counts)))
def test_what_is_stored_comes_back(columns: Columns, sizes: list[tuple[int, int]]) -> None:
    rows, nbytes = np.array(sizes, np.int64).reshape(-1, 2).T
    numbers = np.arange(len(rows), dtype=np.int32)
    tars = (None, Tar("s3://bucket/a.tar", 3, '"etag"', "hash"))
    index_cache.store("key", index_cache.RowGroups(columns, numbers // 3, numbers % 3, rows, nbytes, tars))
    back = index_cache.load("key")
    assert back is not None
    assert back.columns == columns
    assert back.tars == tars
    for got, put in zip(back[1:5], (numbers // 3, numbers % 3, rows, nbytes), strict=True):
        assert got.dtype == put.dtype
        assert got.tolist() == put.tolist()
    assert index_cache.load("another") is None


def test_shards_of_several_sizes_are_counted_as_their_footers_say(tmp_path: Path) -> None:
    for number, groups in enumerate([[1], [0, 2], [3, 0, 1], [0]]):
        kinds = {"uid": pa.string(), "image": pa.binary(), "caption": pa.string()}
        table = pa.table({name: pa.array(["x"] * sum(groups)).cast(kind) for name, kind in kinds.items()})
        with pa.parquet.ParquetWriter(tmp_path / f"{number}.parquet", table.schema) as writer:
            for size in groups:
                writer.write_table(table.slice(0, size), row_group_size=max(1, size))
    index = build_index(str(tmp_path), Columns())
    assert list(zip(index.shard, index.group, index.rows, strict=True)) == [(0, 0, 1), (1, 1, 2), (2, 0, 3), (2, 2, 1)]
