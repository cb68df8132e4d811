"""Write rows as DFN-style parquet shards, in an order that is random over the whole set.

The order is the order of blake2b(uid, key = seed): as good as a random permutation, and a function of the seed and the
set of uids alone, so neither the order in which the rows arrive nor the number of processes that make them shows.

Two passes keep memory bounded. The first scatters the rows over 256 buckets by the first byte of that hash; above
`memory_bytes` the buckets go to disk as Arrow streams. The second reads one bucket at a time, sorts it and writes it.
Memory is therefore the larger of `memory_bytes` and 1/256 of the set, and equal uids always meet in one bucket.

Layout: `image` is stored as it is (JPEG does not compress further), the rest with zstd. Row order is random, so
min/max statistics would tell a reader nothing, except those of `label`, which keep their null count.
"""

from __future__ import annotations

import hashlib
import re
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from nev.config import ConfigError
from nev.data.rows import Row, captions_of

BUCKETS = 256  # one for each value of a byte
ROW_OVERHEAD = 1024  # bytes of Python objects around one row, roughly; what `memory_bytes` counts beside the image
SCHEMA = pa.schema(
    {
        "uid": pa.string(),
        "image": pa.binary(),
        "caption": pa.list_(pa.string()),
        "label": pa.int64(),
        "label_name": pa.string(),
    }
)


@dataclass(frozen=True)
class Layout:
    """How many rows a file and a row group have, and whether older shards in the folder may be replaced."""

    rows_per_shard: int = 8192
    row_group_rows: int = 256
    overwrite: bool = False


def write_shards(
    rows: Iterable[Row],
    folder: str | Path,
    *,
    seed: int,
    layout: Layout | None = None,
    memory_bytes: int = 512 * 2**20,
    dropped: Counter[str] | None = None,
    on_rows: Callable[[int], None] | None = None,
) -> list[Path]:
    """Shuffle `rows` and write them to `folder` as 00000.parquet, 00001.parquet, ...

    Columns: uid string, image binary, caption string (list<string> as soon as one row has several), and label int64
    and label_name string where any row has them. Every row group has `layout.row_group_rows` rows, save the last of the set.
    Of rows with one uid the first that came is kept; the others are counted in `dropped["duplicate uid"]`.
    `on_rows` is called with the number of rows of each row group written.

    The shards are written in `folder/_writing-*` and moved into place when all are complete: a run that fails leaves
    the folder as it was. Rows must be free of faults (see `nev.data.rows.usable`).

    Raises ConfigError if the folder has shards and `overwrite` is not set, if it has other parquet files (they would be
    read as part of the split), if there are no rows or a row lacks uid, image or caption, or if a shard is not a whole
    number of row groups.
    """
    folder, layout = Path(folder), layout or Layout()
    old = _existing(folder, layout.overwrite)
    rows_per_shard, row_group_rows = layout.rows_per_shard, layout.row_group_rows
    if row_group_rows < 1 or rows_per_shard < 1 or rows_per_shard % row_group_rows:
        raise ConfigError(
            f"rows per shard ({rows_per_shard}) must be a positive multiple of rows per row group ({row_group_rows})"
        )
    dropped = Counter() if dropped is None else dropped
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="_writing-", dir=folder) as name:
        work = Path(name)
        buckets = _Buckets(seed, work, memory_bytes)
        for row in rows:
            buckets.add(row)
        done: list[Path] = []
        ordered = buckets.drain(dropped)
        while shard := list(islice(ordered, 1)):
            done.append(work / f"{len(done):05d}.parquet")
            of_shard = chain(shard, islice(ordered, rows_per_shard - 1))
            _write_shard(done[-1], of_shard, buckets.schema(), row_group_rows, on_rows)
        if not done:
            raise ConfigError(f"{folder}: no rows to write. Dropped by reason: {dict(dropped) or 'none'}")
        for path in old:
            path.unlink()
        return [path.replace(folder / path.name) for path in done]


def _existing(folder: Path, overwrite: bool) -> list[Path]:
    found = sorted(folder.glob("*.parquet"))
    shards = [path for path in found if re.fullmatch(r"\d{5,}\.parquet", path.name)]
    if foreign := [path.name for path in found if path not in shards]:
        raise ConfigError(
            f"{folder}: holds parquet files that nev did not write ({foreign[0]}, ...). Use a new folder."
        )
    if shards and not overwrite:
        raise ConfigError(
            f"{folder}: already holds {len(shards)} shard(s) ({shards[0].name}, ...). "
            "Use a new folder, or --overwrite to replace them."
        )
    return shards


class _Buckets:
    """Rows scattered by their hash; on disk, too, once they are more than `memory_bytes`."""

    def __init__(self, seed: int, work: Path, memory_bytes: int) -> None:
        self.key = hashlib.blake2b(str(seed).encode(), digest_size=16).digest()
        self.work, self.memory_bytes, self.held_bytes = work, memory_bytes, 0
        self.held: list[list[Row]] = [[] for _ in range(BUCKETS)]
        self.seen: set[str] = set()  # optional columns that have a value in any row
        self.many_captions = False

    def digest(self, row: Row) -> bytes:
        return hashlib.blake2b(row["uid"].encode(), digest_size=16, key=self.key).digest()

    def add(self, row: Row) -> None:
        captions = captions_of(row["caption"])
        if not row["uid"] or not row["image"] or not captions:
            raise ConfigError(
                f"row {row['uid']!r}: needs a uid, an image and a caption. Pass the rows through `usable`."
            )
        self.held[self.digest(row)[0]].append(row)
        self.seen.update(name for name in ("label", "label_name") if row.get(name) is not None)
        self.many_captions |= len(captions) > 1
        self.held_bytes += len(row["image"]) + ROW_OVERHEAD
        if self.held_bytes > self.memory_bytes:
            self.spill()

    def spill(self) -> None:
        for number, rows in enumerate(self.held):
            if rows:
                table = _table(rows, SCHEMA)
                with open(self.work / f"{number:03d}.arrows", "ab") as sink, pa.ipc.new_stream(sink, SCHEMA) as stream:
                    stream.write_table(table)
                rows.clear()
        self.held_bytes = 0

    def drain(self, dropped: Counter[str]) -> Iterator[Row]:
        """All rows in the order of their hashes; of equal uids only the first."""
        for number, held in enumerate(self.held):
            rows: dict[bytes, Row] = {}
            for row in chain(_read_streams(self.work / f"{number:03d}.arrows"), held):
                if rows.setdefault(self.digest(row), row) is not row:
                    dropped["duplicate uid"] += 1
            held.clear()
            yield from (rows[digest] for digest in sorted(rows))

    def schema(self) -> pa.Schema:
        fields = [field for field in SCHEMA if field.name not in ("label", "label_name") or field.name in self.seen]
        return pa.schema(
            [
                pa.field("caption", pa.string()) if field.name == "caption" and not self.many_captions else field
                for field in fields
            ]
        )


def _read_streams(path: Path) -> Iterator[Row]:
    """The rows of one spilled bucket: Arrow streams one after another in a file."""
    if not path.exists():
        return
    size = path.stat().st_size
    with open(path, "rb") as source:
        while source.tell() < size:
            with pa.ipc.open_stream(source) as stream:
                for batch in stream:
                    yield from batch.to_pylist()
    path.unlink()


def _write_shard(
    path: Path, rows: Iterator[Row], schema: pa.Schema, row_group_rows: int, on_rows: Callable[[int], None] | None
) -> None:
    listed = pa.types.is_list(schema.field("caption").type)
    columns = ["caption.list.element" if listed and name == "caption" else name for name in schema.names]
    with pq.ParquetWriter(
        path,
        schema,
        compression={name: "none" if name == "image" else "zstd" for name in columns},
        use_dictionary=[name for name in columns if name in ("label", "label_name")],
        write_statistics=[name for name in columns if name == "label"],
    ) as writer:
        while group := list(islice(rows, row_group_rows)):
            writer.write_table(_table(group, schema), row_group_size=row_group_rows)
            if on_rows:
                on_rows(len(group))


def _table(rows: list[Row], schema: pa.Schema) -> pa.Table:
    columns: dict[str, list[Any]] = {name: [row.get(name) for row in rows] for name in schema.names}
    captions = [captions_of(row["caption"]) for row in rows]
    one = schema.field("caption").type == pa.string()
    columns["caption"] = [first for (first,) in captions] if one else captions
    return pa.table(columns, schema=schema)
