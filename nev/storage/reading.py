"""Reading data sets: a column or the bytes of a file, and errors that name the file and say what to do."""

from __future__ import annotations

from contextlib import AbstractContextManager

import pyarrow as pa
import pyarrow.parquet as pq

from nev.common.errors import NevError
from nev.storage.files import filesystem, open_parquet, storage_errors_as

CUT_SHORT = "It may be truncated: delete it, or prepare the shard again."


class DataError(NevError, ValueError):
    """Data that cannot be used. The message names the file or column and the problem, and says what to do."""


def read_errors_as_data_errors(what: str, damaged: str) -> AbstractContextManager[None]:
    """Turn errors of storage and parquet into a DataError that names `what`. damaged: advice for damaged content."""
    return storage_errors_as(what, "read", damaged, DataError)


def read_bytes(location: str) -> bytes | None:
    """The bytes of a file (path or URL), or None where there is no file. Raises DataError where storage fails."""
    fs, path = filesystem(location)
    with read_errors_as_data_errors(location, damaged=""):
        content: bytes | None = fs.cat_file(path) if fs.exists(path) else None
    return content


def write_errors_as_data_errors(what: str) -> AbstractContextManager[None]:
    """Turn errors of storage into a DataError which says that `what` cannot be written."""
    return storage_errors_as(what, "written", "Start again.", DataError)


def read_column(location: str, column: str, damaged: str = CUT_SHORT) -> pa.ChunkedArray:
    """Read one column of a shard or sidecar. Raises DataError where the file cannot be read."""
    fs, path = filesystem(location)
    with read_errors_as_data_errors(location, damaged), open_parquet(fs, path) as file:
        return pq.read_table(file, columns=[column])[column]
