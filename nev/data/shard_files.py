"""Rows of parquet files and pictures of tars: the files that a reader holds open, and what is read of a row group."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from nev.data.tars import Tar, check_local, read_pictures
from nev.storage.files import filesystem, is_local, open_parquet
from nev.storage.reading import DataError, read_errors_as_data_errors

OPEN_FILES = 32  # of each kind
Opened = TypeVar("Opened", bound=tuple[Any, ...])
HEAD = 0.75  # part of a row group up to which its first rows are read alone, without the rest


class ShardFiles:
    """Open parquet files with their parsed footers, and open tars. The least recently used beyond `OPEN_FILES` are closed."""

    def __init__(self) -> None:
        self._files: OrderedDict[str, tuple[Any, pq.FileMetaData]] = OrderedDict()
        self._tars: OrderedDict[str, tuple[pa.NativeFile]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._files)

    def __reduce__(self) -> tuple[type[ShardFiles], tuple[()]]:
        return ShardFiles, ()  # in another process, no file is open

    def read(self, location: str, group: int, columns: list[str], start: int, stop: int) -> pa.Table:
        """Rows [start, stop) of a row group. Raises DataError for a file that cannot be read, or has lost rows.

        group: number of the row group in the file.

        The first rows of a large row group are read without the rest of it.
        """
        with read_errors_as_data_errors(
            f"{location}: row group {group}", "Write this file again, or remove it and start again."
        ):
            source, footer = self._open(location)
            rows = footer.row_group(group).num_rows
            if start == 0 and stop < HEAD * rows:
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
        (source,) = _use(self._tars, tar.location, lambda: (_open_tar(tar),))
        return read_pictures(source, tar, places)

    def _open(self, location: str) -> tuple[Any, pq.FileMetaData]:
        def open_shard() -> tuple[Any, pq.FileMetaData]:
            fs, path = filesystem(location)
            source = pa.memory_map(path) if is_local(fs) else open_parquet(fs, path)
            return source, pq.read_metadata(source)

        return _use(self._files, location, open_shard)


def _use(files: OrderedDict[str, Opened], location: str, open_file: Callable[[], Opened]) -> Opened:
    """The open file at a location, as the most recently used one of `files`. Its first part has `close`."""
    if location in files:
        files.move_to_end(location)
    else:
        files[location] = open_file()
        while len(files) > OPEN_FILES:
            files.popitem(last=False)[1][0].close()
    return files[location]


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
