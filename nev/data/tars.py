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
from numpy.typing import NDArray

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
    digest: hash of the uids, captions, labels and places of its rows.
    """

    location: str
    size: int
    stamp: str
    digest: str


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
    if not {*Tar._fields, "group_bytes"} <= entries.keys():
        raise DataError(f"{location}: the index of a tar by another version. {INDEX_AGAIN}")
    tar = Tar(*(entries.pop(name) for name in Tar._fields))
    if not tar.location.startswith(("/", S3)):
        scheme = S3 if location.startswith(S3) else ""
        beside = join(location.removeprefix(S3).rpartition("/")[0], tar.location)
        tar = tar._replace(location=scheme + posixpath.normpath(beside))
    return tar, entries


def split_root(root: str) -> tuple[str, list[str]]:
    """A location of training data as a folder, and the names of tars in it, which may be patterns; none for a folder."""
    folder, _, name = root.rpartition("/")
    fs, path = filesystem(root)
    if not name.lower().endswith(".tar") or fs.isdir(path):
        return root, []
    if any(sign in folder for sign in "*?[{"):
        raise DataError(f"{root}: only the name of a tar may be a pattern. Name one folder.")
    return folder or "/", expand_braces(name)


def select_indexes(root: str, names: Sequence[str], visible: Iterable[str]) -> list[str] | None:
    """The indexes of the tars of a folder, as paths relative to its folder `nev-index`. None for a folder of shards.

    root: the folder. names: of tars, which may be patterns; empty for all tars.
    visible: paths of the files in the folder, relative to it.
    Raises DataError for a tar without an index, and for a name of no tar.
    """
    paths = set(visible)
    tars = {path for path in paths if path.lower().endswith(".tar")}
    indexes = {path.removeprefix(f"{FOLDER}/") for path in paths if path.startswith(f"{FOLDER}/")}
    indexes = {path for path in indexes if path.endswith(".parquet")}
    shards = any(path.endswith(".parquet") and FOLDER not in path.split("/")[:-1] for path in paths)
    if not names and (not tars or (shards and not indexes)):
        return None
    chosen = {tar for name in names for tar in _match(root, name, tars)} if names else tars
    missing = sorted(tar for tar in chosen if _index_of(tar) not in indexes)
    if missing:
        raise DataError(
            f"{root}: {len(missing)} of its tars have no index, such as {missing[0]}. Index them: nev prepare --in-place "
            f"--source webdataset --input {root} --output {join(root, FOLDER)}"
        )
    return sorted(map(_index_of, chosen) if names else indexes)


def _match(root: str, name: str, tars: set[str]) -> list[str]:
    """The tars of a folder with this name. name: a name, or a pattern of names."""
    if name in tars:
        return [name]
    matches = fnmatch.filter((tar for tar in tars if "/" not in tar), name)
    if not matches:
        raise DataError(f"{join(root, name)}: no such tar in this folder: correct data.train")
    return matches


def _index_of(tar: str) -> str:
    """The path of the index of a tar in `nev-index`. tar: path relative to the folder above that."""
    return tar[: -len(".tar")] + ".parquet"


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


def find_ranges(offsets: NDArray[np.int64], sizes: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The ranges of bytes that hold pictures, with small gaps between pictures in them: first bytes and ends, int64 [n].

    offsets, sizes: int64, of the pictures, in ascending order.
    """
    ends = np.maximum.accumulate(offsets + sizes)
    first = np.flatnonzero(np.concatenate([[True], offsets[1:] - ends[:-1] > GAP_BYTES]))
    return offsets[first], ends[np.append(first[1:] - 1, len(ends) - 1)]


def read_pictures(source: pa.NativeFile, tar: Tar, places: pa.ChunkedArray) -> list[pa.Buffer]:
    """The encoded pictures at these places of an open tar, which ascend. A read for each of `find_ranges`.

    Raises DataError for a tar that ends before.
    """
    table = places.combine_chunks()
    offsets, sizes = (table.field(name).to_numpy() for name in ("offset", "nbytes"))
    pictures: list[pa.Buffer] = []
    for start, end in zip(*(bounds.tolist() for bounds in find_ranges(offsets, sizes)), strict=True):
        with read_errors_as_data_errors(tar.location, INDEX_AGAIN):
            source.seek(start)
            data = source.read_buffer(end - start)
        if data.size < end - start:
            raise DataError(f"{tar.location}: ends before byte {end:,}. {INDEX_AGAIN}")
        row = len(pictures)
        while row < len(offsets) and offsets[row] < end:
            pictures.append(data.slice(int(offsets[row]) - start, int(sizes[row])))
            row += 1
    return pictures
