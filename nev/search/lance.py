"""The store in LanceDB, embedded in this process, in a folder or on S3.

What nev records lies in the metadata of the vector column: of a table that exists, LanceDB 0.40 changes no other metadata. They
survive merges, new columns, indexes and compaction. Writes are commits: two writers at once retry, and readers see whole
commits, at most CONSISTENCY later.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, cast

import pyarrow as pa
import pyarrow.compute as pc
from pydantic import ValidationError

from nev.common.errors import first_few, first_line
from nev.data.vectors import as_array
from nev.ops.vectors import Floats
from nev.search.store import (
    ANN_ROWS,
    HIT_COLUMNS,
    IMAGE,
    KEY,
    SAMPLE_COLUMNS,
    TEXT,
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
)
from nev.storage.files import filesystem, is_local

if TYPE_CHECKING:
    from lancedb import DBConnection
    from lancedb.expr import Expr
    from lancedb.query import LanceVectorQueryBuilder
    from lancedb.table import Table

CONSISTENCY = timedelta(seconds=5)
REFINE = 5  # times as many rows as wanted are compared by their full vectors
CHUNK = 5_000  # uids of one query


class LanceStore:
    """A table of LanceDB."""

    def __init__(self, location: str, table: str, columns: Columns | None = None) -> None:
        fs, path = filesystem(location)
        self._there = not is_local(fs) or Path(path).is_dir()  # connecting would make the folder
        self._uri = path if is_local(fs) else location
        self._table_name = table
        self.name = f"{location}, table {table}"
        self._database: DBConnection | None = None
        self._table = self._open_table() if self._there else None
        spec = self.read_spec()
        self.columns = columns or (spec.columns if spec else Columns())

    @property
    def width(self) -> int | None:
        """Numbers of a vector. Raises SearchError for a column that LanceDB cannot search by vector."""
        if self._table is None:
            return None
        form = self._field(self.columns.vector).type
        if not pa.types.is_fixed_size_list(form) or not pa.types.is_floating(form.value_type):
            raise SearchError(
                f"{self.name}: column {self.columns.vector} is {form}, and no list of a fixed number of floats"
            )
        return int(form.list_size)

    @property
    def filters(self) -> dict[str, tuple[type, ...]]:
        """Columns that `where` may name, and the types of their values."""
        return {field.name: types for field in self._open().schema if (types := _python_types(field.type))}

    @property
    def takes_texts(self) -> bool:
        """Whether nev can write texts: uids are strings."""
        return self._key() == self.columns.uid

    def read_spec(self) -> StoreSpec | None:
        """What nev has recorded."""
        for field in self._table.schema if self._table is not None else ():
            raw = (field.metadata or {}).get(KEY.encode())
            try:
                if raw:
                    return StoreSpec.model_validate_json(raw)
            except ValidationError as error:
                raise SearchError(
                    f"{self.name}: its metadata cannot be read ({error}). Make the table again"
                ) from error
        return None

    def write_spec(self, spec: StoreSpec) -> None:
        """Record in the metadata of the vector column."""
        with self._errors("be written"):
            self._open().update_field_metadata({"path": self.columns.vector, "metadata": {KEY: spec.model_dump_json()}})

    def list_changes(self, width: int) -> list[str]:
        """The table, or the columns that the table lacks."""
        if self._table is None:
            return [f"make table {self._table_name} in {self._uri}"]
        present = {field.name: field for field in self._table.schema}
        needed = self._needed_columns()
        for name, form in needed.items():
            if name in present and not _holds(present[name].type, form):
                raise SearchError(
                    f"{self.name}: column {name} is {present[name].type}, and nev needs {form}: name another column "
                    "(--kind-column and so on)"
                )
        written = {*needed, self.columns.vector, self._key()}
        if strict := [name for name, field in present.items() if not field.nullable and name not in written]:
            raise SearchError(
                f"{self.name}: a picture has no value for {first_few(strict)}, where null is not allowed. Allow null in "
                "table.alter_columns, or make another table"
            )
        missing = [f"{name} ({form})" for name, form in needed.items() if name not in present]
        return [f"add the columns {', '.join(missing)} to table {self._table_name}"] if missing else []

    def apply_changes(self, width: int) -> None:
        """Make the table, or add the columns that it lacks. Rows that are there get nulls; their vectors are not touched."""
        with self._errors("be changed"):
            if self._table is None:
                names = dict(zip(item_schema(width).names, self._item_names(), strict=True))
                schema = pa.schema([field.with_name(names[field.name]) for field in item_schema(width)])
                self._there = True
                self._table = self._connect().create_table(self._table_name, schema=schema, exist_ok=True)
                return
            present = self._table.schema.names
            if missing := [pa.field(*each) for each in self._needed_columns().items() if each[0] not in present]:
                self._table.add_columns(pa.schema(missing))

    def count(self, kind: Kind | None = None) -> int:
        """Rows with a vector."""
        with self._errors("be read"):
            return int(self._open().count_rows(self._with_vector(kind)))

    def count_without_vector(self) -> int:
        """Rows without a vector, which no search finds."""
        with self._errors("be read"):
            return int(self._open().count_rows(f"{_quote(self.columns.vector)} IS NULL"))

    def upsert(self, items: pa.Table) -> Upserted:
        """Write items by their uid. Of pictures that are there, other columns of the table keep their values."""
        table = self._open()
        kind: Kind = TEXT if TEXT in items["kind"].to_pylist() else IMAGE
        columns = [
            pc.cast(items[ours], table.schema.field(theirs).type)
            if ours != "vector"
            else _cast_vectors(items[ours], table.schema.field(theirs).type)
            for ours, theirs in zip(items.column_names, self._item_names(), strict=True)
        ]
        given = pa.table(columns, names=self._item_names())
        with self._errors("be written"):
            merge = table.merge_insert(self._key()).when_matched_update_all(where=self._sql(kind, "target."))
            result = merge.when_not_matched_insert_all().execute(given)
        written = Upserted(int(result.num_inserted_rows), int(result.num_updated_rows))
        return check_written(self.name, items.num_rows, written)

    def delete_images(self) -> int:
        """Delete all pictures."""
        with self._errors("be written"):
            table = self._open()
            before = int(table.count_rows())
            table.delete(self._sql(IMAGE))
            return before - int(table.count_rows())

    def search(self, vector: Floats, top: int, kind: Kind, where: Where | None = None) -> pa.Table:
        """The nearest items of a kind. The kind and `where` are applied before the search, not to its results."""
        condition = self._filter(kind, where)

        def run(exact: bool) -> pa.Table:
            found = self._open().search(vector, vector_column_name=self.columns.vector, query_type="vector")
            query = cast("LanceVectorQueryBuilder", found)
            query = query.distance_type("cosine").where(condition, prefilter=True).limit(top)
            query = query.bypass_vector_index() if exact else query.refine_factor(REFINE)
            return query.select([*self._select(HIT_COLUMNS), "_distance"]).to_arrow()

        with self._errors("be searched"):
            found = run(exact=False)
            # The walk through a graph can end before it has seen enough rows that pass a strict filter.
            if found.num_rows < top and self._index_of(self.columns.vector):
                found = run(exact=True)
        return self._as_items(found, HIT_COLUMNS)

    def search_words(self, words: str, top: int, kind: Kind | None = None, where: Where | None = None) -> pa.Table:
        """The most relevant items (BM25)."""
        from lancedb.query import MatchQuery

        if not self._index_of(self.columns.text):
            raise SearchError(
                f"{self.name}: column {self.columns.text} has no full-text index. `nev index --full-text` makes one"
            )
        with self._errors("be searched"):
            match = MatchQuery(words, self.columns.text)  # type: ignore[call-arg]
            query = self._open().search(match, query_type="fts")
            query = query.where(self._filter(kind, where), prefilter=True).limit(top)
            found = query.select([*self._select(HIT_COLUMNS), "_score"]).to_arrow()
        return self._as_items(found.filter(pc.is_valid(found[self.columns.vector])), HIT_COLUMNS)

    def read(self, uids: Sequence[str], columns: Sequence[str] | None = None) -> pa.Table:
        """The items of these uids that are there."""
        from lancedb.expr import col, lit

        wanted = tuple(columns or item_schema(1).names)
        has_key, parts = self._key() in self._open().schema.names, []
        for start in range(0, max(len(uids), 1), CHUNK):
            chunk = list(uids[start : start + CHUNK])
            condition = col(self._key()).isin([lit(uid) for uid in chunk]) if chunk and has_key else lit(False)
            if self._key() != self.columns.uid and (numbers := [int(uid) for uid in chunk if _is_integer(uid)]):
                condition = condition | col(self.columns.uid).isin([lit(number) for number in numbers])
            with self._errors("be read"):
                parts.append(self._open().search().where(condition).select(self._select(wanted)).limit(None).to_arrow())
        return self._as_items(pa.concat_tables(parts), wanted)

    def sample(self, kind: Kind, count: int, seed: int = 0) -> pa.Table:
        """At most `count` items of a kind that have a vector."""
        with self._errors("be read"):
            query = self._open().search().where(self._with_vector(kind)).limit(None)
            found = query.select(self._select(("uid",))).to_arrow()
        uids = self._as_items(found, ("uid",))["uid"].to_pylist()
        return self.read(draw_uids(uids, count, seed), SAMPLE_COLUMNS)

    def build(self, ann: Ann, full_text: bool) -> list[str]:
        """Make the indexes, or add new rows to those that are there, and compact the files."""
        from lancedb.index import FTS, HnswSq, IvfFlat

        table, vector, text = self._open(), self.columns.vector, self.columns.text
        rows = self.count()
        chosen = ann if ann != "auto" else "hnsw" if rows >= ANN_ROWS else "none"
        there = self._index_of(vector)
        with self._errors("be indexed"):
            if full_text and not self._index_of(text):
                table.create_index(text, config=FTS())
            if not there and chosen == "hnsw":
                table.create_index(vector, config=HnswSq(distance_type="cosine"))
            if not there and chosen == "ivf":
                table.create_index(vector, config=IvfFlat(distance_type="cosine"))
            table.optimize()
        kind = self._index_of(vector)
        return [
            f"vectors: {kind}, with refinement" if kind else f"vectors: full scan of {rows:,} rows",
            "full text: BM25" if self._index_of(text) else "full text: none",
        ]

    # -- names and types --

    def _key(self) -> str:
        """The column by which pictures are found: `uid`, or `image_uid` beside a uid of numbers."""
        if self._table is None or _holds(self._field(self.columns.uid).type, pa.string()):
            return self.columns.uid
        return self.columns.image_uid

    def _item_names(self) -> list[str]:
        """The table's names for the columns of an item, in its order."""
        return [self._key(), *(getattr(self.columns, name) for name in item_schema(1).names[1:])]

    def _needed_columns(self) -> dict[str, pa.DataType]:
        """Columns that pictures have beside the vector, and the uid where it holds strings."""
        columns, schema = self.columns, item_schema(1)
        needed = {getattr(columns, name): schema.field(name).type for name in ("kind", "text", "source", "thumbnail")}
        return needed if self._key() == columns.uid else {columns.image_uid: pa.string(), **needed}

    def _select(self, columns: Sequence[str]) -> list[str]:
        """The table's columns for some of an item's, as far as they are there."""
        names = [getattr(self.columns, name) for name in columns]
        if "uid" in columns and self._key() != self.columns.uid:
            names.append(self._key())
        return [name for name in names if name in self._open().schema.names]

    def _as_items(self, found: pa.Table, columns: Sequence[str]) -> pa.Table:
        """Rows of the table as items."""
        values = {}
        for name in columns:
            theirs = getattr(self.columns, name)
            values[name] = found[theirs] if theirs in found.column_names else pa.nulls(found.num_rows, pa.string())
        if "uid" in values:
            values["uid"] = pc.cast(values["uid"], pa.string())
            if self.columns.image_uid in found.column_names:
                values["uid"] = pc.coalesce(found[self.columns.image_uid], values["uid"])
        if "kind" in values:
            is_image = pc.fill_null(pc.equal(values["kind"], IMAGE), False)
            values["kind"] = pc.if_else(is_image, IMAGE, TEXT)
        return pa.table(values)

    def _field(self, name: str) -> pa.Field:
        schema = self._open().schema
        if name not in schema.names:
            raise SearchError(f"{self.name}: there is no column {name}. The columns are {', '.join(schema.names)}")
        return schema.field(name)

    # -- conditions --

    def _sql(self, kind: Kind, table: str = "") -> str:
        """The condition for rows of a kind, as SQL: a name and a constant."""
        if self.columns.kind not in self._open().schema.names:
            return "false" if kind == IMAGE else "true"
        column = table + _quote(self.columns.kind)
        return f"{column} = '{IMAGE}'" if kind == IMAGE else f"({column} IS NULL OR {column} <> '{IMAGE}')"

    def _with_vector(self, kind: Kind | None) -> str:
        """The condition for rows with a vector, as SQL."""
        condition = f"{_quote(self.columns.vector)} IS NOT NULL"
        return f"{condition} AND {self._sql(kind)}" if kind else condition

    def _filter(self, kind: Kind | None, where: Where | None) -> Expr:
        """The condition for rows of a kind that hold the values.

        It is no SQL: LanceDB 0.40 turns the string \\' OR true into code (`Expr.to_sql`). Its expressions have no IS NULL, but
        `concat` makes an empty string of NULL alone, after a cast of numbers to strings.
        """
        from lancedb.expr import col, func, lit

        condition = lit(1) == lit(1)
        if kind == IMAGE:
            has_kinds = self.columns.kind in self._open().schema.names
            condition = col(self.columns.kind) == lit(IMAGE) if has_kinds else lit(1) == lit(0)
        elif kind == TEXT and self.columns.kind in self._open().schema.names:
            condition = func("concat", col(self.columns.kind)) != lit(IMAGE)
        for column, value in check_where(where, self.filters).items():
            if value is not None:
                condition = condition & (col(column) == lit(value))
            elif self.filters[column] == (str,):
                condition = condition & (func("concat", func("octet_length", col(column)).cast("string")) == lit(""))
            else:
                condition = condition & (func("concat", col(column).cast("string")) == lit(""))
        return condition

    # -- the database --

    def _connect(self) -> DBConnection:
        if self._database is None:
            try:
                import lancedb
            except ImportError as error:
                raise SearchError("LanceDB is not installed: pip install 'nev[search]'") from error
            options = None
            if self._uri.startswith("s3://"):
                from nev.storage.s3 import object_store_options

                options = object_store_options()
            with self._errors("be opened"):
                self._database = lancedb.connect(
                    self._uri, storage_options=options, read_consistency_interval=CONSISTENCY
                )
        return self._database

    def _open_table(self) -> Table | None:
        with self._errors("be opened"):
            database = self._connect()
            try:
                return database.open_table(self._table_name)
            except ValueError as error:
                if "was not found" not in str(error):
                    raise
                return None

    def _open(self) -> Table:
        if self._table is None:
            raise SearchError(f"{self.name}: no such table. `nev index` makes one")
        return self._table

    def _index_of(self, column: str) -> str | None:
        """The type of the index of a column."""
        types = [index.index_type for index in self._open().list_indices() if index.columns == [column]]
        return types[0] if types else None

    @contextmanager
    def _errors(self, action: str) -> Iterator[None]:
        """LanceDB raises ValueError, RuntimeError and OSError with long messages."""
        try:
            yield
        except SearchError:
            raise
        except (ValueError, RuntimeError, OSError) as error:
            raise SearchError(f"{self.name} cannot {action}: {first_line(error)}") from error


def _quote(column: str) -> str:
    return "`" + column.replace("`", "``") + "`"


def _is_integer(uid: str) -> bool:
    return uid.removeprefix("-").isascii() and uid.removeprefix("-").isdecimal() and len(uid) < 20


def _holds(form: pa.DataType, wanted: pa.DataType) -> bool:
    """Whether a column of this type holds what nev writes."""
    if pa.types.is_string(wanted):
        return form in (pa.string(), pa.large_string())
    return form in (pa.binary(), pa.large_binary())


def _python_types(form: pa.DataType) -> tuple[type, ...]:
    """The types of values that a column of this type is compared with. Empty: it cannot be compared."""
    if pa.types.is_string(form) or pa.types.is_large_string(form):
        return (str,)
    if pa.types.is_boolean(form):
        return (bool,)
    if pa.types.is_integer(form):
        return (int,)
    return (int, float) if pa.types.is_floating(form) else ()


def _cast_vectors(vectors: pa.ChunkedArray, form: pa.DataType) -> pa.Array:
    """Vectors in the number format of the table."""
    from nev.data.vectors import as_column

    return as_column(as_array(vectors).astype(form.value_type.to_pandas_dtype()), form)
