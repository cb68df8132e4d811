"""Sidecars: what a locked encoder makes of each row, computed once, row for row beside each shard.

`<root>/<folder>/<key>/<shard>.parquet` has the column `uid` (string), by which a reader compares rows, and columns of vectors.
The row groups are those of the shard. The key is a hash of all that the vectors depend on. The metadata of the file holds the
whole key and the fingerprint of the shard, and a sidecar that does not match is refused. `nev.data.text_sidecar` and
`nev.data.image_sidecar` say what the vectors are.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from nev.data.index import Index
from nev.storage.files import PARALLEL_REQUESTS, atomic_file, filesystem, is_damage, join, open_parquet
from nev.storage.reading import DataError, read_column, read_errors_as_data_errors, write_errors_as_data_errors


@dataclass(frozen=True)
class Sidecars:
    """The sidecars of a set of shards under one key.

    index: the shards.
    folder: `_text` or `_image`, in the root of the set.
    key: sha256, hex.
    metadata: further entries that the metadata of each file must have.
    command: the command that writes them.
    """

    index: Index
    folder: str
    key: str
    metadata: dict[str, str]
    command: str

    def location(self, shard: int) -> str:
        """Path or URL of a shard's sidecar."""
        return join(self.index.root, self.folder, self.key[:16], self.index.paths[shard])

    @property
    def remedy(self) -> str:
        """What to do about a damaged file."""
        return f"Delete this file and write it again with `{self.command}`."

    def expected(self, shard: int) -> dict[str, str]:
        """The metadata that the sidecar of a shard must have."""
        return {"nev.key": self.key, "nev.shard": shard_fingerprint(self.index, shard), **self.metadata}

    def misaligned(self, shard: int) -> DataError:
        """Make the error for a sidecar whose rows are not those of its shard."""
        return DataError(
            f"{self.location(shard)}: its rows are not those of the shard, which changed since. {self.remedy}"
        )


def shard_fingerprint(index: Index, shard: int) -> str:
    """sha256, hex, of the rows and bytes of a shard's row groups, and of the tar that its pictures are in.

    The order of rows in a row group does not change the hash of a shard that holds its pictures.
    """
    groups = index.shard_groups(shard)
    layout = np.stack([index.group[groups], index.rows[groups], index.nbytes[groups]]).astype("<i8")
    tar = index.tars[shard]
    of_tar = f"{tar.size} {tar.stamp} {tar.digest}" if tar else ""
    return hashlib.sha256(layout.tobytes() + of_tar.encode()).hexdigest()


def read_uid_column(column: pa.ChunkedArray) -> list[str]:
    """The uid column as strings."""
    return [str(uid) for uid in column.to_pylist()]


def write_groups(
    sidecars: Sidecars,
    shard: int,
    schema: pa.Schema,
    groups: Iterable[dict[str, Sequence[object]]],
    summary: Callable[[], dict[str, str]] = dict,
) -> None:
    """Write the sidecar of a shard, complete or not at all.

    schema: of the columns; its metadata is written, too.
    groups: the columns of each row group of the shard, in order.
    summary: further metadata, computed after the last row group.
    """
    schema = schema.with_metadata({**(schema.metadata or {}), **sidecars.expected(shard)})
    location = sidecars.location(shard)
    with (
        write_errors_as_data_errors(location),
        atomic_file(location) as sink,
        pq.ParquetWriter(sink, schema, compression="none", write_statistics=False, use_dictionary=False) as writer,
    ):
        for columns in groups:
            table = pa.table(columns, schema)
            writer.write_table(table, row_group_size=max(1, len(table)))
        writer.add_key_value_metadata(summary())


def missing_sidecars(sidecars: Sidecars) -> list[int]:
    """Numbers of the shards that have no sidecar yet."""

    def is_absent(shard: int) -> bool:
        fs, path = filesystem(sidecars.location(shard))
        with read_errors_as_data_errors(sidecars.location(shard), damaged=""):
            return not fs.exists(path)

    shards = range(len(sidecars.index.paths))
    with ThreadPoolExecutor(PARALLEL_REQUESTS) as pool:
        return [shard for shard, absent in zip(shards, pool.map(is_absent, shards), strict=True) if absent]


def check_sidecars(sidecars: Sidecars, every_row: bool = False) -> list[dict[str, str]]:
    """Raise DataError for sidecars that do not match, or whose rows are not those of the shard. Returns the metadata of each.

    every_row: compare the uids of all rows. For readers that do not compare uids, because they read whole columns of vectors.
    """
    with ThreadPoolExecutor(PARALLEL_REQUESTS) as pool:
        return list(pool.map(lambda shard: _check(sidecars, shard, every_row), range(len(sidecars.index.paths))))


def sidecars_to_write(sidecars: Sidecars, is_enough: Callable[[dict[str, str]], bool] = bool) -> list[int]:
    """Numbers of the shards whose sidecar `check_sidecars` would refuse: absent, damaged, or of a shard that has changed.

    is_enough: from the metadata of a sidecar to whether it need not be written again.
    """

    def is_unfit(shard: int) -> bool:
        try:
            return not is_enough(_check(sidecars, shard))
        except DataError as error:
            cause = error.__cause__
            if cause is None or isinstance(cause, FileNotFoundError) or is_damage(cause):
                return True
            raise  # the storage does not answer, or refuses: the state of the file is not known

    shards = range(len(sidecars.index.paths))
    with ThreadPoolExecutor(PARALLEL_REQUESTS) as pool:
        return [shard for shard, unfit in zip(shards, pool.map(is_unfit, shards), strict=True) if unfit]


def read_metadata(location: str, remedy: str) -> tuple[pq.FileMetaData, dict[str, str]]:
    """The footer of a sidecar, and its metadata as strings. Raises DataError."""
    fs, path = filesystem(location)
    with read_errors_as_data_errors(location, remedy), open_parquet(fs, path) as file:
        footer = pq.read_metadata(file)
    return footer, {name.decode(): value.decode() for name, value in (footer.metadata or {}).items()}


def _check(sidecars: Sidecars, shard: int, every_row: bool = False) -> dict[str, str]:
    index, location = sidecars.index, sidecars.location(shard)
    footer, metadata = read_metadata(location, sidecars.remedy)
    for name, value in sidecars.expected(shard).items():
        if metadata.get(name) != value:
            raise DataError(
                f"{location}: {name} is {metadata.get(name)}, this run needs {value}. The shard or the encoder changed: "
                f"write it again with `{sidecars.command}`."
            )
    rows = [footer.row_group(group).num_rows for group in range(footer.num_row_groups)]
    groups = index.shard_groups(shard)
    if [rows[group] for group in index.group[groups] if group < len(rows)] != index.rows[groups].tolist():
        raise sidecars.misaligned(shard)
    # The footer of a shard with one row group does not show that the order of its rows changed. With several row groups their
    # sizes mostly show it, and the training reader compares the uids of all files that it reads.
    if len(rows) == 1 or every_row:
        uids = read_uid_column(read_column(index.location(shard), str(index.columns.uid)))
        if read_uid_column(read_column(location, "uid", sidecars.remedy)) != uids:
            raise sidecars.misaligned(shard)
    return metadata


def decode_vectors(column: pa.ChunkedArray, width: int) -> tuple[NDArray[np.float16], NDArray[np.int64]]:
    """Decode a column of vectors: vectors, float16 [n, width], and the first vector of each row, int64 [rows + 1].

    A column of one chunk is not copied.
    """
    parts = [_decode_chunk(chunk, width) for chunk in column.chunks] or [
        _decode_chunk(pa.array([], pa.binary()), width)
    ]
    if len(parts) == 1:
        return parts[0]
    before = np.cumsum([0, *(len(vectors) for vectors, _ in parts)])
    starts = [offset + ends[:-1] for offset, (_, ends) in zip(before, parts, strict=False)]
    return np.concatenate([vectors for vectors, _ in parts]), np.concatenate([*starts, before[-1:]])


def _decode_chunk(array: pa.Array, width: int) -> tuple[NDArray[np.float16], NDArray[np.int64]]:
    """As `decode_vectors`, for a binary array. The vectors share the memory of the array."""
    _, offsets, data = array.buffers()
    if data is None or offsets is None:
        return np.zeros((0, width), np.float16), np.zeros(len(array) + 1, np.int64)
    bounds = np.frombuffer(offsets, np.int32)[array.offset : array.offset + len(array) + 1].astype(np.int64)
    numbers = int(bounds[-1] - bounds[0]) // 2
    vectors = np.frombuffer(data, "<f2", numbers, int(bounds[0])).reshape(-1, width)
    return vectors, (bounds - bounds[0]) // (2 * width)
