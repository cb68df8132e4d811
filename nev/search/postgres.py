"""The store in PostgreSQL with pgvector: a table of nev, or pictures beside the texts of a table that exists."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, LiteralString

import numpy as np
import pyarrow as pa
from psycopg import sql
from psycopg.types.json import Jsonb
from pydantic import ValidationError

from nev.ops.vectors import Floats
from nev.search.postgres_changes import (
    RECORD,
    find_ann,
    has_full_text,
    is_concurrent,
    list_ann_statements,
    list_full_text_statements,
    list_statements,
    memory_for_graph,
)
from nev.search.postgres_connections import Connections, hold_lock, limit_seconds, register_types
from nev.search.postgres_items import rows_to_items, upsert_items
from nev.search.postgres_table import HALF_LIMIT, PostgresTable, describe_table, find_table
from nev.search.store import (
    ANN_ROWS,
    HIT_COLUMNS,
    IMAGE,
    SAMPLE_COLUMNS,
    TEXT,
    Ann,
    Columns,
    Kind,
    SearchError,
    StoreSpec,
    Upserted,
    Where,
    check_written,
    item_schema,
)

if TYPE_CHECKING:
    from psycopg import Connection

EF_SEARCH = 200  # candidates of a walk through the graph. pgvector's 40 are few for a calibrated list
ITERATIVE = (0, 8)  # version of pgvector from which a walk goes on until enough rows have passed the filter
# A change of the table that waits for others makes all others wait behind it.
LOCK_TIMEOUT = "SET LOCAL lock_timeout = '5s'"


class PostgresStore:
    """A table of PostgreSQL."""

    def __init__(self, location: str, table: str, columns: Columns | None = None) -> None:
        self._connections = Connections(location)
        self._table_name = table
        self.name = f"{self._connections.name}, table {table}"
        self.columns = columns or Columns()
        self._described = self._describe()
        self.is_remade = False
        spec = self.read_spec()
        if columns is None and spec:
            self.columns = spec.columns
            self._described = self._describe()

    def _describe(self) -> PostgresTable | None:
        return self._connections.read("be read", lambda each: describe_table(each, self._table_name, self.columns))

    @property
    def _table(self) -> PostgresTable:
        if self._described is None:
            raise SearchError(f"{self.name}: no such table. `nev index` makes one")
        return self._described

    @property
    def width(self) -> int | None:
        """Numbers of a vector. None: there is no table yet."""
        if self._described is None:
            return None
        modifier = self._described.vector.modifier
        return modifier if modifier > 0 else self._width_of_rows

    @cached_property
    def _width_of_rows(self) -> int:
        """The width of the first vector, for a column whose type has none."""
        rows = self._rows("SELECT vector_dims({vector}) FROM {table} WHERE {vector} IS NOT NULL LIMIT 1")
        if not rows:
            raise SearchError(
                f"{self.name}: column {self.columns.vector} has no width, and there is no row: ALTER TABLE ... ALTER COLUMN ... "
                "TYPE vector(WIDTH)"
            )
        return int(rows[0][0])

    @property
    def filters(self) -> dict[str, tuple[type, ...]]:
        """Columns that `where` may name, and the types of their values."""
        return self._table.filters

    @property
    def takes_texts(self) -> bool:
        """Whether nev can write texts: uids are strings."""
        return self._described is None or not self._described.has_own_key

    def read_spec(self) -> StoreSpec | None:
        """What nev has recorded, in the table `nev_index` of the same schema."""
        if self._described is None:
            return None
        schema, name = self._described.schema, self._described.name

        def read(connection: Connection[Any]) -> Any:
            if find_table(connection, schema, RECORD) is None:
                return None
            statement = sql.SQL(
                "SELECT (spec - 'oid')::text, (spec ->> 'oid')::bigint FROM {} WHERE table_name = %s"
            ).format(sql.Identifier(schema, RECORD))
            return connection.execute(statement, (name,)).fetchone()

        row = self._connections.read("be read", read)
        try:
            spec = StoreSpec.model_validate_json(row[0]) if row else None
        except ValidationError as error:
            raise SearchError(
                f"{self.name}: its record in {RECORD} cannot be read ({error}). Make the index again"
            ) from error
        self.is_remade = bool(row) and row[1] not in (None, self._described.oid)
        return spec

    def write_spec(self, spec: StoreSpec) -> None:
        """Record in the table `nev_index`."""
        statement = sql.SQL(
            "INSERT INTO {} (table_name, spec) VALUES (%s, %s) ON CONFLICT (table_name) DO UPDATE SET spec = EXCLUDED.spec"
        ).format(sql.Identifier(self._table.schema, RECORD))
        with self._connections.use("be written") as connection:
            connection.execute(
                statement, (self._table.name, Jsonb({**spec.model_dump(mode="json"), "oid": self._table.oid}))
            )

    # -- changes --

    def list_changes(self, width: int) -> list[str]:
        """The statements that make the table, or what it lacks."""
        with self._connections.use("be read") as connection:
            statements = list_statements(connection, self._table_name, self._described, self.columns, width)
            return [statement.as_string(connection) for statement in statements]

    def apply_changes(self, width: int) -> None:
        """Run the statements of `list_changes`. Rows get NULLs; no vector is touched."""
        with self._connections.use("be changed") as connection, hold_lock(connection, RECORD):
            self._described = describe_table(connection, self._table_name, self.columns)
            statements = list_statements(connection, self._table_name, self._described, self.columns, width)
            with connection.transaction():
                connection.execute(LOCK_TIMEOUT)
                for statement in statements:
                    if not is_concurrent(statement):
                        connection.execute(statement)
            for statement in filter(is_concurrent, statements):
                connection.execute(statement)
            register_types(connection)
            self._described = describe_table(connection, self._table_name, self.columns)

    def upsert(self, items: pa.Table) -> Upserted:
        """Write items by their uid, all or none. Rows that hold the same already are not written again; they count as updated.

        A row of the other kind is never written: the number of rows is then too small, which raises SearchError.
        """
        if not self.takes_texts and TEXT in items["kind"].to_pylist():
            raise SearchError(f"{self.name} takes no texts: its column {self.columns.uid} holds no strings")
        with self._connections.use("be written") as connection, connection.transaction():
            return check_written(self.name, items.num_rows, upsert_items(connection, self._table, items))

    def delete_images(self) -> int:
        """Delete all pictures."""
        statement = sql.SQL("DELETE FROM {} WHERE ").format(self._table.identifier) + self._table.is_kind(IMAGE)
        with self._connections.use("be written") as connection:
            return connection.execute(statement).rowcount

    # -- reading --

    def count(self, kind: Kind | None = None) -> int:
        """Rows with a vector."""
        condition, _ = self._table.condition(kind)
        return int(self._rows("SELECT count(*) FROM {table} WHERE {condition}", condition=condition)[0][0])

    def count_without_vector(self) -> int:
        """Rows without a vector, which no search finds."""
        return int(self._rows("SELECT count(*) FROM {table} WHERE {vector} IS NULL")[0][0])

    def search(self, vector: Floats, top: int, kind: Kind, where: Where | None = None) -> pa.Table:
        """The nearest items of a kind. A walk through an index goes on until enough rows have passed the filter."""
        condition, values = self._table.condition(kind, where)
        compared, form = self._table.compared(self.width or 0)
        parameters = (np.asarray(vector, np.float32), *values, top)

        def order_by(distance: LiteralString) -> sql.Composed:
            return self._format(
                "WITH nearest AS MATERIALIZED (SELECT {selected}, {distance} AS distance FROM {table} WHERE {condition} "
                "ORDER BY distance LIMIT %s) SELECT * FROM nearest ORDER BY distance + 0",
                selected=self._table.select(HIT_COLUMNS, named=True),
                distance=sql.SQL(distance).format(compared=compared, form=sql.SQL(form)),
                condition=condition,
            )

        def run(connection: Connection[Any]) -> list[Any]:
            with limit_seconds(connection):
                connection.execute("SELECT set_config('hnsw.ef_search', %s, true)", (str(EF_SEARCH),))
                if self._extension >= ITERATIVE:
                    connection.execute("SELECT set_config('hnsw.iterative_scan', 'relaxed_order', true)")
                statement = order_by("{compared} <=> %s::{form}")
                rows = connection.execute(statement, parameters, binary=True).fetchall()
                # A walk ends after 20,000 rows (hnsw.max_scan_tuples), perhaps with too few. No index holds this sum.
                if len(rows) < top and find_ann(connection, self._table):
                    statement = order_by("({compared} <=> %s::{form}) + 0")
                    rows = connection.execute(statement, parameters, binary=True).fetchall()
                return rows

        return rows_to_items(self._connections.read("be searched", run), HIT_COLUMNS, self.width or 0)

    @cached_property
    def _extension(self) -> tuple[int, ...]:
        """The version of pgvector."""
        version = self._rows("SELECT extversion FROM pg_extension WHERE extname = 'vector'")[0][0]
        return tuple(int(part) for part in version.split(".")[:2])

    def search_words(self, words: str, top: int, kind: Kind | None = None, where: Where | None = None) -> pa.Table:
        """The most relevant items in which all words occur (websearch_to_tsquery: "quotes", OR and - work), by ts_rank."""
        condition, values = self._table.condition(kind, where)
        statement = self._format(
            "SELECT {selected} FROM {table}, websearch_to_tsquery('english', %s) AS query "
            "WHERE {document} @@ query AND {condition} ORDER BY ts_rank({document}, query) DESC, {uid} LIMIT %s",
            selected=self._table.select(HIT_COLUMNS),
            document=self._table.document(),
            condition=condition,
            uid=self._table.uid(),
        )

        def run(connection: Connection[Any]) -> list[Any]:
            with limit_seconds(connection):
                return connection.execute(statement, (words, *values, top), binary=True).fetchall()

        return rows_to_items(self._connections.read("be searched", run), HIT_COLUMNS, self.width or 0)

    def read(self, uids: Sequence[str], columns: Sequence[str] | None = None) -> pa.Table:
        """The items of these uids that are there."""
        wanted = tuple(columns or item_schema(1).names)
        condition, values = self._table.has_uid(uids)
        rows = self._rows(
            "SELECT {selected} FROM {table} WHERE {condition}",
            values,
            selected=self._table.select(wanted),
            condition=condition,
        )
        return rows_to_items(rows, wanted, self.width or 0)

    def sample(self, kind: Kind, count: int, seed: int = 0) -> pa.Table:
        """At most `count` items of a kind that have a vector: those with the smallest hashes of their uids."""
        condition, values = self._table.condition(kind)
        rows = self._rows(
            "SELECT {selected} FROM {table} WHERE {condition} ORDER BY hashtextextended({uid}, %s) LIMIT %s",
            (*values, seed, count),
            selected=self._table.select(SAMPLE_COLUMNS),
            condition=condition,
            uid=self._table.uid(),
        )
        return rows_to_items(rows, SAMPLE_COLUMNS, self.width or 0)

    def check_indexes(self, ann: Ann, full_text: bool, width: int) -> None:
        """Raise SearchError for an index that pgvector does not have."""
        if ann == "ivf":
            raise SearchError(f"{self.name}: --ann ivf is of LanceDB. PostgreSQL has hnsw")
        if ann == "hnsw" and width > HALF_LIMIT:
            raise SearchError(
                f"{self.name}: pgvector has no index of {width:,} numbers, at most {HALF_LIMIT:,}: --ann none"
            )

    def build(self, ann: Ann, full_text: bool) -> list[str]:
        """Make the indexes that are missing, while others read and write, and bring the planner's statistics up to date."""
        rows, width = self.count(), self.width or 0
        self.check_indexes(ann, full_text, width)
        chosen = ann == "hnsw" or (ann == "auto" and rows >= ANN_ROWS and width <= HALF_LIMIT)
        with self._connections.use("be indexed") as connection, hold_lock(connection, RECORD):
            statements = list_ann_statements(connection, self._table, width) if chosen else []
            statements += list_full_text_statements(connection, self._table) if full_text else []
            with memory_for_graph(connection, rows, width):
                for statement in statements:
                    connection.execute(statement)
            connection.execute(sql.SQL("ANALYZE {}").format(self._table.identifier))
            indexes = [condition or "all rows" for condition in find_ann(connection, self._table)]
            full = has_full_text(connection, self._table)
        return [
            f"vectors: index of {' and of '.join(sorted(indexes))}"
            if indexes
            else f"vectors: full scan of {rows:,} rows",
            f"full text: {'index' if full else 'full scan'}",
        ]

    def close(self) -> None:
        """Close idle connections."""
        self._connections.close()

    # -- statements --

    def _format(self, template: LiteralString, **parts: sql.Composable) -> sql.Composed:
        """A statement about the table."""
        vector = sql.Identifier(self.columns.vector)
        return sql.SQL(template).format(table=self._table.identifier, vector=vector, **parts)

    def _rows(self, template: LiteralString, parameters: Sequence[Any] = (), **parts: sql.Composable) -> list[Any]:
        statement = self._format(template, **parts)
        return self._connections.read(
            "be read", lambda each: each.execute(statement, parameters, binary=True).fetchall()
        )
