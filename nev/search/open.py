"""Chooses the store of a location."""

from __future__ import annotations

from typing import Literal

from nev.search.store import Columns, SearchError, VectorStore
from nev.storage.files import filesystem, storage_errors_as

StoreKind = Literal["lancedb", "postgres", "exact"]
STORES = ("lancedb", "postgres", "exact")
POSTGRES = ("postgresql://", "postgres://")


def open_store(location: str, table: str, columns: Columns | None = None, store: str | None = None) -> VectorStore:
    """The store of a location. Nothing is written; the table may be absent.

    columns: names of the table's columns. None: as recorded in the store, else those of `Columns`.
    store: one of STORES. None: by the location.
    """
    kind = store or choose_store(location)
    if kind not in STORES:
        raise SearchError(f"store {kind!r}: it is one of {', '.join(STORES)}")
    if (kind == "postgres") != location.startswith(POSTGRES):
        raise SearchError(
            f"store {kind}: PostgreSQL has a location postgresql://..., other stores a folder or s3://..."
        )
    if kind == "postgres":
        try:
            from nev.search.postgres import PostgresStore
        except ImportError as error:
            raise SearchError("psycopg and pgvector are not installed: pip install 'nev[postgres]'") from error
        return PostgresStore(location, table, columns)
    if kind == "lancedb":
        from nev.search.lance import LanceStore

        return LanceStore(location, table, columns)
    from nev.search.exact import ExactStore

    if columns not in (None, Columns()):
        raise SearchError("the exact store holds tables of nev alone: leave the names of columns out")
    return ExactStore(location, table)


def choose_store(location: str) -> StoreKind:
    """`postgres` by the URL, `exact` for a folder with parquet files, else `lancedb`."""
    if location.startswith(POSTGRES):
        return "postgres"
    if "://" in location and not location.startswith("s3://"):
        raise SearchError(
            f"{location.split('://')[0]}://: an index lies in a folder, s3://BUCKET/PREFIX or postgresql://..."
        )
    fs, path = filesystem(location)
    with storage_errors_as(location, "listed", kind=SearchError):
        names = [entry.rstrip("/").rpartition("/")[2] for entry in fs.ls(path, detail=False)] if fs.exists(path) else []
    lance, parquet = (any(name.endswith(ending) for name in names) for ending in (".lance", ".parquet"))
    if lance and parquet:
        raise SearchError(
            f"{location} has tables of LanceDB and parquet files: choose by --store {' or '.join(STORES[::2])}"
        )
    return "exact" if parquet else "lancedb"
