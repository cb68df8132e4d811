"""Tars that are trained on where they lie: which tar the pictures of a shard are in, and where to find the index of tars.

The index of a tar is a shard. Its column `image` has the place of each picture, {offset, nbytes}, and its metadata name the tar
with its size and modification time or ETag. `nev prepare --in-place` writes such shards (`nev.data.prepare.in_place`).
"""

from __future__ import annotations

import fnmatch
import json
import posixpath
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from nev.common.location import S3, expand_braces
from nev.storage.files import filesystem, is_local, join
from nev.storage.reading import DataError, read_errors_as_data_errors

FOLDER = "nev-index"  # of the index, in the folder of its tars
METADATA = b"nev.tar"
PLACE = pa.struct([("offset", pa.int64()), ("nbytes", pa.int64())])
GAP_BYTES = 2**20  # between two pictures: fewer are read over, more cost a request
INDEX_AGAIN = "Run the same `nev prepare --in-place` again."


class Tar(NamedTuple):
    """A tar as it was when it was indexed.

    location: path or URL.
    size: in bytes.
    stamp: modification time in ns, or ETag.
    """

    location: str
    size: int
    stamp: str


def is_place(kind: pa.DataType) -> bool:
    """Whether a column `image` of this type has places in a tar, and no pictures."""
    return bool(pa.types.is_struct(kind) and {field.name for field in kind} == {"offset", "nbytes"})


def write_metadata(tar: Tar, folder: str, more: Mapping[str, Any]) -> dict[bytes, bytes]:
    """The metadata of the index of a tar.

    folder: that the index will lie in. A tar beside it, or above it, is named by the way from there, so both may move together.
    more: further entries.
    """
    above = tar.location.rpartition("/")[0]
    near = f"{folder}/".startswith(f"{above}/")
    location = posixpath.relpath(tar.location, folder) if near else tar.location
    return {METADATA: json.dumps({**tar._asdict(), "location": location, **more}).encode()}


def read_metadata(metadata: Mapping[bytes, bytes] | None, location: str) -> tuple[Tar, dict[str, Any]] | None:
    """The tar of a shard, and the further entries. None for a shard that holds its pictures.

    location: of the shard.
    """
    if not metadata or METADATA not in metadata:
        return None
    entries = json.loads(metadata[METADATA])
    tar = Tar(*(entries.pop(name) for name in Tar._fields))
    if not tar.location.startswith(("/", S3)):
        scheme = S3 if location.startswith(S3) else ""
        beside = join(location.removeprefix(S3).rpartition("/")[0], tar.location)
        tar = tar._replace(location=scheme + posixpath.normpath(beside))
    return tar, entries


def group_bytes(group: pq.RowGroupMetaData) -> int:
    """Bytes from the first picture of a row group of places to its last, the pictures between them that are left out included."""
    columns = {
        group.column(number).path_in_schema: group.column(number).statistics for number in range(group.num_columns)
    }
    offset, nbytes = columns["image.offset"], columns["image.nbytes"]
    return int(offset.max - offset.min + nbytes.max) if offset and offset.has_min_max else 0


def split_root(root: str) -> tuple[str, list[str]]:
    """A location of training data as a folder, and the names of tars in it: patterns, and empty for a folder."""
    folder, _, name = root.rstrip("/").rpartition("/")
    if not name.endswith(".tar"):
        return root, []
    if any(sign in folder for sign in "*?[{"):
        raise DataError(f"{root}: only the name of a tar may be a pattern. Name one folder.")
    return folder or ".", expand_braces(name)


def select_shards(root: str, paths: Iterable[str], names: Sequence[str]) -> list[str]:
    """The paths of the indexes of tars, of those with these names where names are given. Raises DataError for missing ones.

    paths: of all files in the folder `root`, relative to it.
    """
    shards = [path for path in paths if path.startswith(f"{FOLDER}/") and path.endswith(".parquet")]
    remedy = f"Index them: nev prepare --in-place --source webdataset --input {root} --output {join(root, FOLDER)}"
    if not shards:
        raise DataError(f"{root}: a folder of tars without an index of them. {remedy}")
    if not names:
        return shards
    of_tar = {path.removeprefix(f"{FOLDER}/").removesuffix(".parquet") + ".tar": path for path in shards}
    chosen: dict[str, None] = {}
    for name in names:
        matches = fnmatch.filter(of_tar, name) if any(sign in name for sign in "*?[") else [name] * (name in of_tar)
        if not matches:
            raise DataError(f"{join(root, name)}: not in the index of this folder's tars. {remedy}")
        chosen |= dict.fromkeys(of_tar[match] for match in matches)
    return sorted(chosen)


def check_tars(tars: Iterable[Tar | None]) -> None:
    """Raise DataError for a tar that is gone, or that has changed since it was indexed. On S3, each folder is listed once."""
    folders: dict[str, list[Tar]] = {}
    for tar in filter(None, tars):
        folders.setdefault(tar.location.rpartition("/")[0], []).append(tar)
    for folder, of_folder in folders.items():
        fs, path = filesystem(folder)
        with read_errors_as_data_errors(folder, damaged=""):
            there = {} if is_local(fs) else {entry["name"]: entry for entry in fs.ls(path, detail=True, refresh=True)}
        for tar in of_folder:
            if is_local(fs):
                check_local(tar)
            else:
                entry = there.get(tar.location.removeprefix(S3))
                _refuse_other(tar, (entry["size"], str(entry.get("ETag"))) if entry else None)


def check_local(tar: Tar) -> None:
    """Raise DataError for a local tar that is gone, or that has changed since it was indexed."""
    fs, path = filesystem(tar.location)
    entry = fs.info(path) if fs.exists(path) else None
    _refuse_other(tar, (entry["size"], stamp_local(path)) if entry else None)


def stamp_local(path: str) -> str:
    """The stamp of a local file: its modification time, in ns."""
    from pathlib import Path

    return str(Path(path).stat().st_mtime_ns)


def _refuse_other(tar: Tar, now: tuple[int, str] | None) -> None:
    if now is None:
        raise DataError(
            f"{tar.location}: this tar is gone since it was indexed. Bring it back, or index the others alone."
        )
    if now != (tar.size, tar.stamp):
        sizes = f"{tar.size:,} bytes then, {now[0]:,} now" if now[0] != tar.size else "of the same size"
        raise DataError(f"{tar.location}: this tar has changed since it was indexed ({sizes}). {INDEX_AGAIN}")


def read_pictures(source: pa.NativeFile, tar: Tar, places: pa.ChunkedArray) -> list[pa.Buffer]:
    """The encoded pictures at these places of an open tar. Pictures with small gaps between them are read at a time.

    Raises DataError for a tar that ends before.
    """
    table = places.combine_chunks()
    offsets, sizes = (table.field(name).to_numpy() for name in ("offset", "nbytes"))
    order = np.argsort(offsets, kind="stable")
    ends = np.maximum.accumulate(offsets[order] + sizes[order])
    first = np.flatnonzero(np.concatenate([[True], offsets[order][1:] - ends[:-1] > GAP_BYTES]))
    pictures: list[pa.Buffer] = [None] * len(offsets)
    for begin, end in zip(first, [*first[1:], len(order)], strict=True):
        rows = order[begin:end]
        base, nbytes = int(offsets[rows[0]]), int(ends[end - 1] - offsets[rows[0]])
        with read_errors_as_data_errors(tar.location, INDEX_AGAIN):
            source.seek(base)
            data = source.read_buffer(nbytes)
        if data.size < nbytes:
            raise DataError(f"{tar.location}: ends before the picture at byte {base + nbytes:,}. {INDEX_AGAIN}")
        for row in rows.tolist():
            pictures[row] = data.slice(int(offsets[row]) - base, int(sizes[row]))
    return pictures
