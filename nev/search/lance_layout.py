"""What a table of LanceDB is: its columns, and the conditions that depend on them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.compute as pc

from nev.common.errors import first_few
from nev.search.store import IMAGE, TEXT, Columns, Kind, SearchError, Where, check_where, item_schema

if TYPE_CHECKING:
    from lancedb.expr import Expr


@dataclass(frozen=True)
class LanceLayout:
    """The columns of a table. name: of the table, for messages. columns: which of them are those of an item."""

    name: str
    schema: pa.Schema
    columns: Columns

    def field(self, name: str) -> pa.Field:
        """A column. Raises SearchError where there is none of this name."""
        if name not in self.schema.names:
            raise SearchError(f"{self.name}: there is no column {name}. The columns are {', '.join(self.schema.names)}")
        return self.schema.field(name)

    @property
    def vector(self) -> pa.DataType:
        """The type of the vectors. Raises SearchError for a column that LanceDB cannot search by vector."""
        form = self.field(self.columns.vector).type
        if not pa.types.is_fixed_size_list(form) or not pa.types.is_floating(form.value_type):
            raise SearchError(
                f"{self.name}: column {self.columns.vector} is {form}, and no list of a fixed number of floats"
            )
        return form

    @property
    def key(self) -> str:
        """The column by which pictures are found: `uid` where it holds strings, else `image_uid`."""
        has_strings = holds(self.field(self.columns.uid).type, pa.string())
        return self.columns.uid if has_strings else self.columns.image_uid

    @property
    def item_names(self) -> list[str]:
        """The table's names for the columns of an item, in its order."""
        return [self.key, *(getattr(self.columns, name) for name in item_schema(1).names[1:])]

    @property
    def filters(self) -> dict[str, tuple[type, ...]]:
        """Columns that `where` may name, and the types of their values."""
        return {field.name: types for field in self.schema if (types := _python_types(field.type))}

    def list_missing(self) -> list[pa.Field]:
        """Columns that the table lacks for pictures. Raises SearchError for a table that cannot take pictures."""
        columns, form = self.columns, item_schema(1).field
        needed = {getattr(columns, name): form(name).type for name in ("kind", "text", "source", "thumbnail")}
        if self.key == columns.image_uid:
            needed[columns.image_uid] = pa.string()
        for name, wanted in needed.items():
            if name in self.schema.names and not holds(self.schema.field(name).type, wanted):
                raise SearchError(
                    f"{self.name}: column {name} is {self.schema.field(name).type}, and nev writes {wanted} there. Name "
                    "another column, which is added where it is not there (--kind-column, --text-column, --source-column, "
                    "--thumbnail-column)"
                )
        written = {*needed, columns.vector, self.key}
        if strict := [field.name for field in self.schema if not field.nullable and field.name not in written]:
            raise SearchError(
                f"{self.name}: a picture has no value for {first_few(strict)}, where null is not allowed. Nothing was written. "
                "Allow"
                'it: table.alter_columns({"path": ..., "nullable": True})'
            )
        return [pa.field(name, wanted) for name, wanted in needed.items() if name not in self.schema.names]

    # -- rows --

    def select(self, names: Sequence[str]) -> list[str]:
        """The table's columns for some of an item's, as far as they are there."""
        theirs = [getattr(self.columns, name) for name in names]
        theirs += [self.key] if "uid" in names and self.key not in theirs else []
        return [name for name in theirs if name in self.schema.names]

    def as_items(self, rows: pa.Table, names: Sequence[str]) -> pa.Table:
        """Rows of the table as items."""
        values = {}
        for name in names:
            theirs = getattr(self.columns, name)
            values[name] = rows[theirs] if theirs in rows.column_names else pa.nulls(rows.num_rows, pa.string())
        if "uid" in values:
            values["uid"] = pc.cast(values["uid"], pa.string())
            if self.key != self.columns.uid and self.key in rows.column_names:
                values["uid"] = pc.coalesce(rows[self.key], values["uid"])
        if "kind" in values:
            values["kind"] = pc.if_else(pc.fill_null(pc.equal(values["kind"], IMAGE), False), IMAGE, TEXT)
        return pa.table(values)

    # -- conditions --

    def is_kind(self, kind: Kind, table: str = "") -> str:
        """The condition for rows of a kind, as SQL: a name and a constant. table: before the name, as in a merge."""
        if self.columns.kind not in self.schema.names:
            return "false" if kind == IMAGE else "true"
        column = table + _quote(self.columns.kind)
        return f"{column} = '{IMAGE}'" if kind == IMAGE else f"({column} IS NULL OR {column} <> '{IMAGE}')"

    def has_vector(self, kind: Kind | None = None) -> str:
        """The condition for rows with a vector, as SQL."""
        condition = f"{_quote(self.columns.vector)} IS NOT NULL"
        return f"{condition} AND {self.is_kind(kind)}" if kind else condition

    def no_vector(self) -> str:
        """The condition for rows without a vector, as SQL."""
        return f"{_quote(self.columns.vector)} IS NULL"

    def condition(self, kind: Kind | None, where: Where | None) -> Expr:
        """The condition for rows of a kind that hold the values.

        It is no SQL: LanceDB 0.40 turns the string \\' OR true into code (`Expr.to_sql`). Its expressions have no IS NULL, but
        `concat` makes an empty string of NULL alone, after a cast of numbers to strings.
        """
        from lancedb.expr import col, func, lit

        has_kinds = self.columns.kind in self.schema.names
        condition = lit(1) == lit(1)
        if kind == IMAGE:
            condition = col(self.columns.kind) == lit(IMAGE) if has_kinds else lit(1) == lit(0)
        elif kind == TEXT and has_kinds:
            condition = func("concat", col(self.columns.kind)) != lit(IMAGE)
        for column, value in check_where(where, self.filters).items():
            if value is not None:
                condition = condition & (col(column) == lit(value))
                continue
            number = func("octet_length", col(column)) if self.filters[column] == (str,) else col(column)
            condition = condition & (func("concat", number.cast("string")) == lit(""))
        return condition

    def has_uid(self, uids: Sequence[str]) -> Expr:
        """The condition for rows of these uids."""
        from lancedb.expr import col, lit

        condition = lit(1) == lit(0)
        if uids and self.key in self.schema.names:
            condition = col(self.key).isin([lit(uid) for uid in uids])
        numbers = [int(uid) for uid in uids if _is_integer(uid)]
        if numbers and self.key != self.columns.uid:
            condition = condition | col(self.columns.uid).isin([lit(number) for number in numbers])
        return condition


def _quote(column: str) -> str:
    return "`" + column.replace("`", "``") + "`"


def _is_integer(uid: str) -> bool:
    digits = uid.removeprefix("-")
    return digits.isascii() and digits.isdecimal() and len(digits) < 19


def holds(form: pa.DataType, wanted: pa.DataType) -> bool:
    """Whether a column of this type holds what nev writes: strings, or bytes."""
    return form in ((pa.string(), pa.large_string()) if wanted == pa.string() else (pa.binary(), pa.large_binary()))


def _python_types(form: pa.DataType) -> tuple[type, ...]:
    """The types of values that a column of this type is compared with. Empty: it cannot be compared."""
    if holds(form, pa.string()):
        return (str,)
    if pa.types.is_boolean(form):
        return (bool,)
    if pa.types.is_integer(form):
        return (int,)
    return (int, float) if pa.types.is_floating(form) else ()
