"""The third stage of `prepare`: one shard, picked together from its range of digests in every run."""

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
    """How a shard is made. runs: location of each run, and the place in the input of its part's first row."""

    output: str
    work: str
    runs: list[tuple[str, int]]
    schema: pa.Schema
    row_group_rows: int


def gather(shard: Shard, job: GatherJob) -> int:
    """The task: write `shard` as a whole or not at all; return its number of rows.

    In memory are a row group and, from S3, all that is read; local runs are mapped. Raises DataError for runs that are
    damaged, or can't be read.
    """
    batches: list[pa.RecordBatch] = []
    found: list[tuple[Any, ...]] = []
    with ThreadPoolExecutor(PARALLEL_REQUESTS) as pool:
        contents = pool.map(_read, (run for run, _ in job.runs), shard.ranges)
        for (run, first), content in zip(job.runs, contents, strict=True):
            with read_errors_as_data_errors(run, DAMAGED):
                for batch in read_batches(content):
                    digests = np.frombuffer(batch["digest"].buffers()[1], KEY, len(batch))
                    places = first + batch["row"].to_numpy()
                    fits = (digests >= shard.low) & (digests <= shard.high) & ~np.isin(places, shard.left_out)
                    (at,) = np.nonzero(fits)
                    if len(at):
                        found.append((digests[at], np.full(len(at), len(batches)), at))
                        batches.append(batch.select(job.schema.names))
    digests, which, at = (np.concatenate(column) for column in zip(*found, strict=True))
    if len(digests) != shard.rows:
        raise DataError(
            f"{job.work}: holds {len(digests)} rows for shard {shard.number}, not {shard.rows}. "
            "Delete it and start anew with --overwrite."
        )
    order = np.argsort(digests)
    groups = (order[start : start + job.row_group_rows] for start in range(0, len(order), job.row_group_rows))
    _, work = filesystem(job.work)
    location = shard_location(job.output, shard.number)
    with write_errors_as_data_errors(location), atomic_file(location, work) as path:
        write_shard(path, (_rows(batches, which[group], at[group]) for group in groups), job.schema)
    return shard.rows


def _read(run: str, span: NDArray[np.int64]) -> pa.Buffer:
    """Some bytes of a run."""
    start, end = map(int, span)
    if start == end:
        return pa.py_buffer(b"")
    fs, path = filesystem(run)
    with read_errors_as_data_errors(run, DAMAGED):
        if not is_local(fs):
            return pa.py_buffer(fs.cat_file(path, start=start, end=end))
        with pa.memory_map(path) as file:  # closed, it leaves the mapping to the buffer
            file.seek(start)
            return file.read_buffer(end - start)


def _rows(batches: list[pa.RecordBatch], which: NDArray[np.int64], at: NDArray[np.int64]) -> list[Row]:
    """The rows at the places `at` of the batches `which`."""
    rows: list[Any] = [None] * len(which)
    for batch in np.unique(which):
        (places,) = np.nonzero(which == batch)
        for place, row in zip(places, batches[batch].take(pa.array(at[places])).to_pylist(), strict=True):
            rows[place] = row
    return rows


def list_runs(parts: list[tuple[list[str], int]]) -> Iterator[tuple[str, int]]:
    """(location, place in the input of the part's first row) of all runs, from (locations of its runs, rows) of each part."""
    first = 0
    for runs, rows in parts:
        yield from ((run, first) for run in runs)
        first += rows
