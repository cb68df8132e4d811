"""Items on their way to PostgreSQL and back: an upsert by way of a temporary table, and rows as items."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from psycopg import sql

from nev.data.vectors import as_array, as_column
from nev.search.postgres_table import PostgresTable
from nev.search.store import IMAGE, TEXT, Upserted, item_schema

if TYPE_CHECKING:
    from psycopg import Connection

TYPES = {"vector": "vector", "thumbnail": "bytea"}  # of an item's columns; others are text


def upsert_items(connection: Connection[Any], table: PostgresTable, items: pa.Table) -> Upserted:
    """Write items by their uid, in the transaction of the caller. Rows that hold the same already count as updated.

    A row of the other kind is never written, and not counted.
    """
    names = items.column_names
    theirs = [sql.Identifier(table.key if name == "uid" else getattr(table.columns, name)) for name in names]
    parts = {
        "table": table.identifier,
        "columns": sql.SQL(", ").join(theirs),
        "values": sql.SQL(", ").join(_cast(table, name) for name in names),
        "key": sql.Identifier(table.key),
        "partial": sql.SQL("WHERE {} IS NOT NULL").format(sql.Identifier(table.key))
        if table.has_own_key
        else sql.SQL(""),
        "assigned": sql.SQL(", ").join(sql.SQL("{0} = EXCLUDED.{0}").format(name) for name in theirs[1:]),
        "old": sql.SQL(", ").join(sql.SQL("here.{}").format(name) for name in theirs[1:]),
        "new": sql.SQL(", ").join(sql.SQL("EXCLUDED.{}").format(name) for name in theirs[1:]),
        "kind": sql.Identifier(table.columns.kind),
    }
    write = sql.SQL(
        "INSERT INTO {table} AS here ({columns}) SELECT {values} FROM nev_items ON CONFLICT ({key}) {partial} "
        "DO UPDATE SET {assigned} WHERE (here.{kind} IS NOT DISTINCT FROM 'image') = (EXCLUDED.{kind} = 'image') "
        "AND ({old}) IS DISTINCT FROM ({new}) RETURNING (xmax = 0)"
    ).format(**parts)
    check = sql.SQL(
        "SELECT count(*) FROM nev_items items JOIN {table} here ON here.{key} = items.uid "
        "WHERE (here.{kind} IS NOT DISTINCT FROM 'image') = (items.kind = 'image')"
    ).format(**parts)
    copy_items(connection, items)
    inserted = sum(new for (new,) in connection.execute(write).fetchall())
    total = connection.execute(check).fetchone()
    assert total is not None  # a count has a row
    return Upserted(inserted, total[0] - inserted)


def _cast(table: PostgresTable, name: str) -> sql.Composed:
    """A column of `nev_items` as the table takes it: of its type, and empty where NULL is not allowed."""
    field = table.field(table.key if name == "uid" else getattr(table.columns, name))
    value = sql.SQL("nev_items.{}").format(sql.Identifier(name))
    if name == "vector":
        return value + sql.SQL(f"::{field.type}")
    return sql.SQL("coalesce({}, '')").format(value) if field.not_null else value


def copy_items(connection: Connection[Any], items: pa.Table) -> None:
    """Copy items into the table `nev_items`, which ends with the transaction."""
    types = [TYPES.get(name, "text") for name in items.column_names]
    fields = [
        sql.SQL(f"{{}} {form}").format(sql.Identifier(name))
        for name, form in zip(items.column_names, types, strict=True)
    ]
    connection.execute(sql.SQL("CREATE TEMP TABLE nev_items ({}) ON COMMIT DROP").format(sql.SQL(", ").join(fields)))
    columns = [as_array(items[name]) if name == "vector" else items[name].to_pylist() for name in items.column_names]
    with connection.cursor() as cursor, cursor.copy("COPY nev_items FROM STDIN (FORMAT BINARY)") as copy:
        copy.set_types(types)
        for row in zip(*columns, strict=True):
            copy.write_row(row)


def rows_to_items(rows: list[Any], names: Sequence[str], width: int) -> pa.Table:
    """Rows as items. names: of the first columns of each row. width: numbers of a vector."""
    schema = item_schema(width)
    values = list(zip(*rows, strict=True)) or [()] * len(names)
    columns = {}
    for name, column in zip(names, values, strict=False):
        if name == "vector":
            columns[name] = _as_vectors(column, width)
        elif name == "kind":
            columns[name] = pa.array([IMAGE if value == IMAGE else TEXT for value in column], pa.string())
        else:
            columns[name] = pa.array(column, schema.field(name).type)
    return pa.table(columns)


def _as_vectors(column: Sequence[Any], width: int) -> pa.Array:
    """Vectors of pgvector, some of them None, as a column."""
    rows = np.zeros((len(column), width), np.float32)
    for row, value in zip(rows, column, strict=True):
        if value is not None:
            row[:] = value.to_numpy()
    form = pa.list_(pa.float32(), width)
    if all(value is not None for value in column):
        return as_column(rows, form)
    return pa.array([None if value is None else row for row, value in zip(rows, column, strict=True)], form)
