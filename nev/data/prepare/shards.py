"""A shard: a DFN-style parquet file of rows, in row groups of a fixed size.

`image` is stored without compression (JPEG does not compress further), the other columns with zstd. The order of rows is random,
so min/max statistics are of no use. Only `label` has statistics, for its null count. The same rows always give the same bytes.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from nev.config.base import ConfigError
from nev.data.rows import Row, parse_captions
from nev.storage.files import filesystem, join
from nev.storage.reading import read_errors_as_data_errors

SCHEMA = pa.schema(
    {
        "uid": pa.string(),
        "image": pa.binary(),
        "caption": pa.list_(pa.string()),
        "label": pa.int64(),
        "label_name": pa.string(),
    }
)
OPTIONAL = ("label", "label_name")  # columns that shards have only if a row of the set has a value


@dataclass(frozen=True)
class Layout:
    """Sizes of shards and row groups, in rows. overwrite: older shards in the folder may be replaced."""

    rows_per_shard: int = 8192
    row_group_rows: int = 256
    overwrite: bool = False

    def check(self) -> None:
        """Raise ConfigError unless a shard is a whole number of row groups."""
        if self.row_group_rows < 1 or self.rows_per_shard < 1 or self.rows_per_shard % self.row_group_rows:
            raise ConfigError(
                f"rows per shard ({self.rows_per_shard}) must be a positive multiple of rows per row group "
                f"({self.row_group_rows})"
            )


def shard_location(folder: str, number: int) -> str:
    """Path or URL of a shard: 00000.parquet, 00001.parquet, ..."""
    return join(folder, f"{number:05d}.parquet")


def list_shards(folder: str) -> dict[str, int]:
    """Size in bytes of each shard in `folder` (path or URL), by file name. Empty for a missing folder.

    Raises ConfigError for other parquet files at any depth, which would be read as part of the split.
    """
    fs, path = filesystem(folder)
    sizes: dict[str, int] = {}
    with read_errors_as_data_errors(folder, damaged=""):
        for below, folders, entries in fs.walk(path, detail=True, on_error="raise") if fs.exists(path) else ():
            for name in [name for name in folders if name[0] in "._"]:
                del folders[name]  # skip intermediate files and sidecars
            prefix = f"{below[len(path) :].strip('/')}/".lstrip("/")
            sizes |= {
                f"{prefix}{name}": entry["size"] for name, entry in entries.items() if name and name[0] not in "._"
            }
    files = {name: size for name, size in sorted(sizes.items()) if name.endswith(".parquet")}
    shards = {name: size for name, size in files.items() if re.fullmatch(r"\d{5,}\.parquet", name)}
    if foreign := [name for name in files if name not in shards]:
        raise ConfigError(
            f"{folder}: holds other parquet files ({foreign[0]}, ...), which would be read as rows of this split. Use a new "
            "folder."
        )
    return shards


def infer_schema(optional: Collection[str], several: bool) -> pa.Schema:
    """The schema of a set's shards.

    optional: the columns of `OPTIONAL` that occur.
    several: a row has several captions, so that captions are lists.
    """
    fields = [field for field in SCHEMA if field.name not in OPTIONAL or field.name in optional]
    single = pa.field("caption", pa.string())
    return pa.schema([single if field.name == "caption" and not several else field for field in fields])


def write_shard(sink: Any, groups: Iterable[list[Row]], schema: pa.Schema) -> None:
    """Write each list of rows as one row group to the path or file `sink`."""
    is_list = pa.types.is_list(schema.field("caption").type)
    columns = ["caption.list.element" if is_list and name == "caption" else name for name in schema.names]
    with pq.ParquetWriter(
        sink,
        schema,
        compression={name: "none" if name == "image" else "zstd" for name in columns},
        use_dictionary=[name for name in columns if name in OPTIONAL],
        write_statistics=[name for name in columns if name == "label"],
    ) as writer:
        for rows in groups:
            writer.write_table(build_table(rows, schema), row_group_size=len(rows))


def build_table(rows: list[Row], schema: pa.Schema) -> pa.Table:
    """A table of the rows, with the columns of `schema`."""
    columns: dict[str, list[Any]] = {name: [row.get(name) for row in rows] for name in schema.names}
    captions = [parse_captions(row["caption"]) for row in rows]
    single = schema.field("caption").type == pa.string()
    columns["caption"] = [first for (first,) in captions] if single else captions
    return pa.table(columns, schema=schema)
