"""Reading data sets: errors that name the file and say what to do, and one column of a shard."""

from __future__ import annotations

from contextlib import AbstractContextManager

import pyarrow as pa
import pyarrow.parquet as pq

from nev.common.errors import NevError
from nev.storage.files import filesystem, open_parquet, storage_errors_as

CUT_SHORT = "It may be cut short: delete it, or prepare the shard again."


class DataError(NevError, ValueError):
    """Data that cannot be trained on. The message says which file or column, what was found, and what to do."""


def read_errors_as_data_errors(what: str, damaged: str) -> AbstractContextManager[None]:
    """Turn what storage and parquet raise into a DataError that names `what`; `damaged` says what to do if it is no good."""
    return storage_errors_as(what, "read", damaged, DataError)


def read_bytes(location: str) -> bytes | None:
    """The bytes of a file (path or URL), None where there is none. Raises DataError where storage fails."""
    fs, path = filesystem(location)
    with read_errors_as_data_errors(location, damaged=""):
        found: bytes | None = fs.cat_file(path) if fs.exists(path) else None
    return found


def write_errors_as_data_errors(what: str) -> AbstractContextManager[None]:
    """Turn what storage raises into a DataError that names `what`, which could not be written."""
    return storage_errors_as(what, "written", "Start again.", DataError)


def read_column(location: str, column: str, damaged: str = CUT_SHORT) -> pa.ChunkedArray:
    """One column of a shard or sidecar, whole. Raises DataError where it cannot be read."""
    fs, path = filesystem(location)
    with read_errors_as_data_errors(location, damaged), open_parquet(fs, path) as file:
        return pq.read_table(file, columns=[column])[column]
