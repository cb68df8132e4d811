"""Vector files: the embedded pictures of a corpus as parquet, a file for each part of the input.

The column `uid` is first, then `vector`, a fixed-size list whose numbers are float32, float16, int8, or uint8 with eight signs
each (`binary`). A file may have more columns: those of `COLUMNS`. The metadata hold a `VectorSpec`: which model made the vectors.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from pydantic import ValidationError

from nev.config.base import Positive, Section
from nev.config.model_spec import Calibration
from nev.storage.files import atomic_file, filesystem, join, list_files, open_parquet
from nev.storage.reading import DataError, read_errors_as_data_errors

FORMAT = 1
KEY = b"nev.vectors"  # of the metadata
Precision = Literal["float32", "float16", "int8", "binary"]
NUMBERS = {"float32": pa.float32(), "float16": pa.float16(), "int8": pa.int8(), "binary": pa.uint8()}
# What a file may have beside `uid` and `vector`.
COLUMNS = {
    "source": pa.string(),  # path of the picture, or TAR/MEMBER
    "caption": pa.list_(pa.string()),
    "cosine": pa.float32(),  # largest cosine of the picture with one of its captions
    "thumbnail": pa.binary(),  # JPEG
}


class VectorSpec(Section):
    """What decides the vectors of a file."""

    format: int = FORMAT
    """Version of this schema."""
    model: str
    """Name of the model."""
    fingerprint: str
    """Fingerprint of the vision tower (`nev.Model.fingerprint`)."""
    text_fingerprint: str
    """Fingerprint of the text tower that the vectors can be compared with (`nev.Model.text_fingerprint`)."""
    width: Positive
    """Numbers of a vector."""
    precision: Precision = "float32"
    """How the numbers are stored (`nev.ops.vectors.round_to`)."""
    calibration: Calibration | None = None
    """Means for lists of pictures and texts, of `width` numbers. null: the model was not validated."""

    @property
    def vector_type(self) -> pa.DataType:
        """Type of the column `vector`."""
        stored = -(-self.width // 8) if self.precision == "binary" else self.width
        return pa.list_(NUMBERS[self.precision], stored)


def make_table(uids: list[str], vectors: NDArray[Any], spec: VectorSpec, **columns: Any) -> pa.Table:
    """A table of vectors, [n, width] in the form that `spec` says. columns: some of COLUMNS, a value a row."""
    names = {"uid": pa.array(uids, pa.string()), "vector": as_column(vectors, spec.vector_type)}
    names |= {name: pa.array(values, COLUMNS[name]) for name, values in columns.items()}
    return pa.table(names, make_schema(spec, list(columns)))


def make_schema(spec: VectorSpec, columns: Sequence[str]) -> pa.Schema:
    """The schema of a vector file. columns: some of COLUMNS."""
    fields = {"uid": pa.string(), "vector": spec.vector_type, **{name: COLUMNS[name] for name in columns}}
    return pa.schema(list(fields.items()), {KEY: spec.model_dump_json().encode()})


def as_column(vectors: NDArray[Any], form: pa.DataType) -> pa.Array:
    """Rows of numbers, [n, k], as a column of the type `form`, without a copy of each number through Python."""
    flat = np.ascontiguousarray(vectors).reshape(-1)
    return pa.FixedSizeListArray.from_arrays(pa.array(flat, form.value_type), form.list_size)


def as_array(column: pa.ChunkedArray | pa.Array) -> NDArray[Any]:
    """A column of vectors as an array, [n, k], of its own number format."""
    whole = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    width = whole.type.list_size
    return np.asarray(whole.flatten().to_numpy(zero_copy_only=False)).reshape(-1, width)


def write_vectors(location: str, table: pa.Table) -> None:
    """Write a file of `make_table`: complete or absent."""
    with atomic_file(location) as partial:
        pq.write_table(table, partial, compression="zstd")


@contextmanager
def open_writer(location: str, schema: pa.Schema, folder: str | None = None) -> Iterator[pq.ParquetWriter]:
    """A writer of a file whose tables come one by one. The file is there when the body has ended without an error.

    schema: of `make_schema`. folder: as `atomic_file` has it.
    """
    with (
        atomic_file(location, folder) as partial,
        pq.ParquetWriter(partial, schema, compression="zstd", use_dictionary=False) as writer,
    ):
        yield writer


def list_vector_files(folder: str, may_be_empty: bool = False) -> list[str]:
    """The vector files of a folder, or the one file that `folder` is. Raises DataError where there is none.

    may_be_empty: an empty or absent folder gives an empty list.
    """
    if folder.endswith(".parquet"):
        return [folder]
    with read_errors_as_data_errors(folder, ""):
        names = [name for name in list_files(folder) if name.endswith(".parquet") and not name.startswith(("_", "."))]
    if not names and not may_be_empty:
        raise DataError(f"{folder}: no vector files in this folder. `nev embed-images --model MODEL` writes them.")
    return [join(folder, name) for name in names]


def read_vectors(location: str, columns: list[str] | None = None) -> pa.Table:
    """Read a vector file, whole or some columns. Raises DataError for a file that cannot be read, or is no vector file."""
    fs, path = filesystem(location)
    with read_errors_as_data_errors(location, "Delete the file and embed again."), open_parquet(fs, path) as file:
        table = pq.read_table(file, columns=columns)
    read_spec(table.schema, location)
    return table


def iterate_vectors(folder: str, columns: list[str] | None = None) -> Iterator[pa.Table]:
    """The vector files of a folder, one table a file. Raises DataError where two files are of different models."""
    first: tuple[str, VectorSpec] | None = None
    for location in list_vector_files(folder):
        table = read_vectors(location, columns)
        spec = read_spec(table.schema, location)
        first = first or (location, spec)
        if spec != first[1]:
            raise DataError(f"{location} and {first[0]} hold vectors of different models or forms: keep them apart")
        yield table


def read_spec(schema: pa.Schema, location: str) -> VectorSpec:
    """Which model made the vectors of a file. Raises DataError for a file that is no vector file."""
    raw = (schema.metadata or {}).get(KEY)
    if raw is None:
        raise DataError(f"{location}: no vector file of nev. `nev embed-images --model MODEL` writes such files.")
    try:
        spec = VectorSpec.model_validate_json(raw)
    except ValidationError as error:
        raise DataError(f"{location}: its metadata cannot be read ({error}). Embed again.") from error
    if spec.format != FORMAT:
        raise DataError(f"{location}: format {spec.format}, and this nev reads format {FORMAT}. Embed again.")
    return spec
