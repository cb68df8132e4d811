"""Text sidecars: the vectors of the locked text tower, computed once, row for row beside each shard.

`<root>/_text/<key>/<shard>.parquet` has two columns. `uid` (string) lets the reader compare rows. `vectors` (binary) is float16
little-endian [captions of the row, D], row-major, empty where the row has no caption. The row groups are those of the shard. The
key is a hash of the encoder (weights, tokenizer, prefix, pooling, max length) and the caption column. The metadata of the file
holds the whole key and the fingerprint of the shard, and a sidecar that does not match is refused.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from nev.data.index import Index
from nev.data.rows import parse_captions
from nev.storage.files import PARALLEL_REQUESTS, atomic_file, filesystem, is_damage, join, open_parquet
from nev.storage.reading import (
    CUT_SHORT,
    DataError,
    read_column,
    read_errors_as_data_errors,
    write_errors_as_data_errors,
)

WRITE_AGAIN = "Delete this file and write it again with `nev embed-text`."
FOLDER = "_text"
LAYOUT = 1  # version of the file's layout: another version gives another key

Encode = Callable[[Sequence[str]], NDArray[np.float32]]


def sidecar_key(text_fingerprint: str, caption_column: str) -> str:
    """The key of the sidecars of one text tower over one caption column: sha256, hex."""
    return hashlib.sha256(f"{LAYOUT}\n{text_fingerprint}\n{caption_column}".encode()).hexdigest()


def sidecar_location(index: Index, shard: int, key: str) -> str:
    """Path or URL of a shard's sidecar."""
    return join(index.root, FOLDER, key[:16], index.paths[shard])


def shard_fingerprint(index: Index, shard: int) -> str:
    """sha256, hex, of the rows and bytes of a shard's row groups. The order of rows in a row group does not change the hash."""
    groups = index.shard_groups(shard)
    layout = np.stack([index.group[groups], index.rows[groups], index.nbytes[groups]]).astype("<i8")
    return hashlib.sha256(layout.tobytes()).hexdigest()


def read_uid_column(column: pa.ChunkedArray) -> list[str]:
    """The uid column as strings."""
    return [str(uid) for uid in column.to_pylist()]


def write_sidecar(index: Index, shard: int, key: str, width: int, encode: Encode) -> int:
    """Embed the captions of a shard and write its sidecar, complete or not at all. Returns the number of captions."""
    uid, caption = index.columns.uid, index.columns.caption
    source_fs, source_path = filesystem(index.location(shard))
    with read_errors_as_data_errors(index.location(shard), CUT_SHORT), open_parquet(source_fs, source_path) as source:
        shard_file = pq.ParquetFile(source, pre_buffer=True)
        if shard_file.metadata.num_rows != int(index.rows[index.shard_groups(shard)].sum()):
            raise DataError(f"{index.location(shard)}: the shard changed since it was indexed. Start again.")
        tables = [shard_file.read_row_group(group, [uid, caption]) for group in range(shard_file.num_row_groups)]
    uids = [read_uid_column(table[uid]) for table in tables]
    groups = [[parse_captions(value) for value in table[caption].to_pylist()] for table in tables]
    distinct = sorted({caption for group in groups for captions in group for caption in captions})
    vectors = encode(distinct).astype("<f2") if distinct else np.zeros((0, width), "<f2")
    if vectors.shape != (len(distinct), width):
        raise ValueError(f"the text tower gave {vectors.shape} for {len(distinct)} captions of width {width}")
    positions = {caption: position for position, caption in enumerate(distinct)}

    metadata = {"nev.key": key, "nev.shard": shard_fingerprint(index, shard), "nev.width": str(width)}
    schema = pa.schema([("uid", pa.string()), ("vectors", pa.binary())], metadata=metadata)
    location = sidecar_location(index, shard, key)
    with (
        write_errors_as_data_errors(location),
        atomic_file(location) as sink,
        pq.ParquetWriter(sink, schema, compression="none", write_statistics=False) as writer,
    ):
        for names, group in zip(uids, groups, strict=True):
            rows = [vectors[[positions[caption] for caption in captions]].tobytes() for captions in group]
            writer.write_table(pa.table({"uid": names, "vectors": rows}, schema), row_group_size=max(1, len(rows)))
    return sum(len(captions) for group in groups for captions in group)


def missing_sidecars(index: Index, key: str) -> list[int]:
    """Numbers of the shards that have no sidecar under this key yet."""

    def is_absent(shard: int) -> bool:
        fs, path = filesystem(sidecar_location(index, shard, key))
        with read_errors_as_data_errors(sidecar_location(index, shard, key), damaged=""):
            return not fs.exists(path)

    with ThreadPoolExecutor(PARALLEL_REQUESTS) as pool:
        return [shard for shard, absent in enumerate(pool.map(is_absent, range(len(index.paths)))) if absent]


def check_sidecars(index: Index, key: str, width: int, every_row: bool = False) -> None:
    """Raise DataError for sidecars that are absent, of another encoder or width, or whose rows are not those of the shard.

    every_row: compare the uids of all rows. For readers that do not compare uids, because they read whole vector columns.
    """
    if missing := missing_sidecars(index, key):
        raise DataError(
            f"{index.root}: {len(missing)} of {len(index.paths)} shards have no text sidecar of this encoder "
            f"(first: {index.paths[missing[0]]}). Write them with `nev embed-text --config CONFIG`, or "
            "embed the captions in the training loop with text.mode=online, which is slower."
        )

    with ThreadPoolExecutor(PARALLEL_REQUESTS) as pool:
        list(pool.map(lambda shard: _check(index, shard, key, width, every_row), range(len(index.paths))))


def sidecars_to_write(index: Index, key: str, width: int) -> list[int]:
    """Numbers of the shards whose sidecar `check_sidecars` would refuse: absent, damaged, or of a shard that has changed."""

    def is_unfit(shard: int) -> bool:
        try:
            _check(index, shard, key, width)
        except DataError as error:
            cause = error.__cause__
            if cause is None or isinstance(cause, FileNotFoundError) or is_damage(cause):
                return True
            raise  # the storage does not answer, or refuses: the state of the file is not known
        return False

    with ThreadPoolExecutor(PARALLEL_REQUESTS) as pool:
        return [shard for shard, unfit in enumerate(pool.map(is_unfit, range(len(index.paths)))) if unfit]


def _check(index: Index, shard: int, key: str, width: int, every_row: bool = False) -> None:
    location = sidecar_location(index, shard, key)
    fs, path = filesystem(location)
    with read_errors_as_data_errors(location, WRITE_AGAIN), open_parquet(fs, path) as file:
        footer = pq.read_metadata(file)
    metadata = {name.decode(): value.decode() for name, value in (footer.metadata or {}).items()}
    expected = {"nev.key": key, "nev.shard": shard_fingerprint(index, shard), "nev.width": str(width)}
    for name, value in expected.items():
        if metadata.get(name) != value:
            raise DataError(
                f"{location}: {name} is {metadata.get(name)}, this run needs {value}. The shard or the encoder changed: "
                "write it again with `nev embed-text`."
            )
    rows = [footer.row_group(group).num_rows for group in range(footer.num_row_groups)]
    groups = index.shard_groups(shard)
    if [rows[group] for group in index.group[groups] if group < len(rows)] != index.rows[groups].tolist():
        raise misaligned_error(location)
    # The footer of a shard with one row group does not show that the order of its rows changed. With several row groups their
    # sizes mostly show it, and the training reader compares the uids of the rows that it reads.
    if len(rows) == 1 or every_row:
        uids = read_uid_column(read_column(index.location(shard), str(index.columns.uid)))
        if read_uid_column(read_column(location, "uid", WRITE_AGAIN)) != uids:
            raise misaligned_error(location)


def mean_vector(index: Index, key: str, width: int, captions: int = 100_000) -> NDArray[np.float32]:
    """The mean of the vectors of the first shards, up to the shard with caption number `captions`: float32 [D]."""
    total, count = np.zeros(width), 0
    for shard in range(len(index.paths)):
        vectors, _ = decode_vectors(read_column(sidecar_location(index, shard, key), "vectors", WRITE_AGAIN), width)
        total += vectors.sum(0, dtype=np.float64)
        count += len(vectors)
        if count >= captions:
            break
    return (total / max(1, count)).astype(np.float32)


def misaligned_error(location: str) -> DataError:
    """Make the error for a sidecar whose rows are not those of its shard."""
    return DataError(f"{location}: its rows are not those of the shard, which changed since. {WRITE_AGAIN}")


def decode_vectors(column: pa.ChunkedArray, width: int) -> tuple[NDArray[np.float16], NDArray[np.int64]]:
    """Decode the `vectors` column: vectors, float16 [captions, D], and the first vector of each row, int64 [rows + 1].

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
