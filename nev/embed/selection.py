"""A choice of the rows of a corpus by its vectors: by the cosine of pictures with their captions, and one of near-duplicates.

The uids of the chosen rows are a list that `nev prepare --uids` reads. A model that chooses so is a data filtering network (DFN,
arXiv 2309.17425).
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from nev.config.base import ConfigError
from nev.data.vectors import VectorSpec, list_vector_files, read_spec, read_vectors
from nev.embed.clusters import Pool
from nev.embed.duplicates import Duplicates, find_duplicates
from nev.ops.vectors import Floats
from nev.storage.files import PARALLEL_REQUESTS, atomic_file, filesystem, open_parquet
from nev.storage.reading import DataError, read_errors_as_data_errors, write_errors_as_data_errors

SHARES = (5, 25, 50, 75, 95)
UIDS = pa.schema([("uid", pa.string())])
DUPLICATES = pa.schema([("uid", pa.string()), ("duplicate_of", pa.string()), ("cosine", pa.float32())])


class Selected(NamedTuple):
    """What was chosen.

    rows: vectors in all.
    unscored: rows that are left out because they have no caption.
    below: rows that are left out because of their cosine.
    near: rows that are left out as near-duplicates.
    chosen: rows whose uid is in the list.
    least: least cosine of a chosen row. None where the cosine does not count.
    percentiles: of all cosines, at SHARES. Empty where there is none.
    duplicates: path or URL of the list of near-duplicates. None where they were not looked for.
    """

    rows: int
    unscored: int
    below: int
    near: int
    chosen: int
    least: float | None
    percentiles: list[float]
    duplicates: str | None


def select_uids(
    vectors: str,
    output: str,
    min_cosine: float | None = None,
    top_share: float | None = None,
    dedupe: float | None = None,
) -> Selected:
    """Write the uids of the chosen rows to `output`, a parquet file with the column `uid`.

    vectors: folder of vector files.
    min_cosine: least cosine of a picture with its best caption. None: no condition.
    top_share: share of the rows with captions, those of the largest cosine. None: all. Rows of an equal cosine stay together.
    dedupe: least cosine of two pictures that are near-duplicates. None: these are not looked for.
    Raises ConfigError where the vectors have no cosines, and where no row is left; DataError for files that cannot be read.
    """
    pool, cosines = read_pool(vectors)
    rows, scored = len(pool.chosen), np.isfinite(cosines)
    if not rows:
        raise ConfigError(f"{vectors}: the vector files have no rows, so there is nothing to choose from")
    least = None
    if min_cosine is not None or top_share is not None:
        if not scored.any():
            raise ConfigError(
                f"{vectors}: no picture has a cosine. Embed pictures with captions, without --no-captions; folders need "
                "--source folder-captions."
            )
        least = choose_least(cosines[scored], min_cosine, top_share)
        pool = pool._replace(chosen=scored & (cosines >= least))
    passed = int(pool.chosen.sum())
    near = None if dedupe is None else find_duplicates(pool, dedupe, np.where(scored, cosines, -np.inf))
    if near:
        pool.chosen[near.rows] = False
    chosen = int(pool.chosen.sum())
    if not chosen:
        raise ConfigError(f"{vectors}: no row of {rows:,} is left. The largest cosine is {cosines[scored].max():.4f}")
    unscored = 0 if least is None else rows - int(scored.sum())
    percentiles = np.percentile(cosines[scored], SHARES).tolist() if scored.any() else []
    duplicates = None
    if near:
        duplicates = f"{output.removesuffix('.parquet')}-duplicates.parquet"
        write_duplicates(pool, near, duplicates)
    write_uids(pool, output)
    return Selected(rows, unscored, rows - unscored - passed, passed - chosen, chosen, least, percentiles, duplicates)


def read_pool(vectors: str) -> tuple[Pool, Floats]:
    """All rows of a folder of vector files, and their cosines, float32 [rows]; NaN for a row without captions.

    Raises DataError for files of different models.
    """
    files = list_vector_files(vectors)
    with ThreadPoolExecutor(PARALLEL_REQUESTS) as pool:
        specs, parts = zip(*pool.map(_read_cosines, files), strict=True)
    if other := next((n for n, spec in enumerate(specs) if spec != specs[0]), None):
        raise DataError(f"{files[other]} and {files[0]} hold vectors of different models or forms: keep them apart")
    starts = np.cumsum([0, *map(len, parts)])
    return Pool(files, starts, np.ones(starts[-1], bool), specs[0]), np.concatenate(parts)


def _read_cosines(file: str) -> tuple[VectorSpec, Floats]:
    fs, path = filesystem(file)
    with read_errors_as_data_errors(file, "Delete the file and embed again."), open_parquet(fs, path) as raw:
        footer = pq.ParquetFile(raw)
        spec = read_spec(footer.schema_arrow, file)
        if "cosine" not in footer.schema_arrow.names:
            return spec, np.full(footer.metadata.num_rows, np.nan, np.float32)
        return spec, footer.read(["cosine"])["cosine"].to_numpy()  # null becomes NaN


def choose_least(cosines: Floats, min_cosine: float | None, top_share: float | None) -> float:
    """The least cosine of a chosen row, as float32: that of `min_cosine`, or of the last row of `top_share` if larger."""
    least = np.float32(-np.inf if min_cosine is None else min_cosine)
    if top_share is not None:
        last = len(cosines) - max(1, round(top_share * len(cosines)))
        least = max(least, np.partition(cosines, last)[last])
    return float(least)


def write_uids(pool: Pool, output: str) -> None:
    """Write the uids of the chosen rows, file by file."""
    with (
        write_errors_as_data_errors(output),
        atomic_file(output) as partial,
        pq.ParquetWriter(partial, UIDS) as writer,
    ):
        for number, file in enumerate(pool.files):
            start, stop = pool.starts[number : number + 2]
            if pool.chosen[start:stop].any():
                uids = read_vectors(file, ["uid"])["uid"]
                writer.write_table(pa.table([uids.filter(pa.array(pool.chosen[start:stop]))], UIDS))


def write_duplicates(pool: Pool, near: Duplicates, output: str) -> None:
    """Write the near-duplicates, each with the uid of the row that stays. The uids of these rows are in memory at once."""
    originals = np.unique(near.originals)
    names = pa.chunked_array([uids for uids, _ in _read_uids(pool, originals)], pa.string())
    with (
        write_errors_as_data_errors(output),
        atomic_file(output) as partial,
        pq.ParquetWriter(partial, DUPLICATES) as writer,
    ):
        for uids, some in _read_uids(pool, near.rows):
            places = np.searchsorted(originals, near.originals[some])
            columns = [uids, names.take(pa.array(places)), pa.array(near.cosines[some])]
            writer.write_table(pa.table(columns, DUPLICATES))


def _read_uids(pool: Pool, rows: NDArray[np.int64]) -> Iterator[tuple[pa.Array, slice]]:
    """The uids of some rows, which ascend; those of a file at a time, with their places in `rows`."""
    bounds = np.searchsorted(rows, pool.starts)
    for number, file in enumerate(pool.files):
        some = slice(int(bounds[number]), int(bounds[number + 1]))
        if some.start < some.stop:
            uids = read_vectors(file, ["uid"])["uid"].combine_chunks()
            yield uids.take(pa.array(rows[some] - pool.starts[number])), some
