"""Indexes of tables in PostgreSQL: made once, of vectors of any width, and no row is lost behind a filter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import psycopg
import pytest
from helpers.search import draw_vectors, fill_store, list_indexes, make_store

from nev.search.index import Index, open_index
from nev.search.store import SearchError


def test_indexes_are_made_once_and_a_broken_one_again(
    postgres: str, database: psycopg.Connection[Any], tmp_path: Path
) -> None:
    store = make_store("postgres", tmp_path, postgres)
    fill_store(store, draw_vectors(300, 1, 0.5), draw_vectors(200, 2, 0.5), None)
    assert store.build("auto", False) == ["vectors: full scan of 500 rows", "full text: full scan"]
    assert list_indexes(database, "items") == {"items_pkey"}
    assert store.build("hnsw", True) == [
        "vectors: index of (kind = 'image'::text) and of (kind IS DISTINCT FROM 'image'::text)",
        "full text: index",
    ]
    made = {
        "items_pkey",
        "items_nev_full_text",
        *(f"items_nev_{kind}" for kind in ("image", "text", "image_hnsw", "text_hnsw")),
    }
    assert list_indexes(database, "items") == made
    oids = database.execute("SELECT oid FROM pg_class WHERE relname LIKE 'items_nev%' ORDER BY 1").fetchall()
    store.build("hnsw", True)
    assert database.execute("SELECT oid FROM pg_class WHERE relname LIKE 'items_nev%' ORDER BY 1").fetchall() == oids
    database.execute("UPDATE pg_index SET indisvalid = false WHERE indexrelid = 'items_nev_image_hnsw'::regclass")
    store.build("hnsw", True)
    assert database.execute("SELECT bool_and(indisvalid) FROM pg_index").fetchone() == (True,)
    with pytest.raises(SearchError, match="--ann ivf is of LanceDB"):
        store.build("ivf", False)


def plan_of(index: Index, database: psycopg.Connection[Any], kind: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """PostgreSQL's plan for a search of a kind."""
    statements: list[Any] = []
    execute = psycopg.Connection.execute

    def record(self: Any, query: Any, *arguments: Any, **options: Any) -> Any:
        statements.append((query, *arguments))
        return execute(self, query, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(psycopg.Connection, "execute", record)
        index.store.search(draw_vectors(1, 5, 0.0)[0], 20, kind)  # type: ignore[arg-type]
    query, parameters = next(each for each in statements if not isinstance(each[0], str))
    parameters = (str(parameters[0].tolist()), *parameters[1:])
    text = query.as_string(database).replace("<=> %s::vector", "<=> %s::text::vector")
    return "\n".join(row[0] for row in database.execute("EXPLAIN " + text, parameters).fetchall())


@pytest.mark.slow
def test_a_filter_with_an_index_loses_no_row(
    postgres: str, database: psycopg.Connection[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """5,000 texts with an index of all rows, as their owner made it, and 40 pictures; then a filter that 5 texts pass."""
    store = make_store("postgres", tmp_path, postgres)
    texts = draw_vectors(5000, 2, 0.6)
    fill_store(store, draw_vectors(40, 1, -0.6), texts, None)
    database.execute("CREATE INDEX owners ON items USING hnsw (vector vector_cosine_ops)")
    database.execute("UPDATE items SET source = 'rare' WHERE uid IN ('t001', 't1001', 't2001', 't3001', 't4001')")
    store.build("hnsw", False)
    assert list_indexes(database, "items") == {
        "items_pkey",
        "owners",
        "items_nev_image",
        "items_nev_text",
        "items_nev_image_hnsw",
    }
    index = open_index(postgres)
    query = draw_vectors(1, 5, 0.6)[0]
    assert len(index.search(query, top=40, kind="image")) == 40
    assert "items_nev_image" in plan_of(index, database, "image", monkeypatch), (
        "few rows: no walk through those of texts"
    )
    assert "owners" in plan_of(index, database, "text", monkeypatch)
    assert len(index.search(query, top=700, kind="text")) == 700, (
        "more than a walk has candidates (pgvector's issue 716)"
    )
    rare = index.search(query, top=10, where={"source": "rare"})
    assert {hit.uid for hit in rare} == {"t001", "t1001", "t2001", "t3001", "t4001"}
    for setting in (
        "hnsw.max_scan_tuples = 50",
        "enable_sort = off",
        "enable_seqscan = off",
        "enable_bitmapscan = off",
    ):
        database.execute(
            f"ALTER DATABASE {database.info.dbname} SET {setting}"
        )  # the planner walks, however few rows pass
    assert len(open_index(postgres).search(query, top=10, where={"source": "rare"})) == 5, "the walk ended too early"
    exact = {f"t{row:03d}" for row in np.argsort(-(texts @ query))[:10]}
    assert len({hit.uid for hit in index.search(query, top=10, kind="text")} & exact) >= 9


def test_wide_vectors_have_an_index_of_half_the_bits(
    postgres: str, database: psycopg.Connection[Any], tmp_path: Path
) -> None:
    store = make_store("postgres", tmp_path, postgres)
    images = draw_vectors(60, 1, 0.5, 2304)
    fill_store(store, images, draw_vectors(5, 2, 0.5, 2304), None)
    store.build("hnsw", False)
    row = database.execute("SELECT indexdef FROM pg_indexes WHERE indexname = 'items_nev_image_hnsw'").fetchone()
    assert row is not None
    assert "(vector)::halfvec(2304)) halfvec_cosine_ops" in row[0]
    hits = open_index(postgres).search(images[7], "image", top=1)
    assert (hits[0].uid, hits[0].score) == ("p007", pytest.approx(1, abs=1e-6))
