"""The statements that prepare a table in PostgreSQL for pictures: what a table lacks, and its indexes.

Pictures get an HNSW index of their own, and texts, too, where no index of all rows is there: a search is always for a kind, and a
filter on an index of all rows would walk past most of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from psycopg import sql

from nev.common.errors import first_few
from nev.search.postgres_table import PostgresTable, find_table, split_name
from nev.search.store import Columns, Kind, SearchError, item_schema

if TYPE_CHECKING:
    from psycopg import Connection

GRAPH_MIB = 1024  # most memory that PostgreSQL is asked to use for the making of a graph
RECORD = (
    "nev_index"  # table of what nev records, a row a table; a comment on the table would take the place of its owner's
)


def list_missing(table: PostgresTable) -> dict[str, str]:
    """Columns that the table lacks for pictures, and their types. Raises SearchError for a table that cannot take pictures."""
    columns = table.columns
    if table.relation != "r":
        raise SearchError(
            f"{table.name} is no plain table (but a view, a foreign or a partitioned table): name the table of the rows"
        )
    if not table.has_own_key and columns.uid not in table.unique:
        raise SearchError(
            f"table {table.name}: column {columns.uid} has no unique index of its own, and a uid names one row: "
            f"CREATE UNIQUE INDEX ON {table.name} ({columns.uid})"
        )
    needed = dict.fromkeys((columns.kind, columns.text, columns.source), "text") | {columns.thumbnail: "bytea"}
    if table.has_own_key:
        needed[columns.image_uid] = "text"
    for name, form in needed.items():
        field = table.fields.get(name)
        if field and (field.is_generated or (field.category != "S" if form == "text" else field.type != form)):
            raise SearchError(
                f"table {table.name}: column {name} is {field.form}, and nev writes {form} there. Name another column, which is "
                "added where it is not there (--kind-column, --text-column, --source-column, --thumbnail-column)"
            )
    written = {*needed, columns.vector, table.key}
    unfilled = [field.name for field in table.fields.values() if field.not_null and not field.has_default]
    if strict := [name for name in unfilled if name not in written and not table.fields[name].is_generated]:
        raise SearchError(
            f"table {table.name}: a picture has no value for {first_few(strict)}, NOT NULL and without a default. Nothing was "
            f"written. Add defaults (ALTER TABLE {table.name} ALTER COLUMN {strict[0]} SET DEFAULT ...), or drop NOT NULL"
        )
    return {name: form for name, form in needed.items() if name not in table.fields}


def list_statements(
    connection: Connection[Any], new_name: str, table: PostgresTable | None, columns: Columns, width: int
) -> list[sql.Composed]:
    """Statements that make the table, or what it lacks. given: its name, where it is not there."""
    schema, name = (table.schema, table.name) if table else split_name(new_name)
    statements = (
        _make_table(connection, schema, name, columns, width) if table is None else _complete_table(connection, table)
    )
    if find_table(connection, schema, RECORD) is None:
        record = sql.Identifier(schema, RECORD) if schema else sql.Identifier(RECORD)
        statements.append(sql.SQL("CREATE TABLE {} (table_name text PRIMARY KEY, spec jsonb NOT NULL)").format(record))
    return statements


def _make_table(
    connection: Connection[Any], schema: str | None, name: str, columns: Columns, width: int
) -> list[sql.Composed]:
    has_extension = connection.execute("SELECT 1 FROM pg_extension WHERE extname = 'vector'").fetchone()
    extension = [] if has_extension else [sql.SQL("CREATE EXTENSION vector").format()]
    body = (
        "CREATE TABLE {table} ({uid} text PRIMARY KEY, {kind} text NOT NULL, {vector} vector({width}) NOT NULL, {text} text, "
        "{source} text, {thumbnail} bytea)"
    )
    table = sql.Identifier(schema, name) if schema else sql.Identifier(name)
    names = {ours: sql.Identifier(getattr(columns, ours)) for ours in item_schema(1).names}
    return [*extension, sql.SQL(body).format(table=table, width=width, **names)]


def _complete_table(connection: Connection[Any], table: PostgresTable) -> list[sql.Composed]:
    statements = []
    if missing := list_missing(table):
        added = [
            sql.SQL(f"ADD COLUMN IF NOT EXISTS {{}} {form}").format(sql.Identifier(name))
            for name, form in missing.items()
        ]
        statements.append(sql.SQL("ALTER TABLE {} {}").format(table.identifier, sql.SQL(", ").join(added)))
    if table.has_own_key:
        key = sql.Identifier(table.key)
        body = sql.SQL("({key}) WHERE {key} IS NOT NULL").format(key=key)
        statements += _make_index(connection, table, "uid", "UNIQUE INDEX", body)
    return statements


def _make_index(
    connection: Connection[Any], table: PostgresTable, purpose: str, kind: str, body: sql.Composable
) -> list[sql.Composed]:
    """Statements that make an index while others write. Empty where it is there and whole.

    purpose: end of its name. kind: `INDEX` or `UNIQUE INDEX`. body: all that comes after the name of the table.
    """
    name = f"{table.name[:40]}_nev_{purpose}"
    valid = connection.execute(
        "SELECT i.indisvalid FROM pg_index i JOIN pg_class c ON c.oid = i.indexrelid WHERE i.indrelid = %s AND c.relname = %s",
        (table.oid, name),
    ).fetchone()
    if valid and valid[0]:
        return []
    # An interrupted CREATE INDEX CONCURRENTLY leaves an index that is not valid.
    broken = [sql.SQL("DROP INDEX CONCURRENTLY {}").format(sql.Identifier(table.schema, name))] if valid else []
    made = sql.SQL(f"CREATE {kind} CONCURRENTLY {{}} ON {{}} ").format(sql.Identifier(name), table.identifier)
    return [*broken, made + body]


def is_concurrent(statement: sql.Composed) -> bool:
    """Whether a statement runs outside of a transaction."""
    return " CONCURRENTLY " in statement.as_string(None)


def list_ann_statements(connection: Connection[Any], table: PostgresTable, width: int) -> list[sql.Composed]:
    """Statements that make HNSW indexes by cosine: of pictures, and of texts where no index of all rows is there.

    A plain index of each kind goes with them: where a kind has few rows, they are all read, and no others.
    """
    compared, form = table.compared(width)
    whole = None in find_ann(connection, table)
    statements = []
    kinds: tuple[Kind, ...] = ("image", "text")
    for kind in kinds:
        body = sql.SQL("({}) WHERE ").format(sql.Identifier(table.columns.uid)) + table.is_kind(kind)
        statements += _make_index(connection, table, kind, "INDEX", body)
        if kind == "image" or not whole:
            body = sql.SQL(f"USING hnsw ({{}} {form}_cosine_ops) WHERE ").format(compared) + table.is_kind(kind)
            statements += _make_index(connection, table, f"{kind}_hnsw", "INDEX", body)
    return statements


def list_full_text_statements(connection: Connection[Any], table: PostgresTable) -> list[sql.Composed]:
    """Statements that make the full-text index."""
    return _make_index(connection, table, "full_text", "INDEX", sql.SQL("USING gin ({})").format(table.document()))


def find_ann(connection: Connection[Any], table: PostgresTable) -> list[str | None]:
    """The indexes of the vectors by cosine: of each its condition, None for one of all rows."""
    rows = connection.execute(
        "SELECT pg_get_expr(i.indpred, i.indrelid), pg_get_indexdef(i.indexrelid, 1, true) FROM pg_index i "
        "JOIN pg_class c ON c.oid = i.indexrelid JOIN pg_am a ON a.oid = c.relam JOIN pg_opclass o ON o.oid = i.indclass[0] "
        "WHERE i.indrelid = %s AND i.indisvalid AND a.amname IN ('hnsw', 'ivfflat') AND o.opcname LIKE '%%cosine_ops'",
        (table.oid,),
    ).fetchall()
    column = sql.Identifier(table.columns.vector).as_string(connection).strip('"')
    return [condition for condition, expression in rows if column in expression]


def has_full_text(connection: Connection[Any], table: PostgresTable) -> bool:
    """Whether the full-text index is there."""
    return not list_full_text_statements(connection, table)


@contextmanager
def memory_for_graph(connection: Connection[Any], rows: int, width: int) -> Iterator[None]:
    """Let a graph be made in memory: on disk it takes many times as long. The setting is this session's, for the block."""
    needed = min(int(rows * (4 * width + 400) * 1.2 / 2**20) + 1, GRAPH_MIB)
    current = connection.execute(
        "SELECT setting::bigint FROM pg_settings WHERE name = 'maintenance_work_mem'"
    ).fetchone()
    if current and current[0] < needed * 1024:
        connection.execute("SELECT set_config('maintenance_work_mem', %s, false)", (f"{needed}MB",))
    try:
        yield
    finally:
        connection.execute("RESET maintenance_work_mem")
