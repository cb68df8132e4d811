"""Connections to PostgreSQL, shared by threads: each call has one of its own, and idle ones are used again."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Lock
from typing import Any, TypeVar

import psycopg
from pgvector.psycopg import register_vector
from psycopg.conninfo import conninfo_to_dict

from nev.common.errors import first_line
from nev.search.store import SearchError, StoreFailed

CONNECT_SECONDS = 10
LOCK_SECONDS = 600
SEARCH_SECONDS = 60  # of a statement that searches, where the server or the user has set no limit
T = TypeVar("T")


class Connections:
    """Connections to one database. `name`: the database for messages, without a password."""

    def __init__(self, location: str) -> None:
        self._location = location
        self._idle: list[psycopg.Connection[Any]] = []
        self._lock = Lock()
        try:
            parts = conninfo_to_dict(location)
        except psycopg.Error:
            raise SearchError(  # PostgreSQL's own message repeats the address, and a password in it
                "the address of PostgreSQL cannot be read. It is postgresql://USER@HOST:PORT/DATABASE, with special characters "
                "percent-encoded (% is %25, @ is %40)"
            ) from None
        self.name = f"PostgreSQL {parts.get('dbname') or ''} on {parts.get('host') or 'this machine'}"

    @contextmanager
    def use(self, action: str) -> Iterator[psycopg.Connection[Any]]:
        """A connection in autocommit. Errors of PostgreSQL become SearchErrors. action: for the message, as "be searched"."""
        connection = self._take()
        try:
            yield connection
        except psycopg.Error as error:
            kind = StoreFailed if isinstance(error, psycopg.OperationalError) else SearchError
            raise kind(f"{self.name} cannot {action}: {_explain(error)}") from error
        finally:
            if not connection.closed:
                with self._lock:
                    self._idle.append(connection)

    def read(self, action: str, work: Callable[[psycopg.Connection[Any]], T]) -> T:
        """Call `work`, which only reads, with a connection; once more where the server had closed an idle one."""
        try:
            with self.use(action) as connection:
                return work(connection)
        except SearchError as error:
            if not _is_lost(error.__cause__):
                raise
        self.close()
        with self.use(action) as connection:
            return work(connection)

    def close(self) -> None:
        """Close the idle connections."""
        with self._lock:
            idle, self._idle = self._idle, []
        for connection in idle:
            connection.close()

    def _take(self) -> psycopg.Connection[Any]:
        with self._lock:
            if self._idle:
                return self._idle.pop()
        try:
            # Without prepared statements: a pooler between may change servers, and plans depend on the values.
            connection = psycopg.connect(
                self._location, autocommit=True, prepare_threshold=None, connect_timeout=CONNECT_SECONDS
            )
        except psycopg.Error as error:
            raise StoreFailed(f"{self.name} cannot be reached: {first_line(error)}") from None
        register_types(connection)
        return connection


@contextmanager
def limit_seconds(connection: psycopg.Connection[Any]) -> Iterator[None]:
    """A transaction whose statements PostgreSQL ends after SEARCH_SECONDS, or after the user's own limit."""
    with connection.transaction():
        connection.execute(
            "SELECT set_config('statement_timeout', %s, true) WHERE current_setting('statement_timeout') = '0'",
            (f"{SEARCH_SECONDS}s",),
        )
        yield


@contextmanager
def hold_lock(connection: psycopg.Connection[Any], name: str) -> Iterator[None]:
    """Let one process at a time into a block, of all that name the lock. Raises SearchError after LOCK_SECONDS of waiting.

    The lock is asked for again and again: a statement that waits would hold up CREATE INDEX CONCURRENTLY, and so itself.
    """
    start = time.monotonic()
    while connection.execute("SELECT pg_try_advisory_lock(hashtext(%s))", (name,)).fetchone() != (True,):
        if time.monotonic() - start > LOCK_SECONDS:
            raise SearchError("another `nev index` changes this database: wait until its indexes are made")
        time.sleep(0.2)
    try:
        yield
    finally:
        if not connection.closed:
            connection.execute("SELECT pg_advisory_unlock(hashtext(%s))", (name,))


def register_types(connection: psycopg.Connection[Any]) -> None:
    """Let a connection read and write vectors, where the database has pgvector."""
    if psycopg.types.TypeInfo.fetch(connection, "vector") is not None:
        register_vector(connection)


def _explain(error: psycopg.Error) -> str:
    if isinstance(error, psycopg.errors.LockNotAvailable):
        return (
            "another transaction uses the table for long. Nothing was changed: run the command again at a quieter time"
        )
    detail = f" ({error.diag.message_detail})" if error.diag.message_detail else ""
    return first_line(error) + detail


def _is_lost(error: BaseException | None) -> bool:
    """Whether the connection was lost, or the server shut down."""
    return isinstance(error, psycopg.OperationalError) and (error.sqlstate or "08").startswith(("08", "57P"))
