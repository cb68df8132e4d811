"""The store in LanceDB, embedded in this process, in a folder or on S3.

What nev records lies in the metadata of the vector column: of a table that exists, LanceDB 0.40 changes no other metadata. They
survive merges, new columns, indexes and compaction. Writes are commits: a writer that comes second tries again, and readers see
whole commits, at most CONSISTENCY later.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar, cast

import pyarrow as pa
import pyarrow.compute as pc
from pydantic import ValidationError
from tenacity import Retrying, retry_if_exception, stop_after_attempt, wait_random_exponential

from nev.common.errors import first_line
from nev.data.vectors import as_array, as_column
from nev.ops.vectors import Floats
from nev.search.lance_layout import LanceLayout
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
    StoreFailed,
    StoreSpec,
    Upserted,
    Where,
    check_written,
    draw_uids,
    item_schema,
)
from nev.storage.files import filesystem, is_local

if TYPE_CHECKING:
    from lancedb import DBConnection
    from lancedb.query import LanceVectorQueryBuilder
    from lancedb.table import Table

CONSISTENCY = timedelta(seconds=5)
COMMIT_TRIES = 10
# An IVF index is read whole, as a scan in memory: the partitions near a query of words hold texts alone, and among 200,000 rows
# no picture was found by the usual 20 of them. An HNSW walk to pictures passes all texts on its way.
ALL_PARTITIONS = 100_000
EF_SEARCH = 1_000  # candidates of an HNSW walk
REFINE = 2  # times the rows wanted are compared by their full vectors
CHUNK = 5_000  # uids of one query
PRIMARY_KEY = "lance-schema:unenforced-primary-key"
T = TypeVar("T")


class LanceStore:
    """A table of LanceDB."""

    def __init__(self, location: str, table: str, columns: Columns | None = None) -> None:
        fs, path = filesystem(location)
        self._uri = path if is_local(fs) else location
        self._table_name = table
        self.name = f"{location}, table {table}"
        self._database: DBConnection | None = None
        self._indexes: tuple[int, dict[tuple[str, ...], str]] = (-1, {})  # version of the table, type by columns
        exists = not is_local(fs) or Path(path).is_dir()  # connecting would make the folder
        self._table = self._open_table() if exists else None
        spec = self.read_spec()
        self.columns = columns or (spec.columns if spec else Columns())

    @property
    def width(self) -> int | None:
        """Numbers of a vector. None: there is no table yet."""
        return None if self._table is None else int(self._layout.vector.list_size)

    @property
    def filters(self) -> dict[str, tuple[type, ...]]:
        """Columns that `where` may name, and the types of their values."""
        return self._layout.filters

    @property
    def is_remade(self) -> bool:
        """Never: the record lies in the table."""
        return False

    @property
    def takes_texts(self) -> bool:
        """Whether nev can write texts: uids are strings."""
        return self._table is None or self._layout.key == self.columns.uid

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
        update = {"path": self.columns.vector, "metadata": {KEY: spec.model_dump_json()}}
        self._commit("be written", lambda table: table.update_field_metadata(update))

    def list_changes(self, width: int) -> list[str]:
        """The table, or the columns that the table lacks."""
        if self._table is None:
            return [f"make table {self._table_name} in {self._uri}"]
        missing = [f"{field.name} ({field.type})" for field in self._layout.list_missing()]
        return [f"add columns to table {self._table_name}: {', '.join(missing)}"] if missing else []

    def apply_changes(self, width: int) -> None:
        """Make the table, or add the columns that it lacks. Rows that are there get nulls; their vectors are not touched."""
        if self._table is None:
            fields = [field.with_name(getattr(self.columns, field.name)) for field in item_schema(width)]
            # Two writers at once would both insert a uid that is new: LanceDB sees that by the primary key alone.
            fields[0] = fields[0].with_nullable(False).with_metadata({PRIMARY_KEY: "true"})
            with self._errors("be made"):
                self._table = self._connect().create_table(self._table_name, schema=pa.schema(fields), exist_ok=True)

        def add_columns(table: Table) -> None:
            if missing := self._layout.list_missing():
                table.add_columns(pa.schema(missing))

        self._commit("be changed", add_columns)

    def count(self, kind: Kind | None = None) -> int:
        """Rows with a vector."""
        with self._errors("be read"):
            return int(self._open().count_rows(self._layout.has_vector(kind)))

    def count_without_vector(self) -> int:
        """Rows without a vector, which no search finds."""
        with self._errors("be read"):
            return int(self._open().count_rows(self._layout.no_vector()))

    def upsert(self, items: pa.Table) -> Upserted:
        """Write items by their uid. Of pictures that are there, other columns of the table keep their values."""
        layout = self._layout
        kind: Kind = TEXT if TEXT in items["kind"].to_pylist() else IMAGE
        columns = []
        for ours, theirs in zip(items.column_names, layout.item_names, strict=True):
            form = layout.field(theirs).type
            if ours == "vector":
                columns.append(as_column(as_array(items[ours]).astype(form.value_type.to_pandas_dtype()), form))
            else:
                columns.append(pc.cast(items[ours], form))
        rows = pa.table(columns, schema=pa.schema([layout.field(name) for name in layout.item_names]))

        def merge(table: Table) -> Upserted:
            version = table.version
            builder = table.merge_insert(layout.key).when_matched_update_all(where=layout.is_kind(kind, "target."))
            result = builder.when_not_matched_insert_all().execute(rows)
            if result.version > version + 1:
                self._refuse_twice(items["uid"].to_pylist())
            return Upserted(result.num_inserted_rows, result.num_updated_rows)

        return check_written(self.name, items.num_rows, self._commit("be written", merge))

    def _refuse_twice(self, uids: list[str]) -> None:
        """Raise SearchError where another writer has written the same uids meanwhile, in a table without a primary key."""
        if (rows := self.read(uids, ["uid"]).num_rows) > len(uids):
            raise SearchError(
                f"{self.name}: another process wrote the same items at the same time, and {rows - len(uids):,} are there "
                "twice. Run one `nev index` at a time for a table that nev has not made; --replace-images writes the pictures "
                "anew"
            )

    def delete_images(self) -> int:
        """Delete all pictures."""
        before = self.count(IMAGE)
        self._commit("be written", lambda table: table.delete(self._layout.is_kind(IMAGE)))
        return before - self.count(IMAGE)

    def search(self, vector: Floats, top: int, kind: Kind, where: Where | None = None) -> pa.Table:
        """The nearest items of a kind. The kind and `where` are applied before the search, not to its results."""
        layout = self._layout
        condition = layout.condition(kind, where)

        def run(exact: bool) -> pa.Table:
            builder = self._open().search(vector, vector_column_name=self.columns.vector, query_type="vector")
            query = cast("LanceVectorQueryBuilder", builder).distance_type("cosine").limit(top)
            query = query.where(condition, prefilter=True)
            if exact:
                query = query.bypass_vector_index()
            elif index is not None:
                query = query.nprobes(ALL_PARTITIONS)
                query = query.ef(max(EF_SEARCH, REFINE * top)).refine_factor(REFINE) if "Hnsw" in index else query
            return query.select([*layout.select(HIT_COLUMNS), "_distance"]).to_arrow()

        with self._errors("be searched"):
            index = self._index_of(self.columns.vector)
            rows = run(exact=False)
            # The walk through a graph can end before it has seen enough rows that pass a strict filter.
            if rows.num_rows < top and index is not None:
                rows = run(exact=True)
        return layout.as_items(rows, HIT_COLUMNS)

    def search_words(self, words: str, top: int, kind: Kind | None = None, where: Where | None = None) -> pa.Table:
        """The most relevant items (BM25): any of the words occurs."""
        from lancedb.query import MatchQuery

        layout = self._layout
        if not self._index_of(self.columns.text):
            raise SearchError(
                f"{self.name}: column {self.columns.text} has no full-text index. `nev index --full-text` makes one"
            )
        with self._errors("be searched"):
            match = MatchQuery(words, self.columns.text)  # type: ignore[call-arg]
            query = self._open().search(match, query_type="fts").where(layout.condition(kind, where), prefilter=True)
            rows = query.limit(top).select([*layout.select(HIT_COLUMNS), "_score"]).to_arrow()
        return layout.as_items(rows.filter(pc.is_valid(rows[self.columns.vector])), HIT_COLUMNS)

    def read(self, uids: Sequence[str], columns: Sequence[str] | None = None) -> pa.Table:
        """The items of these uids that are there."""
        wanted, layout, parts = tuple(columns or item_schema(1).names), self._layout, []
        with self._errors("be read"):
            for start in range(0, max(len(uids), 1), CHUNK):
                query = self._open().search().where(layout.has_uid(uids[start : start + CHUNK])).limit(None)
                parts.append(query.select(layout.select(wanted)).to_arrow())
        return layout.as_items(pa.concat_tables(parts), wanted)

    def sample(self, kind: Kind, count: int, seed: int = 0) -> pa.Table:
        """At most `count` items of a kind that have a vector."""
        layout = self._layout
        with self._errors("be read"):
            query = self._open().search().where(layout.has_vector(kind)).limit(None)
            rows = query.select(layout.select(("uid",))).to_arrow()
        uids = layout.as_items(rows, ("uid",))["uid"].to_pylist()
        return self.read(draw_uids(uids, count, seed), SAMPLE_COLUMNS)

    def check_indexes(self, ann: Ann, full_text: bool, width: int) -> None:
        """LanceDB makes all of them, of any width."""

    def close(self) -> None:
        """LanceDB has no connections."""

    def build(self, ann: Ann, full_text: bool) -> list[str]:
        """Make the indexes, or add new rows to those that are there, and compact the files."""
        from lancedb.index import FTS, HnswSq, IvfFlat

        vector, text, rows = self.columns.vector, self.columns.text, self.count()
        chosen = ann if ann != "auto" else "ivf" if rows >= ANN_ROWS else "none"

        def make(table: Table) -> None:
            if full_text and not self._index_of(text):
                table.create_index(text, config=FTS())
            if chosen != "none" and not self._index_of(vector):
                kind = HnswSq if chosen == "hnsw" else IvfFlat
                table.create_index(vector, config=kind(distance_type="cosine"))
            table.optimize()

        self._commit("be indexed", make)
        search = f"{self._index_of(vector) or 'full scan'} of {rows:,} rows"
        return [f"vectors: {search}", f"full text: {'BM25' if self._index_of(text) else 'none'}"]

    # -- the database --

    @property
    def _layout(self) -> LanceLayout:
        return LanceLayout(self.name, self._open().schema, self.columns)

    def _open(self) -> Table:
        if self._table is None:
            raise SearchError(f"{self.name}: no such table. `nev index` makes one")
        return self._table

    def _index_of(self, column: str) -> str | None:
        """The type of the index of a column. None: there is none, or it is by another distance than the cosine."""
        table = self._open()
        version = table.version
        if self._indexes[0] != version:
            types = {}
            for index in table.list_indices():
                distance = getattr(table.index_stats(index.name), "distance_type", None)
                if distance in (None, "cosine"):
                    types[tuple(index.columns)] = str(index.index_type)
            self._indexes = version, types
        return self._indexes[1].get((column,))

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
            self._database = lancedb.connect(self._uri, storage_options=options, read_consistency_interval=CONSISTENCY)
        return self._database

    def _open_table(self) -> Table | None:
        with self._errors("be opened"):
            try:
                return self._connect().open_table(self._table_name)
            except ValueError as error:
                if "was not found" in str(error):
                    return None
                raise

    def _commit(self, action: str, change: Callable[[Table], T]) -> T:
        """Make a change of the newest version, again where another writer was first: LanceDB itself repeats merges alone."""

        def attempt() -> T:
            table = self._open()
            table.checkout_latest()  # type: ignore[no-untyped-call]
            return change(table)

        retrying = Retrying(
            retry=retry_if_exception(lambda error: "conflict" in str(error) or "concurrent" in str(error)),
            wait=wait_random_exponential(multiplier=0.1, max=5),
            stop=stop_after_attempt(COMMIT_TRIES),
            reraise=True,
        )
        with self._errors(action):
            return retrying(attempt)

    @contextmanager
    def _errors(self, action: str) -> Iterator[None]:
        """LanceDB raises ValueError, RuntimeError and OSError with long messages."""
        try:
            yield
        except SearchError:
            raise
        except (ValueError, RuntimeError, OSError) as error:
            kind = SearchError if isinstance(error, ValueError) else StoreFailed
            raise kind(f"{self.name} cannot {action}: {first_line(error)}") from error
