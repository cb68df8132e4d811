"""Row groups of a window on S3 are read at the same time: what is read is the same, and a file is read by one thread."""

from __future__ import annotations

import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers.tars_in_place import index_folder, write_tars

from nev.config.data import Columns, Limits
from nev.data.block import BlockReader
from nev.data.block_plan import Segment
from nev.data.index import build_index
from nev.data.mixture_reader import make_mixture_reader
from nev.data.shard_files import PARALLEL_READS, ShardFiles, map_by_file
from nev.storage.files import filesystem


@pytest.mark.parametrize("root", ["s3://bucket", "/folder"])
def test_files_are_read_at_the_same_time_on_s3_alone(root: str) -> None:
    files = [f"{root}/{name}" for name in "abacbadefghij"]
    reading, most, together = Counter[str](), 0, Counter[str]()
    lock = threading.Lock()

    def read(position: int) -> str:
        nonlocal most
        file = files[position]
        with lock:
            reading[file] += 1
            together[file] = max(together[file], reading[file])
            most = max(most, sum(reading.values()))
        time.sleep(0.01)
        with lock:
            reading[file] -= 1
        return f"{position} of {file}"

    results = map_by_file(read, range(len(files)), files)
    assert results == [f"{position} of {file}" for position, file in enumerate(files)]
    assert set(together.values()) == {1}
    assert most == (PARALLEL_READS if root.startswith("s3") else 1)


def test_two_indexes_of_a_tar_are_one_file(tmp_path: Path) -> None:
    """Threads that read one open tar would mix up its bytes."""
    write_tars(tmp_path / "set", 1)
    places = [str(tmp_path / "set"), str(tmp_path / "elsewhere")]
    for output in (None, places[1]):
        index_folder(places[0], output)
    indexes = [build_index(place, Columns()) for place in places]
    assert indexes[0].location(0) != indexes[1].location(0)
    assert {index.file_of(0) for index in indexes} == {index.tars[0].location for index in indexes}
    assert len({index.file_of(0) for index in indexes}) == 1


def write_shards(root: str, count: int) -> BlockReader:
    """The reader of `count` shards of two row groups."""
    fs, path = filesystem(root)
    for shard in range(count):
        rows = range(16)
        table = pa.table(
            {
                "uid": [f"{root}-{shard}-{row}" for row in rows],
                "image": [b"picture"] * 16,
                "caption": ["a caption"] * 16,
            }
        )
        sink = pa.BufferOutputStream()
        pq.write_table(table, sink, row_group_size=8)
        fs.pipe_file(f"{path}/{shard}.parquet", sink.getvalue().to_pybytes())
    return BlockReader(build_index(root, Columns()), 32, Limits(), 0, None)


@pytest.mark.parametrize("several", [False, True])
def test_a_window_on_s3_is_read_by_several_threads(s3: object, several: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of one set, and of two. Each row is where it belongs."""
    first, second = write_shards("s3://bucket/first", 3), write_shards("s3://bucket/second", 1)
    reader = make_mixture_reader([first, second]) if several else first
    groups = [0, 6, 2, 7, 5] if several else [0, 4, 2, 3, 1]
    uids = [
        f"s3://bucket/{name}-{group // 2}-{row}"
        for name, group in (("second", group - 6) if group > 5 else ("first", group) for group in groups)
        for row in range(group % 2 * 8, group % 2 * 8 + 8)
    ]
    read, lock, reading, most = ShardFiles.read, threading.Lock(), 0, 0

    def counted(self: ShardFiles, *args: Any, **kwargs: Any) -> pa.Table:
        nonlocal reading, most
        with lock:
            reading += 1
            most = max(most, reading)
        time.sleep(0.05)
        table = read(self, *args, **kwargs)
        with lock:
            reading -= 1
        return table

    monkeypatch.setattr(ShardFiles, "read", counted)
    loaded = reader.load([Segment(group, 0, 8) for group in groups])
    assert loaded.columns["uid"].tolist() == uids
    assert most == (4 if several else 3), "the files of these row groups"


def test_an_error_of_a_thread_is_raised() -> None:
    def read(position: int) -> int:
        if position == 2:
            raise ValueError("lost")
        return position

    with pytest.raises(ValueError, match="lost"):
        map_by_file(read, range(4), ["s3://b/a", "s3://b/b", "s3://b/c", "s3://b/d"])
