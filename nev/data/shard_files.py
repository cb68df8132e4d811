"""Rows of parquet files and pictures of tars: the files that a reader holds open, and what is read of a row group."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from typing import Any, NamedTuple, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from nev.common.location import S3
from nev.data.tars import Tar, check_local, read_pictures
from nev.storage.files import filesystem, is_local, open_parquet
from nev.storage.reading import DataError, read_errors_as_data_errors

OPEN_FILES = 256
FOOTER_BYTES = 32 * 2**20  # of all open parquet files; parsed footers take some times as much
PAGE_ROWS = 1024  # of a column, as many writers make them: fewer are not read alone
HEAD = 0.5  # part of a row group up to which its first rows are read alone, without the rest

PARALLEL_READS = 8  # of a process
Item = TypeVar("Item")
Result = TypeVar("Result")
ObjectInfo = tuple[int, str]  # size and ETag of an object on S3, from a listing


class OpenFile(NamedTuple):
    """An open file. footer: of a parquet file, parsed; None for a tar."""

    source: Any
    footer: pq.FileMetaData | None


class ShardFiles:
    """Open parquet files with their parsed footers, and open tars.

    The least recently used are given up beyond `OPEN_FILES`, and beyond `FOOTER_BYTES` of footers. A thread that still reads one
    of these may end. Several threads may read at once, each from other files (`map_by_file`).
    """

    def __init__(self) -> None:
        self._files: OrderedDict[str, OpenFile] = OrderedDict()
        self._footer_bytes = 0
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._files)

    def __reduce__(self) -> tuple[type[ShardFiles], tuple[()]]:
        return ShardFiles, ()  # in another process, no file is open

    def read(
        self, location: str, group: int, columns: list[str], start: int, stop: int, info: ObjectInfo | None = None
    ) -> pa.Table:
        """Rows [start, stop) of a row group. Raises DataError for a file that cannot be read, or has lost rows.

        group: number of the row group in the file.
        info: of the file on S3, where it is known: no request asks for it. A file with another ETag is refused.

        The first rows of a large row group are read without the rest of it.
        """
        with read_errors_as_data_errors(
            f"{location}: row group {group}", "Write this file again, or remove it and start again."
        ):
            source, footer = self._open_shard(location, info)
            assert footer
            rows = footer.row_group(group).num_rows
            if start == 0 and reads_head(stop, rows):
                table = _read_head(source, footer, group, columns, stop)
            else:
                # A new reader each time: with `pre_buffer` a reader keeps all bytes that it has read.
                file = pq.ParquetFile(source, metadata=footer, pre_buffer=not isinstance(source, pa.MemoryMappedFile))
                table = file.read_row_group(group, columns, use_threads=False)
        if len(table) < stop:
            raise DataError(f"{location}: row group {group} has lost rows since it was indexed. Start again.")
        return table.slice(start, stop - start)

    def read_pictures(self, tar: Tar, places: pa.ChunkedArray) -> list[pa.Buffer]:
        """The encoded pictures at places of a tar. Raises DataError for a tar that cannot be read, or has changed."""
        file = self._find(tar.location) or self._keep(tar.location, OpenFile(_open_tar(tar), None))
        return read_pictures(file.source, tar, places)

    def _open_shard(self, location: str, info: ObjectInfo | None) -> OpenFile:
        if file := self._find(location):
            return file
        fs, path = filesystem(location)
        entry = {"name": path, "size": info[0], "ETag": info[1], "type": "file"} if info else None
        source = pa.memory_map(path) if is_local(fs) else open_parquet(fs, path, entry)
        return self._keep(location, OpenFile(source, pq.read_metadata(source)))

    def _find(self, location: str) -> OpenFile | None:
        with self._lock:
            if location in self._files:
                self._files.move_to_end(location)
            return self._files.get(location)

    def _keep(self, location: str, file: OpenFile) -> OpenFile:
        with self._lock:
            self._files[location] = file
            self._footer_bytes += _footer_bytes(file)
            while len(self._files) > OPEN_FILES or (self._footer_bytes > FOOTER_BYTES and len(self._files) > 1):
                _, oldest = self._files.popitem(last=False)
                self._footer_bytes -= _footer_bytes(oldest)
        return file


def map_by_file(function: Callable[[Item], Result], items: Sequence[Item], files: Sequence[str]) -> list[Result]:
    """The results for all items, in order. Different files on S3 are read at the same time: their requests wait together.

    files: the location that each item is read from. Items of one file come one after another.
    """
    positions: dict[str, list[int]] = {}
    for position, file in enumerate(files):
        positions.setdefault(file, []).append(position)

    def read(file: str) -> list[tuple[int, Result]]:
        return [(position, function(items[position])) for position in positions[file]]

    if len(positions) > 1 and any(file.startswith(S3) for file in positions):
        with ThreadPoolExecutor(min(len(positions), PARALLEL_READS)) as pool:
            parts = list(pool.map(read, positions))
    else:
        parts = [read(file) for file in positions]
    results = dict(chain.from_iterable(parts))
    return [results[position] for position in range(len(items))]


def reads_head(stop: int, rows: int) -> bool:
    """Whether the first `stop` rows of a row group of `rows` rows are read without the rest."""
    return max(stop, PAGE_ROWS) < HEAD * rows


def _footer_bytes(file: OpenFile) -> int:
    return int(file.footer.serialized_size) if file.footer else 0


def _open_tar(tar: Tar) -> pa.NativeFile:
    fs, path = filesystem(tar.location)
    if is_local(fs):
        check_local(tar)
        return pa.memory_map(path)
    info = {"name": path, "size": tar.size, "ETag": tar.stamp, "type": "file"}
    return pa.PythonFile(open_parquet(fs, path, info), mode="r")


def _read_head(source: Any, footer: pq.FileMetaData, group: int, columns: list[str], rows: int) -> pa.Table:
    """The first rows of a row group, by reads of half the bytes that these rows have in the largest column."""
    meta = footer.row_group(group)
    largest = max(meta.column(number).total_compressed_size for number in range(meta.num_columns))
    nbytes = max(2**16, largest * rows // meta.num_rows // 2)
    file = pq.ParquetFile(source, metadata=footer, pre_buffer=False, buffer_size=nbytes)
    batches = file.iter_batches(batch_size=rows, row_groups=[group], columns=columns, use_threads=False)
    return pa.Table.from_batches([next(batches)])
