"""The cache of the index: row groups in the user's cache folder, under a hash of the listing of the shards.

A later process that finds the same listing (paths, sizes, and modification times or S3's ETags) opens no shard. A cache file is
a SHA-256 and the parquet table that it is the hash of. Files are written completely or not at all, and may be deleted.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from nev.config.data import Columns
from nev.data.tars import Tar
from nev.storage.files import is_local

LAYOUT = 3  # version of the stored table and of the way it is read from footers
DIGEST_BYTES = 32
ARRAYS = ("shard", "group", "rows", "nbytes")

log = logging.getLogger("nev.index")


class RowGroups(NamedTuple):
    """The row groups in the footers; fields as in `nev.data.index.Index`."""

    columns: Columns
    shard: NDArray[np.int32]
    group: NDArray[np.int32]
    rows: NDArray[np.int64]
    nbytes: NDArray[np.int64]
    tars: tuple[Tar | None, ...]


def cache_folder(kind: str = "index") -> Path:
    """`$NEV_CACHE/KIND`, else `$XDG_CACHE_HOME/nev/KIND`, else `~/.cache/nev/KIND`."""
    if folder := os.environ.get("NEV_CACHE"):
        return Path(folder, kind)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "nev", kind)


def listing_key(
    fs: Any, base: str, columns: Columns, paths: Sequence[str], entries: dict[str, dict[str, Any]]
) -> str | None:
    """The cache key of a listing. None for storage that has neither modification times nor ETags.

    paths: relative to `base`.
    entries: as `fs.find(detail=True)` returns them, by path.
    Raises OSError for a local file that no longer exists.
    """
    stamps: list[Any] = []
    for path in paths:
        if is_local(fs):  # fsspec's mtime is a float, which is too coarse
            stat = Path(base, path).stat()
            stamps.append([path, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino])
        elif etag := entries[path].get("ETag"):
            stamps.append([path, entries[path]["size"], etag])
        else:
            return None
    return hashlib.sha256(json.dumps([LAYOUT, base, columns.model_dump(), stamps]).encode()).hexdigest()


def load(key: str) -> RowGroups | None:
    """The row groups stored under a key, or None. A damaged or unreadable file is logged as a warning."""
    path = cache_folder() / key
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        log.warning("%s cannot be read (%s): the index is built from the shards", path, error)
        return None
    body = memoryview(content)[DIGEST_BYTES:]
    if hashlib.sha256(body).digest() != content[:DIGEST_BYTES]:
        log.warning("%s is damaged: the index is built from the shards again", path)
        return None
    table = pq.read_table(pa.BufferReader(pa.py_buffer(body)))
    columns = Columns(**json.loads(table.schema.metadata[b"columns"]))
    tars = tuple(tar and Tar(*tar) for tar in json.loads(table.schema.metadata[b"tars"]))
    shard, group, rows, nbytes = (table[name].to_numpy() for name in ARRAYS)
    return RowGroups(columns, shard, group, rows, nbytes, tars)


def store(key: str, groups: RowGroups) -> None:
    """Store row groups under a key. A failed write is logged as a warning, because a run does not need the cache."""
    metadata = {"columns": json.dumps(groups.columns.model_dump()), "tars": json.dumps(groups.tars)}
    table = pa.table({name: getattr(groups, name) for name in ARRAYS}).replace_schema_metadata(metadata)
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    body = sink.getvalue()
    folder = cache_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".writing-") as temporary:
            part = Path(temporary, key)
            with part.open("wb") as file:
                file.write(hashlib.sha256(body).digest())
                file.write(body)
            part.replace(folder / key)
    except OSError as error:
        log.warning("%s cannot be written (%s): the next process reads the shards again", folder, error)
