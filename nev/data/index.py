"""The index: every row group of a folder of parquet shards, read from the footers alone.

The fingerprint is a hash of relative paths, row groups, rows and bytes, and of the rows of tars. It does not depend on the folder
or bucket, so a copy of a data set is the same data. The result is cached (`nev/data/index_cache.py`).
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from nev.common.location import absolute_location
from nev.config.data import Columns
from nev.data import index_cache, tars
from nev.data.column_types import NEEDED, fits
from nev.data.index_cache import RowGroups
from nev.data.shard_files import ObjectInfo
from nev.data.tars import Tar
from nev.storage.files import PARALLEL_REQUESTS, filesystem, list_entries, open_parquet
from nev.storage.reading import CUT_SHORT, DataError, read_errors_as_data_errors

WORK_FOLDER = "_prepare"  # the folder of `prepare`'s intermediate files, until a split is complete
LINKED_FOLDER = "a link to a folder, which is not followed. Copy that folder here, or link its files one by one."

KNOWN_NAMES = {
    "uid": ("uid", "key", "__key__", "id"),
    "image": ("image", "jpg", "jpeg", "png", "webp", "img", "bytes"),
    "caption": ("caption", "captions", "text", "txt"),
    "label": ("label", "cls", "class"),
}


@dataclass(frozen=True)
class Index:
    """The G row groups that hold rows, in the order of (path, row group).

    root: folder or URL.
    paths: paths of the shards, relative to `root`.
    shard: int32 [G], position in `paths`.
    group: int32 [G], number of the row group in its shard.
    rows: int64 [G], number of rows.
    nbytes: int64 [G], size in bytes.
    columns: column names. Only `label` may be None; a shard may lack its column.
    fingerprint: sha256, hex.
    tars: for each shard, the tar that its pictures lie in; None for a shard that holds its pictures.
    objects: size and ETag of the parquet files on S3, sidecars among them, by their path relative to `root`.
    """

    root: str
    paths: tuple[str, ...]
    shard: NDArray[np.int32]
    group: NDArray[np.int32]
    rows: NDArray[np.int64]
    nbytes: NDArray[np.int64]
    columns: Columns
    fingerprint: str
    tars: tuple[Tar | None, ...]
    objects: dict[str, ObjectInfo]

    @property
    def total_rows(self) -> int:
        """Rows in all shards."""
        return int(self.rows.sum())

    def shard_groups(self, shard: int) -> slice:
        """The row groups of a shard, as positions in the index."""
        first, end = np.searchsorted(self.shard, [shard, shard + 1])
        return slice(int(first), int(end))

    def location(self, shard: int) -> str:
        """Path or URL of a shard."""
        return f"{self.root.rstrip('/')}/{self.paths[shard]}"

    def file_of(self, group: int) -> str:
        """Path or URL of the file with the pictures of a row group: its shard, or a tar, which another index may share."""
        shard = int(self.shard[group])
        tar = self.tars[shard]
        return tar.location if tar else self.location(shard)

    def object_info(self, location: str) -> ObjectInfo | None:
        """Size and ETag of a shard or sidecar on S3, where it was there when the set was indexed."""
        return self.objects.get(location.removeprefix(f"{self.root.rstrip('/')}/"))


def build_index(root: str, columns: Columns) -> Index:
    """Index the shards (`*.parquet`) of a folder or `s3://` prefix. Names that begin with `_` or `.` are ignored.

    root: also a folder of tars, or a pattern of tars in a folder, with their index in its folder `nev-index`.

    Footers are read once per listing (`nev/data/index_cache.py`). An error is never cached.
    Raises DataError where the folder cannot be listed, `prepare` has not finished it, it holds a link to a folder, or it has no
    shard or no row; where a footer cannot be read or a column is missing; and for a tar that is gone or has changed.
    """
    root, names = tars.split_root(absolute_location(root))
    fs, base = filesystem(root)
    base = base.rstrip("/")
    with read_errors_as_data_errors(root, damaged=""):
        if not fs.isdir(base):
            raise DataError(f"{root}: no such folder. `nev prepare` makes the shards of a set.")
        entries = {path[len(base) :].lstrip("/"): entry for path, entry in list_entries(fs, base).items()}
    if any(WORK_FOLDER in path.split("/")[:-1] for path in entries):
        raise DataError(f"{root}: not finished (there is a folder {WORK_FOLDER}): run the same prepare command again.")
    visible = {path for path in entries if not any(part.startswith(("_", ".")) for part in path.split("/"))}
    if linked := next(
        (path for path in sorted(visible) if entries[path].get("islink") and fs.isdir(f"{base}/{path}")), None
    ):
        raise DataError(f"{root}/{linked}: {LINKED_FOLDER}")
    indexes = tars.select_indexes(root, names, visible)
    if indexes is not None:
        root, base = f"{root.rstrip('/')}/{tars.FOLDER}", f"{base}/{tars.FOLDER}"
        inside = f"{tars.FOLDER}/"
        entries = {path.removeprefix(inside): entry for path, entry in entries.items() if path.startswith(inside)}
    relative = sorted(path for path in visible if path.endswith(".parquet")) if indexes is None else indexes
    if not relative:
        raise DataError(f"{root}: no .parquet shard in this folder. Make some with `nev prepare --help`.")
    with read_errors_as_data_errors(root, damaged=""):
        key = index_cache.listing_key(fs, base, columns, relative, entries)
    groups = index_cache.load(key) if key else None
    if groups is None:
        groups = _read_footers(fs, root, base, columns, relative, entries)
        if key:
            index_cache.store(key, groups)
    tars.check_tars(groups.tars)
    digest = hashlib.sha256(json.dumps(relative).encode())
    for part in (groups.shard, groups.group, groups.rows, groups.nbytes):
        digest.update(part.astype("<i8", copy=False).data)
    digest.update("".join(tar.digest for tar in groups.tars if tar).encode())
    files = {path: entry for path, entry in entries.items() if path.endswith(".parquet") and entry.get("ETag")}
    return Index(
        root=root,
        paths=tuple(relative),
        fingerprint=digest.hexdigest(),
        objects={path: (entry["size"], entry["ETag"]) for path, entry in files.items()},
        **groups._asdict(),
    )


def _read_footers(
    fs: Any, root: str, base: str, columns: Columns, relative: list[str], entries: dict[str, dict[str, Any]]
) -> RowGroups:
    """The row groups of all shards that hold rows. Raises DataError as `build_index` does."""

    def footer(path: str) -> tuple[pa.Schema, NDArray[np.int64], Tar | None]:
        """Schema, rows and bytes of each row group, int64 [row groups, 2], and the tar of the pictures.

        The footer is much larger, and is not stored.
        """
        with (
            read_errors_as_data_errors(f"{root.rstrip('/')}/{path}", CUT_SHORT),
            open_parquet(fs, f"{base}/{path}", entries[path]) as file,
        ):
            meta = pq.read_metadata(file)
        sizes = [(part.num_rows, part.total_byte_size) for part in map(meta.row_group, range(meta.num_row_groups))]
        counts = np.array(sizes, np.int64).reshape(-1, 2)
        schema, tar = meta.schema.to_arrow_schema(), None
        if of_tar := tars.read_metadata(meta.metadata, f"{root.rstrip('/')}/{path}"):
            tar = of_tar[0]
            counts[:, 1] += np.array(of_tar[1]["group_bytes"], np.int64)
        return schema, counts, tar

    with ThreadPoolExecutor(PARALLEL_REQUESTS) as pool:
        schemas, sizes, of_shards = zip(*pool.map(footer, relative), strict=True)

    for path, schema in zip(relative, schemas, strict=True):
        _refuse_twice(schema, f"{root.rstrip('/')}/{path}")
    # The columns of a file without rows, such as an empty frame of pandas, have no types.
    with_rows = [
        (path, schema) for path, schema, size in zip(relative, schemas, sizes, strict=True) if size[:, 0].any()
    ]
    if not with_rows:
        raise DataError(f"{root}: the shards hold no rows.")
    first = f"{root.rstrip('/')}/{with_rows[0][0]}"
    resolved = resolve_columns(with_rows[0][1], columns, first)
    label = _find_label([schema for _, schema in with_rows], columns.label)
    if columns.label and not label:
        raise DataError(f"{first}: no column {columns.label!r} (data.columns.label), here and in the other shards.")
    resolved = resolved.model_copy(update={"label": label})
    in_tars = {path for path, tar in zip(relative, of_shards, strict=True) if tar}
    for path, schema in with_rows:
        where = f"{root.rstrip('/')}/{path}"
        needed = {resolved.uid, resolved.image, resolved.caption}
        if missing := sorted(str(name) for name in needed if name not in schema.names):
            raise DataError(f"{where}: column {missing} is missing; the first shard has it.")
        _check_types(schema, resolved, where, path in in_tars)

    rows, nbytes = np.concatenate(sizes).T
    filled = rows > 0
    counts = [len(part) for part in sizes]
    return RowGroups(
        columns=resolved,
        shard=np.repeat(np.arange(len(counts), dtype=np.int32), counts)[filled],
        group=np.concatenate([np.arange(count, dtype=np.int32) for count in counts])[filled],
        rows=rows[filled],
        nbytes=nbytes[filled],
        tars=of_shards,
    )


def resolve_columns(schema: pa.Schema, columns: Columns, where: str) -> Columns:
    """Replace the names that are None by usual names that the schema has; but the label's, which any shard may have.

    Raises DataError for a missing column.
    """
    names: dict[str, str | None] = {"label": columns.label}
    for role in ("uid", "image", "caption"):
        known, wanted = KNOWN_NAMES[role], getattr(columns, role)
        if wanted is not None and wanted not in schema.names:
            raise DataError(f"{where}: no column {wanted!r} (data.columns.{role}); the file has {schema.names}.")
        names[role] = wanted or next((name for name in known if name in schema.names), None)
        if names[role] is None:
            raise DataError(
                f"{where}: no {role} column among {list(known)}; the file has {schema.names}. "
                f"Name it with data.columns.{role}=COLUMN."
            )
    return Columns(**names)


def _find_label(schemas: list[pa.Schema], wanted: str | None) -> str | None:
    """The column of labels: the one that is named, or a usual name that has numbers wherever it is. None: no shard has one.

    `class` often names a column of text.
    """
    if wanted:
        return wanted if any(wanted in schema.names for schema in schemas) else None
    for name in KNOWN_NAMES["label"]:
        kinds = [schema.field(name).type for schema in schemas if name in schema.names]
        if kinds and all(fits("label", kind) for kind in kinds) and not all(map(pa.types.is_null, kinds)):
            return name
    return None


def _check_types(schema: pa.Schema, columns: Columns, where: str, in_tar: bool) -> None:
    if tars.is_place(schema.field(columns.image).type) and not in_tar:
        raise DataError(f"{where}: has places of pictures in a tar, and its metadata name no tar. {tars.INDEX_AGAIN}")
    for role in ("uid", "image", "caption", "label"):
        name = getattr(columns, role)
        if not name or name not in schema.names:  # of the label alone: `_read_footers` has checked the others
            continue
        if not fits(role, schema.field(name).type):
            raise DataError(
                f"{where}: column {name!r} holds {schema.field(name).type}, but the {role} must be {NEEDED[role]}. "
                f"Name another with data.columns.{role}=COLUMN."
            )


def _refuse_twice(schema: pa.Schema, where: str) -> None:
    """Raise DataError for a name that several columns have: nobody can say which one is meant."""
    if twice := sorted(name for name, count in Counter(schema.names).items() if count > 1):
        raise DataError(
            f"{where}: column {twice[0]!r} stands twice. Rename or drop one of them, and write the file again."
        )
