"""Row groups of a window on S3 are read at the same time: what is read is the same, and a file is read by one thread."""

from __future__ import annotations

import threading
import time
from collections import Counter
from pathlib import Path

import pytest
from helpers.tars_in_place import index_folder, write_tars

from nev.config.data import Columns
from nev.data.index import build_index
from nev.data.shard_files import PARALLEL_READS, map_by_file


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


def test_an_error_of_a_thread_is_raised() -> None:
    def read(position: int) -> int:
        if position == 2:
            raise ValueError("lost")
        return position

    with pytest.raises(ValueError, match="lost"):
        map_by_file(read, range(4), ["s3://b/a", "s3://b/b", "s3://b/c", "s3://b/d"])
