"""Text sidecars: the vectors of the locked text tower beside each shard (`nev.data.sidecar`).

The column `vectors` (binary) is float16 little-endian [captions of the row, D], row-major, empty where the row has no caption.
The key is a hash of the encoder (weights, tokenizer, prefix, pooling, max length) and the caption column.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from nev.data import sidecar
from nev.data.index import Index
from nev.data.rows import parse_captions
from nev.data.sidecar import Sidecars, decode_vectors, read_uid_column, write_groups
from nev.storage.files import filesystem, open_parquet
from nev.storage.reading import CUT_SHORT, DataError, read_column, read_errors_as_data_errors

FOLDER, COMMAND = "_text", "nev embed-text"
LAYOUT = 1  # version of the file's layout: another version gives another key
SCHEMA = pa.schema([("uid", pa.string()), ("vectors", pa.binary())])

Encode = Callable[[Sequence[str]], NDArray[np.float32]]


def sidecar_key(text_fingerprint: str, caption_column: str) -> str:
    """The key of the sidecars of one text tower over one caption column: sha256, hex."""
    return hashlib.sha256(f"{LAYOUT}\n{text_fingerprint}\n{caption_column}".encode()).hexdigest()


def text_sidecars(index: Index, key: str, width: int) -> Sidecars:
    """The text sidecars of a set of shards. key: of `sidecar_key`. width: D, of the vectors."""
    return Sidecars(index, FOLDER, key, {"nev.width": str(width)}, COMMAND)


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

    def columns() -> list[dict[str, Sequence[object]]]:
        rows = [[vectors[[positions[c] for c in captions]].tobytes() for captions in group] for group in groups]
        return [{"uid": names, "vectors": values} for names, values in zip(uids, rows, strict=True)]

    write_groups(text_sidecars(index, key, width), shard, SCHEMA, columns())
    return sum(len(captions) for group in groups for captions in group)


def check_sidecars(index: Index, key: str, width: int, every_row: bool = False) -> None:
    """Raise DataError for sidecars that are absent, of another encoder or width, or whose rows are not those of the shard.

    every_row: as `nev.data.sidecar.check_sidecars` has it.
    """
    sidecars = text_sidecars(index, key, width)
    if missing := sidecar.missing_sidecars(sidecars):
        raise DataError(
            f"{index.root}: {len(missing)} of {len(index.paths)} shards have no text sidecar of this encoder "
            f"(first: {index.paths[missing[0]]}). Write them with `nev embed-text --config CONFIG`, or "
            "embed the captions in the training loop with text.mode=online, which is slower."
        )
    sidecar.check_sidecars(sidecars, every_row)


def mean_vector(index: Index, key: str, width: int, captions: int = 100_000) -> NDArray[np.float32]:
    """The mean of the vectors of the first shards, up to the shard with caption number `captions`: float32 [D]."""
    sidecars = text_sidecars(index, key, width)
    total, count = np.zeros(width), 0
    for shard in range(len(index.paths)):
        vectors, _ = decode_vectors(read_column(sidecars.location(shard), "vectors", sidecars.remedy), width)
        total += vectors.sum(0, dtype=np.float64)
        count += len(vectors)
        if count >= captions:
            break
    return (total / max(1, count)).astype(np.float32)
