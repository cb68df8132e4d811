"""Connections to PostgreSQL: lost ones, several threads and writers, locks, rows that change, and no password in messages."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import psycopg
import pytest
from helpers.search import (
    USUAL,
    WORDS,
    add_pictures,
    draw_vectors,
    fill_store,
    list_indexes,
    make_images,
    make_store,
    write_rows,
)

from nev.inference.model import Model
from nev.search import postgres as postgres_store
from nev.search.index import open_index
from nev.search.open import open_store
from nev.search.store import SearchError, StoreFailed, StoreSpec, Upserted, make_items

WIDTH = 48


def test_a_connection_that_the_server_has_closed_is_opened_again(
    postgres: str, database: psycopg.Connection[Any], tmp_path: Path
) -> None:
    fill_store(make_store("postgres", tmp_path, postgres), draw_vectors(5, 1, 0), draw_vectors(5, 2, 0), None)
    index = open_index(postgres)
    assert index.count() == 10
    killed = database.execute(
        "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity WHERE datname = current_database() AND pid <> "
        "pg_backend_pid()"
    ).fetchone()
    assert killed
    assert killed[0] >= 1
    assert index.count() == 10
    assert len(index.search(np.ones(24), top=99)) == 10


def test_threads_search_at_once(postgres: str, tmp_path: Path) -> None:
    fill_store(make_store("postgres", tmp_path, postgres), draw_vectors(50, 1, 0), draw_vectors(50, 2, 0), None)
    index = open_index(postgres)
    expected = [hit.uid for hit in index.search(np.ones(24))]
    found: list[list[str]] = []
    threads = [
        threading.Thread(target=lambda: found.append([hit.uid for hit in index.search(np.ones(24))])) for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [expected] * 8


def test_two_writers_at_once(postgres: str, database: psycopg.Connection[Any], tmp_path: Path) -> None:
    """Both make the table, write the same pictures, and make the indexes."""
    errors: list[BaseException] = []
    barrier = threading.Barrier(2)

    def write() -> None:
        try:
            store = make_store("postgres", tmp_path, postgres)
            barrier.wait()
            store.apply_changes(24)
            store.write_spec(StoreSpec(width=24))
            for _ in range(3):
                store.upsert(make_images(draw_vectors(200, 1, 0)))
            store.build("hnsw", True)
        except BaseException as error:  # noqa: BLE001  shown by the assertion below
            errors.append(error)

    threads = [threading.Thread(target=write) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert database.execute("SELECT count(*), count(DISTINCT uid) FROM items").fetchone() == (200, 200)
    assert len(list_indexes(database, "items")) == 6


def test_a_change_does_not_wait_behind_a_long_transaction(
    postgres: str, database: psycopg.Connection[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    database.execute("CREATE TABLE docs (id text PRIMARY KEY, content text, embedding vector(48))")
    monkeypatch.setattr(postgres_store, "LOCK_TIMEOUT", "SET LOCAL lock_timeout = '50ms'")
    store = open_store(postgres, "docs", USUAL)
    with database.transaction():
        database.execute("LOCK TABLE docs IN ACCESS SHARE MODE")
        with pytest.raises(SearchError, match="another transaction uses the table for long"):
            store.apply_changes(WIDTH)
    store.apply_changes(WIDTH)
    assert store.list_changes(WIDTH) == []


def test_a_search_that_waits_too_long_is_ended(
    postgres: str, database: psycopg.Connection[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill_store(make_store("postgres", tmp_path, postgres), draw_vectors(9, 1, 0), draw_vectors(9, 2, 0), None)
    index = open_index(postgres)
    monkeypatch.setattr("nev.search.postgres_connections.SEARCH_SECONDS", 0.1)
    query = np.ones(index.width)
    assert index.search(query, words="red")
    with database.transaction():
        database.execute("LOCK TABLE items IN ACCESS EXCLUSIVE MODE")
        for words in (None, "red"):
            with pytest.raises(StoreFailed, match="statement timeout"):
                index.search(query, words=words)
    assert index.search(query, top=3)


def test_a_table_made_again_under_the_same_name_is_compared_again(
    postgres: str, database: psycopg.Connection[Any], model: Model, folder: str
) -> None:
    definition = "CREATE TABLE docs (id bigserial PRIMARY KEY, content text NOT NULL, embedding vector(48))"
    database.execute(definition)
    write_rows(database, model, "docs")
    add_pictures(postgres, "docs", USUAL, folder, model)
    database.execute("DROP TABLE docs")
    database.execute(definition)
    for text, vector in zip(WORDS, draw_vectors(len(WORDS), 9, 0.0, WIDTH), strict=True):
        database.execute("INSERT INTO docs (content, embedding) VALUES (%s, %s)", (text, str(vector.tolist())))
    with pytest.raises(SearchError, match="made by another text encoder"):
        add_pictures(postgres, "docs", USUAL, folder, model)


def test_messages_name_no_password(postgres: str) -> None:
    secret = "postgresql://someone:hunter2@127.0.0.1:1/db"
    with pytest.raises(SearchError, match=r"PostgreSQL db on 127\.0\.0\.1 cannot be reached") as caught:
        open_store(secret, "items")
    assert "hunter2" not in str(caught.value)
    with pytest.raises(SearchError, match="cannot be read") as caught:
        open_store("postgresql://a:hunter2@host:port:port/x?y", "items")
    assert "hunter2" not in str(caught.value)


def test_a_kind_that_counts_is_upserted_by_its_uid(
    postgres: str, database: psycopg.Connection[Any], tmp_path: Path
) -> None:
    """A picture that another program deletes between two runs is new again."""
    store = fill_store(make_store("postgres", tmp_path, postgres), draw_vectors(9, 1, 0), draw_vectors(9, 2, 0), None)
    database.execute("DELETE FROM items WHERE uid = 'p003'")
    assert store.upsert(make_images(draw_vectors(9, 1, 0))) == Upserted(1, 8)
    assert store.upsert(make_items("image", ["p003"], draw_vectors(1, 5, 0))) == Upserted(0, 1)
