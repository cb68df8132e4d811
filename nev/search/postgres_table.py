"""What a table in PostgreSQL is: its columns, keys and indexes; and the parts of statements that depend on them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple
from uuid import UUID

from psycopg import sql

from nev.search.store import IMAGE, Columns, Kind, SearchError, Where, check_where

if TYPE_CHECKING:
    from psycopg import Connection

VECTOR_LIMIT, HALF_LIMIT = 2000, 4000  # widest vectors of an index of pgvector, of float32 and of float16
INTEGERS = {"smallint": 2**15, "integer": 2**31, "bigint": 2**63}
# Types of values that a column is compared with, by PostgreSQL's category of its type: string, boolean, date, enum, number.
CATEGORIES: dict[str, tuple[type, ...]] = {"S": (str,), "B": (bool,), "D": (str,), "E": (str,), "N": (int, float)}

COLUMNS = """
SELECT a.attname, t.typname, format_type(a.atttypid, NULL), a.atttypmod, t.typcategory,
       a.attnotnull, a.atthasdef OR a.attidentity <> '', a.attgenerated <> '' OR a.attidentity = 'a'
FROM pg_attribute a JOIN pg_type t ON t.oid = a.atttypid
WHERE a.attrelid = %s AND a.attnum > 0 AND NOT a.attisdropped ORDER BY a.attnum
"""
UNIQUE = """
SELECT a.attname FROM pg_index i JOIN pg_attribute a ON a.attrelid = i.indrelid AND a.attnum = i.indkey[0]
WHERE i.indrelid = %s AND i.indisunique AND i.indisvalid AND i.indnkeyatts = 1 AND i.indexprs IS NULL AND i.indpred IS NULL
"""


class Column(NamedTuple):
    """A column.

    type: as the catalogue names it. form: as a statement names it. modifier: of the type; of a vector its width, or -1.
    category: PostgreSQL's, of the type. has_default: by DEFAULT, an expression or an identity. is_generated: cannot be written.
    """

    name: str
    type: str
    form: str
    modifier: int
    category: str
    not_null: bool
    has_default: bool
    is_generated: bool


@dataclass(frozen=True)
class PostgresTable:
    """A table that exists.

    relation: `relkind` of the catalogue. fields: columns by their names. unique: columns with a unique index of their own.
    columns: which of them are those of an item.
    """

    oid: int
    schema: str
    name: str
    relation: str
    fields: dict[str, Column]
    unique: frozenset[str]
    columns: Columns

    @property
    def identifier(self) -> sql.Identifier:
        """The table in a statement."""
        return sql.Identifier(self.schema, self.name)

    def field(self, name: str) -> Column:
        """A column. Raises SearchError where there is none of this name."""
        if name not in self.fields:
            raise SearchError(f"table {self.name} has no column {name}. Its columns are {', '.join(self.fields)}")
        return self.fields[name]

    @property
    def key(self) -> str:
        """The column by which pictures are found: `uid` where it holds strings, else `image_uid`."""
        uid = self.field(self.columns.uid)
        return uid.name if uid.category == "S" and not uid.is_generated else self.columns.image_uid

    @property
    def has_own_key(self) -> bool:
        """Whether pictures have a column for their uids, since the table's holds no strings."""
        return self.key != self.columns.uid

    @property
    def vector(self) -> Column:
        """The column of vectors. Raises SearchError for one that holds no dense vectors of pgvector."""
        column = self.field(self.columns.vector)
        if column.type not in ("vector", "halfvec"):
            raise SearchError(
                f"table {self.name}: column {column.name} is {column.form}, and no vector or halfvec of pgvector. Name the "
                "column of vectors (--vector-column), or convert this one: ALTER TABLE ... ALTER COLUMN ... TYPE vector(WIDTH) "
                "USING ..."
            )
        return column

    @property
    def filters(self) -> dict[str, tuple[type, ...]]:
        """Columns that `where` may name, and the types of their values."""
        return {
            name: (int,) if field.form in INTEGERS else (str,) if field.type == "uuid" else CATEGORIES[field.category]
            for name, field in self.fields.items()
            if field.category in CATEGORIES or field.type == "uuid"
        }

    # -- parts of statements --

    def uid(self) -> sql.Composed:
        """An item's uid, as a string."""
        own = sql.SQL("{}::text").format(sql.Identifier(self.columns.uid))
        has_column = self.has_own_key and self.key in self.fields
        return sql.SQL("coalesce({}, {})").format(sql.Identifier(self.key), own) if has_column else own

    def select(self, names: Sequence[str], named: bool = False) -> sql.Composed:
        """The columns of an item as far as they are there, else NULL, in this order. named: by the names of the item."""
        parts: list[sql.Composed] = []
        for name in names:
            theirs = getattr(self.columns, name)
            column = sql.SQL("{}").format(sql.Identifier(theirs))
            if name == "uid":
                value = self.uid()
            elif theirs not in self.fields:
                value = sql.SQL("NULL").format()
            elif name in ("text", "source"):
                value = sql.SQL("nullif({}::text, '')").format(column)
            else:
                value = column + sql.SQL("::text") if name == "kind" else column
            parts.append(value + sql.SQL(" AS ") + sql.Identifier(name) if named else value)
        return sql.SQL(", ").join(parts)

    def is_kind(self, kind: Kind | None) -> sql.Composable:
        """The condition for rows of a kind, in the words of the indexes of `nev.search.postgres_changes`."""
        if kind is None:
            return sql.SQL("true")
        if self.columns.kind not in self.fields:
            return sql.SQL("false" if kind == IMAGE else "true")
        operator = "=" if kind == IMAGE else "IS DISTINCT FROM"
        return sql.SQL(f"{{}} {operator} '{IMAGE}'").format(sql.Identifier(self.columns.kind))

    def condition(self, kind: Kind | None, where: Where | None = None) -> tuple[sql.Composed, list[Any]]:
        """The condition for rows with a vector, of a kind, that hold the values; and its parameters."""
        parts = [sql.SQL("{} IS NOT NULL").format(sql.Identifier(self.columns.vector)), self.is_kind(kind)]
        values = []
        for column, value in check_where(where, self.filters).items():
            parts.append(sql.Identifier(column) + sql.SQL(" IS NULL" if value is None else " = %s"))
            values += [] if value is None else [value]
        return sql.SQL(" AND ").join(parts), values

    def compared(self, width: int) -> tuple[sql.Composed, str]:
        """The vector as an index holds it, and the name of its type. A column without a width, or a wide one, is cast."""
        column = self.vector
        form = "halfvec" if column.type == "halfvec" or VECTOR_LIMIT < width <= HALF_LIMIT else "vector"
        cast = f"::{form}({width})" if column.modifier < 0 or column.type != form else ""
        return sql.SQL(f"({{}}{cast})").format(sql.Identifier(column.name)), form

    def document(self) -> sql.Composed:
        """The full text of a row."""
        return sql.SQL("to_tsvector('english', {}::text)").format(sql.Identifier(self.columns.text))

    def has_uid(self, uids: Sequence[str]) -> tuple[sql.Composed, list[Any]]:
        """The condition for rows of these uids, and its parameters."""
        key = sql.Identifier(self.key)
        if not self.has_own_key:
            return sql.SQL("{} = ANY(%s)").format(key), [list(uids)]
        theirs, cast = self._own_uids(uids)
        own = sql.SQL(f"{{}}{cast} = ANY(%s)").format(sql.Identifier(self.columns.uid))
        if self.key not in self.fields:
            return own, [theirs]
        return sql.SQL("{key} = ANY(%s) OR ({own} AND {key} IS NULL)").format(key=key, own=own), [list(uids), theirs]

    def _own_uids(self, uids: Sequence[str]) -> tuple[list[Any], str]:
        """The uids that a text of this table can have, as values of its column `uid`; and a cast of the column to their type."""
        uid = self.field(self.columns.uid)
        if limit := INTEGERS.get(uid.form):
            numbers = (int(each) for each in uids if each.isascii() and each.removeprefix("-").isdecimal())
            return [number for number in numbers if -limit <= number < limit], ""
        if uid.type == "uuid":
            return [UUID(each) for each in uids if len(each) == 36 and _is_uuid(each)], ""
        return list(uids), "::text"


def _is_uuid(text: str) -> bool:
    try:
        return str(UUID(text)) == text
    except ValueError:
        return False


def split_name(table: str) -> tuple[str | None, str]:
    """Schema and name of `NAME` or `SCHEMA.NAME`."""
    schema, _, name = table.rpartition(".")
    return schema or None, name


def find_table(connection: Connection[Any], schema: str | None, name: str) -> tuple[int, str, str, str] | None:
    """oid, schema, name and `relkind` of a table. None: there is none. schema: None is the search path's."""
    return connection.execute(
        "SELECT c.oid, n.nspname, c.relname, c.relkind FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace "
        "WHERE c.oid = to_regclass(concat_ws('.', quote_ident(%s::text), quote_ident(%s::text)))",
        (schema, name),
    ).fetchone()


def describe_table(connection: Connection[Any], table: str, columns: Columns) -> PostgresTable | None:
    """Read what a table is. None: there is no such table. table: `NAME` or `SCHEMA.NAME`."""
    relation = find_table(connection, *split_name(table))
    if relation is None:
        return None
    oid = relation[0]
    fields = {row[0]: Column(*row) for row in connection.execute(COLUMNS, (oid,))}
    unique = frozenset(row[0] for row in connection.execute(UNIQUE, (oid,)))
    return PostgresTable(*relation, fields, unique, columns)
