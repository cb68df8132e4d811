"""The exact store: a parquet file a table, searched whole by numpy. The measure of recall, and good for small sets.

One process writes at a time: a writer that finds the file changed since it was read raises an error. Readers see a new file at
the next call.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pydantic import ValidationError

from nev.ops.vectors import Floats, are_usable, scale_to_unit
from nev.search.store import (
    HIT_COLUMNS,
    IMAGE,
    KEY,
    SAMPLE_COLUMNS,
    Ann,
    Columns,
    Kind,
    SearchError,
    StoreSpec,
    Upserted,
    Where,
    check_where,
    check_written,
    draw_uids,
    item_schema,
    read_unit_vectors,
)
from nev.storage.files import atomic_file, filesystem, join, open_parquet, storage_errors_as


class _Content(NamedTuple):
    """The file as it was read. version: changes with the file. vectors: float32 [n, D], of unit length."""

    version: tuple[Any, ...]
    table: pa.Table
    vectors: Floats
    spec: StoreSpec | None


class ExactStore:
    """A parquet file of items, here or on S3."""

    def __init__(self, location: str, table: str) -> None:
        if not re.fullmatch(r"[\w-][\w.-]*", table):
            raise SearchError(f"table {table!r}: letters, digits, '_', '-' and '.', since the name is a file's")
        self.file = join(location, f"{table}.parquet")
        self.name = self.file
        self.columns = Columns()
        self._content: _Content | None = None

    @property
    def width(self) -> int | None:
        """Numbers of a vector. None: there is no table yet."""
        content = self._load()
        return None if content is None else content.table.schema.field("vector").type.list_size

    @property
    def filters(self) -> dict[str, tuple[type, ...]]:
        """Columns that `where` may name."""
        return dict.fromkeys(("uid", "kind", "text", "source"), (str,))

    @property
    def is_remade(self) -> bool:
        """Never: the record lies in the table."""
        return False

    @property
    def takes_texts(self) -> bool:
        """Whether nev can write texts."""
        return True

    def read_spec(self) -> StoreSpec | None:
        """What nev has recorded."""
        content = self._load()
        return None if content is None else content.spec

    def write_spec(self, spec: StoreSpec) -> None:
        """Record in the file."""
        self._write(self._open().table, spec)

    def list_changes(self, width: int) -> list[str]:
        """The changes that the table needs: the file, where there is none."""
        return [] if self._load() else [f"make the file {self.file}"]

    def apply_changes(self, width: int) -> None:
        """Make the file, where there is none."""
        if self._load() is None:
            self._write(item_schema(width).empty_table(), None)

    def count(self, kind: Kind | None = None) -> int:
        """Rows with a vector, of one kind or of both."""
        content = self._open()
        return int(self._select(content, kind, None).sum())

    def count_without_vector(self) -> int:
        """Rows without a vector. There are none in a file of nev."""
        content = self._open()
        return len(content.vectors) - int(are_usable(content.vectors).sum())

    def upsert(self, items: pa.Table) -> Upserted:
        """Write items by their uid."""
        content = self._open()
        uids, given_uids = content.table["uid"], items["uid"]
        matching = content.table.filter(pc.is_in(uids, given_uids.combine_chunks()))
        if matching.num_rows and set(matching["kind"].to_pylist()) != set(items["kind"].to_pylist()):
            raise SearchError(
                f"{self.name}: some uids are of rows of the other kind there. A picture never replaces a text"
            )
        others = content.table.filter(pc.invert(pc.is_in(uids, given_uids.combine_chunks())))
        updated = content.table.num_rows - others.num_rows
        table = pa.concat_tables([others, items.cast(content.table.schema.remove_metadata())]).sort_by("uid")
        written = Upserted(table.num_rows - content.table.num_rows, updated)
        check_written(self.name, items.num_rows, written)
        self._write(table, content.spec)
        return written

    def delete_images(self) -> int:
        """Delete all pictures. Returns their number."""
        content = self._open()
        others = content.table.filter(pc.not_equal(content.table["kind"], IMAGE))
        self._write(others, content.spec)
        return int(content.table.num_rows - others.num_rows)

    def search(self, vector: Floats, top: int, kind: Kind, where: Where | None = None) -> pa.Table:
        """The `top` items of a kind with the highest cosine to a vector. Of equal cosines the smaller uid is first."""
        content = self._open()
        rows = np.flatnonzero(self._select(content, kind, where))
        cosines = content.vectors[rows] @ scale_to_unit(vector[None])[0]
        # Rows lie in the order of their uids, and the sort is stable.
        return content.table.take(rows[np.argsort(-cosines, kind="stable")[:top]]).select(HIT_COLUMNS)

    def search_words(self, words: str, top: int, kind: Kind | None = None, where: Where | None = None) -> pa.Table:
        """Raise SearchError: a parquet file has no full text."""
        raise SearchError(
            f"{self.name}: this store has no full text. LanceDB and PostgreSQL have it; search by vector here"
        )

    def read(self, uids: Sequence[str], columns: Sequence[str] | None = None) -> pa.Table:
        """The items of these uids that are there."""
        table = self._open().table
        return table.filter(pc.is_in(table["uid"], pa.array(uids, pa.string()))).select(columns or table.column_names)

    def sample(self, kind: Kind, count: int, seed: int = 0) -> pa.Table:
        """At most `count` items of a kind."""
        content = self._open()
        uids = content.table["uid"].filter(pa.array(self._select(content, kind, None)))
        return self.read(draw_uids(uids.to_pylist(), count, seed), SAMPLE_COLUMNS)

    def check_indexes(self, ann: Ann, full_text: bool, width: int) -> None:
        """Raise SearchError for any index: this store has none."""
        if ann not in ("auto", "none"):
            raise SearchError(f"{self.name}: --ann {ann} is of LanceDB and PostgreSQL. This store reads all vectors")
        if full_text:
            raise SearchError(f"{self.name}: --full-text is of LanceDB and PostgreSQL. This store has none")

    def build(self, ann: Ann, full_text: bool) -> list[str]:
        """Nothing is built: every search is exact."""
        return ["every search reads all vectors, and is exact"]

    def close(self) -> None:
        """Nothing is open."""

    def _select(self, content: _Content, kind: Kind | None, where: Where | None) -> np.ndarray[Any, np.dtype[np.bool_]]:
        """Which rows a search sees: bool [n]."""
        table = content.table
        rows = are_usable(content.vectors)
        wanted = [*check_where(where, self.filters).items(), *([("kind", kind)] if kind else [])]
        for column, value in wanted:
            same = pc.is_null(table[column]) if value is None else pc.fill_null(pc.equal(table[column], value), False)
            rows = rows & same.to_numpy()
        return rows

    def _open(self) -> _Content:
        content = self._load()
        if content is None:
            raise SearchError(f"{self.file}: no such table. `nev index` makes one")
        return content

    def _version(self) -> tuple[Any, ...] | None:
        """Changes whenever the file changes. None: there is no file."""
        fs, path = filesystem(self.file)
        with storage_errors_as(self.file, "read", kind=SearchError):
            if not fs.exists(path):
                return None
            info = fs.info(path)
        return tuple(info.get(key) for key in ("ETag", "ino", "mtime", "size"))

    def _load(self) -> _Content | None:
        """The file, read again where it has changed."""
        version = self._version()
        if version is None:
            return None
        if self._content is None or self._content.version != version:
            fs, path = filesystem(self.file)
            damaged = "Make the index again."
            with storage_errors_as(self.file, "read", damaged, SearchError), open_parquet(fs, path) as file:
                table = pq.read_table(file)
            spec = self._parse(table.schema)
            self._content = _Content(version, table, read_unit_vectors(table), spec)
        return self._content

    def _parse(self, schema: pa.Schema) -> StoreSpec | None:
        if missing := [name for name in item_schema(1).names if name not in schema.names]:
            raise SearchError(
                f"{self.file}: no table of nev: it has no column {', '.join(missing)}. `nev index` makes one"
            )
        raw = (schema.metadata or {}).get(KEY.encode())
        try:
            return StoreSpec.model_validate_json(raw) if raw else None
        except ValidationError as error:
            raise SearchError(f"{self.file}: its metadata cannot be read ({error}). Make the index again") from error

    def _write(self, table: pa.Table, spec: StoreSpec | None) -> None:
        if self._content is not None and self._version() != self._content.version:
            raise SearchError(f"{self.file} was changed by another process meanwhile. Run the command again")
        metadata = {KEY: spec.model_dump_json()} if spec else None
        with storage_errors_as(self.file, "written", kind=SearchError), atomic_file(self.file) as partial:
            pq.write_table(table.replace_schema_metadata(metadata), partial, compression="zstd")
