"""The labels of a shard, as all that count classes read them."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from nev.data.column_types import as_labels
from nev.data.index import Index
from nev.storage.files import filesystem, open_parquet
from nev.storage.reading import CUT_SHORT, read_errors_as_data_errors


def read_shard_labels(index: Index, shard: int, needed: bool = False) -> NDArray[np.int64]:
    """The label of every row of a shard, int64 [n]; -1 where it is null, and where there is no such column.

    needed: a number that is not whole raises DataError. Without that it is -1, too: the column may hold something else.
    Raises DataError for a file that cannot be read.
    """
    rows = int(index.rows[index.shard_groups(shard)].sum())
    location, column = index.location(shard), index.columns.label
    fs, path = filesystem(location)
    if column:
        with read_errors_as_data_errors(location, CUT_SHORT), open_parquet(fs, path) as file:
            table = pq.ParquetFile(file).read(columns=[column])
        if column in table.column_names:
            if pa.types.is_integer(table[column].type):
                return np.asarray(table[column].fill_null(-1).to_numpy(), np.int64)
            labels = as_labels(table[column].to_pylist(), location if needed else None)
            return np.array([-1 if label is None else label for label in labels], np.int64)
    return np.full(rows, -1, np.int64)
