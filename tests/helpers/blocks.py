"""Small sets of shards with sidecars, for the tests of blocks and of sidecars."""

from pathlib import Path
from typing import Any

import numpy as np

from helpers.pictures import WIDTH, encode, rows_of, write_shard
from nev.config.data import Augment, Columns, Limits
from nev.data.block import Block, BlockReader
from nev.data.block_plan import Segment
from nev.data.index import Index, build_index
from nev.data.sidecar import missing_sidecars
from nev.data.text_sidecar import sidecar_key, text_sidecars, write_sidecar

KEY = sidecar_key("tower", "caption")
SIZE = 16


def embedded(folder: Path, key: str = KEY) -> Index:
    """The index of a folder, with the sidecars that it lacks written."""
    index = build_index(str(folder), Columns())
    for shard in missing_sidecars(text_sidecars(index, key, WIDTH)):
        write_sidecar(index, shard, key, WIDTH, encode)
    return index


def reader_of(index: Index, **changed: Any) -> BlockReader:
    settings = {"image_size": SIZE, "limits": Limits(), "seed": 3, "augment": Augment(), "text_key": KEY}
    return BlockReader(index, text_width=WIDTH, **(settings | changed))


def whole(index: Index, epoch: int = 0) -> list[Segment]:
    return [Segment(group, 0, int(rows), epoch) for group, rows in enumerate(index.rows)]


def equal(one: Block, other: Block) -> bool:
    return one.keys() == other.keys() and all(np.array_equal(one[name], other[name]) for name in one)


def three_shards(folder: Path) -> Path:
    """27 rows in row groups of unequal sizes; one shard holds the Hugging Face struct."""
    rows = rows_of(27)
    write_shard(folder / "a.parquet", rows[:12], [5, 1, 6])
    write_shard(folder / "b.parquet", rows[12:21], [9])
    for row in rows[21:]:
        row["image"] = {"bytes": row["image"], "path": None}
    write_shard(folder / "c.parquet", rows[21:], [2, 4])
    return folder
