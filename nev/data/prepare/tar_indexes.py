"""The indexes of tars in a folder: which tars they are of, which are up to date, and what is in them."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import NamedTuple

import numpy as np
import pyarrow.parquet as pq

from nev.config.base import ConfigError
from nev.data.prepare.contact_sheet import CELLS
from nev.data.prepare.filters import Filters
from nev.data.prepare.job_state import Record, read_json, work_folder
from nev.data.rows import Row
from nev.data.shard_files import ShardFiles
from nev.data.sources.common import SourceOptions, parent_folder, relative_name, shared_folder
from nev.data.sources.input_files import File
from nev.data.tars import FOLDER, Tar, read_metadata
from nev.data.uids import Keys, hash_uids
from nev.storage.files import PARALLEL_REQUESTS, filesystem, join, list_files, open_parquet
from nev.storage.reading import CUT_SHORT, read_column, read_errors_as_data_errors, write_errors_as_data_errors

TAR, PARQUET = ".tar", ".parquet"


class IndexJob(NamedTuple):
    """The settings of a task.

    output: folder of the indexes.
    root: folder that the names of tars are relative to.
    options, filters, row_group_rows: as `index_tars` has them.
    allowed_uids: keys of the uids to keep. None: all.
    spec: hash of all options on which an index depends.
    """

    output: str
    root: str
    options: SourceOptions
    filters: Filters
    row_group_rows: int
    allowed_uids: Keys | None
    spec: str


def shard_of(file: File, job: IndexJob) -> str:
    """Path or URL of the index of a tar."""
    return join(job.output, relative_name(job.root, file.location)[: -len(TAR)] + PARQUET)


def choose_root(files: Sequence[File], output: str) -> str:
    """The folder that the names of tars are relative to: that of `nev-index`, or the deepest one that all tars are in."""
    parent, _, name = output.rpartition("/")
    if name == FOLDER and all(file.location.startswith(f"{parent}/") for file in files):
        return parent
    return shared_folder(parent_folder(file.location) for file in files)


def find_current(files: Sequence[File], job: IndexJob, overwrite: bool) -> dict[str, Record]:
    """The records of the tars whose index is there and up to date, by location.

    Raises ConfigError for other parquet files, indexes by other options, and indexes of other tars.
    """
    left = read_json(join(work_folder(job.output), "job.json"))
    if left is not None and "in_place" not in left:
        raise ConfigError(
            f"{job.output}: holds an unfinished prepare that writes shards. Finish it, or use a new folder."
        )
    names = [name for name in list_files(job.output) if name.endswith(PARQUET) and name[0] not in "._"]
    with ThreadPoolExecutor(PARALLEL_REQUESTS) as pool:
        indexes = dict(zip(names, pool.map(partial(_read_record, job.output), names), strict=True))
    by_shard = {shard_of(file, job): file for file in files}
    current, foreign = {}, []
    for name, index in indexes.items():
        file = by_shard.get(join(job.output, name))
        if index is None:
            raise ConfigError(f"{job.output}: holds other parquet files ({name}, ...). Use a new folder.")
        tar, record = index
        if file is None:
            foreign.append(name)
        elif record["spec"] != job.spec and not overwrite:
            raise ConfigError(f"{job.output}: {name} was made with other options. Use a new folder, or --overwrite.")
        elif record["spec"] == job.spec and tar[:3] == file:
            current[file.location] = record
    if foreign and not overwrite:
        raise ConfigError(
            f"{job.output}: holds the index of tars that are not in the input ({foreign[0]}, ...). --overwrite removes them."
        )
    for name in foreign:
        fs, path = filesystem(join(job.output, name))
        with write_errors_as_data_errors(name):
            fs.rm_file(path)
    return current


def _read_record(output: str, name: str) -> tuple[Tar, Record] | None:
    """The tar and the record of an index; None for another parquet file."""
    fs, path = filesystem(join(output, name))
    with read_errors_as_data_errors(join(output, name), CUT_SHORT), open_parquet(fs, path) as file:
        metadata = pq.read_metadata(file).metadata
        nbytes = fs.size(path)
    index = read_metadata(metadata, join(output, name))
    return (index[0], {**index[1], "nbytes": nbytes}) if index else None


def count_shared_uids(shards: Sequence[str]) -> int:
    """Rows whose uid comes in an earlier shard, too. 16 bytes a row are in memory."""
    with ThreadPoolExecutor(PARALLEL_REQUESTS) as pool:
        parts = pool.map(lambda shard: hash_uids(read_column(shard, "uid").to_pylist()), shards)
        keys = np.sort(np.concatenate(list(parts)))
    return int((keys[1:] == keys[:-1]).sum())


def read_first_pictures(shards: Sequence[str]) -> list[Row]:
    """The first rows of the first index with rows, with their pictures."""
    files = ShardFiles()
    for shard in shards:
        fs, path = filesystem(shard)
        with read_errors_as_data_errors(shard, CUT_SHORT), open_parquet(fs, path) as file:
            footer = pq.read_metadata(file)
        index = read_metadata(footer.metadata, shard)
        if footer.num_rows and index:
            table = files.read(shard, 0, ["uid", "image", "caption"], 0, min(CELLS, footer.row_group(0).num_rows))
            pictures = files.read_pictures(index[0], table["image"])
            rows: list[Row] = table.drop_columns("image").to_pylist()
            return [{**row, "image": picture.to_pybytes()} for row, picture in zip(rows, pictures, strict=True)]
    return []
