"""The third stage of `prepare`: one shard is gathered from a range of digests in every run, and written."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from nev.data.prepare.job_state import DAMAGED
from nev.data.prepare.order import Shard
from nev.data.prepare.scatter import read_batches
from nev.data.prepare.shards import shard_location, write_shard
from nev.data.rows import Row
from nev.data.uids import KEY
from nev.storage.files import PARALLEL_REQUESTS, atomic_file, filesystem, is_local
from nev.storage.reading import DataError, read_errors_as_data_errors, write_errors_as_data_errors


class GatherJob(NamedTuple):
    """The settings of the third stage.

    output: folder of the split.
    work: folder of intermediate files.
    runs: location of each run, and the position in the input of its part's first row.
    schema: of the shards.
    row_group_rows: rows of a row group.
    """

    output: str
    work: str
    runs: list[tuple[str, int]]
    schema: pa.Schema
    row_group_rows: int


def gather(shard: Shard, job: GatherJob) -> int:
    """The task: write `shard`, completely or not at all. Returns its number of rows.

    Memory holds a row group and, from S3, all bytes that are read; local runs are mapped. Raises DataError for runs that are
    damaged or cannot be read.
    """
    batches: list[pa.RecordBatch] = []
    selected: list[tuple[Any, ...]] = []
    with ThreadPoolExecutor(PARALLEL_REQUESTS) as pool:
        contents = pool.map(_read, (run for run, _ in job.runs), shard.ranges)
        for (run, first), content in zip(job.runs, contents, strict=True):
            with read_errors_as_data_errors(run, DAMAGED):
                for batch in read_batches(content):
                    digests = np.frombuffer(batch["digest"].buffers()[1], KEY, len(batch))
                    positions = first + batch["row"].to_numpy()
                    in_shard = (digests >= shard.low) & (digests <= shard.high) & ~np.isin(positions, shard.left_out)
                    (rows,) = np.nonzero(in_shard)
                    if len(rows):
                        selected.append((digests[rows], np.full(len(rows), len(batches)), rows))
                        batches.append(batch.select(job.schema.names))
    digests, batch_numbers, batch_rows = (np.concatenate(column) for column in zip(*selected, strict=True))
    if len(digests) != shard.rows:
        raise DataError(
            f"{job.work}: holds {len(digests)} rows for shard {shard.number}, not {shard.rows}. "
            "Delete it and start again with --overwrite."
        )
    order = np.argsort(digests)
    groups = (order[start : start + job.row_group_rows] for start in range(0, len(order), job.row_group_rows))
    _, work = filesystem(job.work)
    location = shard_location(job.output, shard.number)
    with write_errors_as_data_errors(location), atomic_file(location, work) as path:
        row_groups = (_take_rows(batches, batch_numbers[group], batch_rows[group]) for group in groups)
        write_shard(path, row_groups, job.schema)
    return shard.rows


def _read(run: str, span: NDArray[np.int64]) -> pa.Buffer:
    """The bytes of a run from `span[0]` to `span[1]`."""
    start, end = map(int, span)
    if start == end:
        return pa.py_buffer(b"")
    fs, path = filesystem(run)
    with read_errors_as_data_errors(run, DAMAGED):
        if not is_local(fs):
            return pa.py_buffer(fs.cat_file(path, start=start, end=end))
        with pa.memory_map(path) as file:  # the buffer keeps the mapping after the file is closed
            file.seek(start)
            return file.read_buffer(end - start)


def _take_rows(
    batches: list[pa.RecordBatch], batch_numbers: NDArray[np.int64], batch_rows: NDArray[np.int64]
) -> list[Row]:
    """Row `batch_rows[i]` of batch `batch_numbers[i]`, for each i."""
    rows: list[Any] = [None] * len(batch_numbers)
    for batch in np.unique(batch_numbers):
        (positions,) = np.nonzero(batch_numbers == batch)
        taken = batches[batch].take(pa.array(batch_rows[positions])).to_pylist()
        for position, row in zip(positions, taken, strict=True):
            rows[position] = row
    return rows


def list_runs(parts: list[tuple[list[str], int]]) -> Iterator[tuple[str, int]]:
    """All runs, each with the position in the input of its part's first row.

    parts: for each part the locations of its runs, and its number of rows.
    """
    first = 0
    for runs, rows in parts:
        yield from ((run, first) for run in runs)
        first += rows
