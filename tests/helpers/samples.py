"""A small set of captioned pictures, and samples of it."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from helpers.pictures import rows_of, write_shard
from nev.config.data import Columns, Data
from nev.data.index import Index, build_index
from nev.data.sample import SampleReader, make_sample_reader


def make_small_set(folder: Path) -> Index:
    """Three shards with 78 rows; every third row has two captions, row 7 none."""
    rows = rows_of(78)
    for number, row in enumerate(rows):
        row["caption"] = [f"caption {number}"] * (number != 7) + [f"more of {number}"] * (number % 3 == 0)
    write_shard(folder / "0.parquet", rows[:20], [8, 12])
    write_shard(folder / "1.parquet", rows[20:68], [48])
    write_shard(folder / "2.parquet", rows[68:], [10])
    return build_index(str(folder), Columns())


def sample_of(index: Index, rows: list[int]) -> SampleReader:
    """The reader of rows that are numbered through the set."""
    ends = np.cumsum(index.rows)
    groups = np.searchsorted(ends, rows, side="right")
    places = np.stack([groups, np.array(rows) - (ends - index.rows)[groups]], axis=1)
    return make_sample_reader(index, places, Data(train="unused", image_size=16))
