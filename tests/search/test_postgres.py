"""Tables in PostgreSQL that other programs made: what nev adds to them, what it leaves alone, and what it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import psycopg
import pytest
from helpers.search import USUAL, WORDS, add_pictures, draw_vectors, dump, make_texts, write_rows
from typer.testing import CliRunner

from nev.commands.main import app
from nev.inference.model import Model
from nev.search.index import open_index
from nev.search.open import open_store
from nev.search.plan import Options, Task, make_plan
from nev.search.store import Columns, SearchError

WIDTH = 48
TABLES = {
    "bigserial": "id bigserial PRIMARY KEY, content text NOT NULL, embedding vector(48) NOT NULL",
    "identity": "id int GENERATED ALWAYS AS IDENTITY PRIMARY KEY, content varchar(90), embedding vector(48)",
    "uuid": "id uuid PRIMARY KEY DEFAULT gen_random_uuid(), content text, embedding halfvec(48)",
    "no width": "id bigserial PRIMARY KEY, content text, embedding vector",
    "defaults": "id bigserial PRIMARY KEY, tenant int NOT NULL DEFAULT 7, content text, embedding vector(48)",
}


@pytest.mark.parametrize("definition", TABLES.values(), ids=TABLES)
def test_pictures_join_a_table_and_nothing_there_changes(
    postgres: str, database: psycopg.Connection[Any], model: Model, folder: str, definition: str
) -> None:
    database.execute(f'CREATE TABLE "My Docs" ({definition})')
    write_rows(database, model, '"My Docs"')
    database.execute('INSERT INTO "My Docs" (content, embedding) VALUES (%s, %s)', ("", str([1.0] + [0.0] * 47)))
    before = dump(database, '"My Docs"')
    index = add_pictures(postgres, "My Docs", USUAL, folder, model)
    assert [row for row in dump(database, '"My Docs"') if row[0] in {old[0] for old in before}] == before
    assert (index.count("text"), index.count("image")) == (len(WORDS) + 1, 20)
    hits = index.search(model.encode_text(WORDS[4], kind="document"), top=3, kind="text")
    assert (hits[0].text, hits[0].uid) == (
        WORDS[4],
        str(before[4][0]) if isinstance(before[0][0], int) else hits[0].uid,
    )
    assert hits[0].score == pytest.approx(1, abs=1e-3)
    picture = index.search(draw_vectors(20, 3, 0.5, WIDTH)[5], "image", top=1, kind="image")[0]
    assert (picture.uid, picture.source, picture.text) == ("a/05.jpg", "a/05.jpg", None)
    assert index.vector(hits[0].uid) is not None
    assert index.store.read([hits[0].uid, "a/05.jpg"], ["uid", "kind"]).sort_by("kind").to_pylist() == [
        {"uid": "a/05.jpg", "kind": "image"},
        {"uid": hits[0].uid, "kind": "text"},
    ]
    again = add_pictures(postgres, "My Docs", None, folder, model, alter_table=False)
    assert again.count() == index.count()


def test_the_same_pictures_twice_write_no_row(
    postgres: str, database: psycopg.Connection[Any], model: Model, folder: str
) -> None:
    database.execute("CREATE TABLE docs (id bigserial PRIMARY KEY, content text NOT NULL, embedding vector(48))")
    write_rows(database, model, "docs")
    add_pictures(postgres, "docs", USUAL, folder, model)
    versions = dump(database, "docs", "id, xmin::text, ctid::text")
    add_pictures(postgres, "docs", None, folder, model)
    assert dump(database, "docs", "id, xmin::text, ctid::text") == versions, "not even a version of a row is new"


def test_string_keys_take_the_uid_of_a_picture(
    postgres: str, database: psycopg.Connection[Any], model: Model, folder: str
) -> None:
    """As langchain_pg_embedding: a varchar key, a vector without a width, rows without vectors and texts."""
    database.execute(
        "CREATE SCHEMA rag; CREATE TABLE rag.docs (id varchar PRIMARY KEY, embedding vector, document varchar, cmetadata jsonb)"
    )
    for number, (text, vector) in enumerate(zip(WORDS, model.encode_text(WORDS, kind="document"), strict=True)):
        database.execute(
            "INSERT INTO rag.docs VALUES (%s, %s, %s, %s)", (f"doc-{number}", str(vector.tolist()), text, '{"page": 1}')
        )
    database.execute("INSERT INTO rag.docs (id, document) VALUES ('empty', 'without a vector')")
    database.execute("INSERT INTO rag.docs (id, embedding) VALUES ('mute', (SELECT embedding FROM rag.docs LIMIT 1))")
    columns = Columns(uid="id", vector="embedding", text="document")
    index = add_pictures(postgres, "rag.docs", columns, folder, model)
    assert dump(database, "rag.docs", "count(*)")[0][0] == len(WORDS) + 22
    assert (index.count("text"), index.count("image"), index.store.count_without_vector()) == (len(WORDS) + 1, 20, 1)
    found = {hit.uid for hit in index.search(np.ones(WIDTH), top=99)}
    assert "mute" in found
    assert "empty" not in found
    assert database.execute("SELECT count(*) FROM rag.nev_index").fetchone() == (1,)


def test_the_statements_are_shown_and_need_permission(
    postgres: str, database: psycopg.Connection[Any], model: Model, checkpoint: str, folder: str
) -> None:
    database.execute("CREATE TABLE docs (id bigserial PRIMARY KEY, content text NOT NULL, embedding vector(48))")
    write_rows(database, model, "docs")
    arguments = ["index", "--model", checkpoint, "--images", folder, "--index", postgres, "--table", "docs"]
    arguments += ["--uid-column", "id", "--vector-column", "embedding", "--text-column", "content"]
    runner = CliRunner()
    refused = runner.invoke(app, arguments)
    assert refused.exit_code == 2
    dry = runner.invoke(app, [*arguments, "--dry-run"])
    assert dry.exit_code == 0, dry.output
    statements = [
        'ALTER TABLE "public"."docs" ADD COLUMN IF NOT EXISTS "kind" text, ADD COLUMN IF NOT EXISTS "source" text, '
        'ADD COLUMN IF NOT EXISTS "thumbnail" bytea, ADD COLUMN IF NOT EXISTS "image_uid" text',
        'CREATE UNIQUE INDEX CONCURRENTLY "docs_nev_uid" ON "public"."docs" ("image_uid") WHERE "image_uid" IS NOT NULL',
        'CREATE TABLE "public"."nev_index" (table_name text PRIMARY KEY, spec jsonb NOT NULL)',
    ]
    for statement in statements:
        assert statement in refused.stderr
        assert statement in dry.output
    assert len(database.execute("SELECT * FROM docs LIMIT 1").description or []) == 3, "nothing was changed"
    for statement in statements:  # the other way: the owner runs them
        database.execute(statement)
    done = runner.invoke(app, arguments)
    assert done.exit_code == 0, done.stderr
    assert "20 new" in done.output


REFUSED = [
    (
        "id bigserial PRIMARY KEY, owner int NOT NULL, lang text NOT NULL, embedding vector(48)",
        "no value for owner, lang, NOT NULL",
    ),
    ("id bigint PRIMARY KEY, content text, embedding vector(48)", "no value for id, NOT NULL and without a default"),
    (
        "id text, content text, embedding vector(48)",
        r"id has no unique index of its own.*CREATE UNIQUE INDEX ON docs \(id\)",
    ),
    ("id text PRIMARY KEY, content text, embedding real[]", r"column embedding is real\[\], and no vector or halfvec"),
    (
        "id text PRIMARY KEY, kind int, embedding vector(48)",
        "kind is integer, and nev writes text there.*--kind-column",
    ),
    (
        "key text PRIMARY KEY, content text, embedding vector(48)",
        "no column id. Its columns are key, content, embedding",
    ),
    ("id text PRIMARY KEY, content jsonb, embedding vector(48)", "column content is jsonb, and nev writes text"),
    ("id text PRIMARY KEY, content text, embedding vector", "column embedding has no width, and there is no row"),
    ("id text PRIMARY KEY, content text, embedding vector(32)", "has vectors of 32 numbers, and .* of 48"),
    ("id text PRIMARY KEY, content text", "no column embedding. Its columns are id, content"),
]


@pytest.mark.parametrize(("definition", "message"), REFUSED)
def test_a_table_that_cannot_take_pictures_is_refused_before_a_write(
    postgres: str,
    database: psycopg.Connection[Any],
    model: Model,
    folder: str,
    definition: str,
    message: str,
) -> None:
    database.execute(f"CREATE TABLE docs ({definition})")
    before = database.execute("SELECT attname FROM pg_attribute WHERE attrelid = 'docs'::regclass").fetchall()
    with pytest.raises(SearchError, match=message):
        add_pictures(postgres, "docs", USUAL, folder, model)
    assert database.execute("SELECT attname FROM pg_attribute WHERE attrelid = 'docs'::regclass").fetchall() == before
    assert database.execute("SELECT to_regclass('nev_index')").fetchone() == (None,)


def test_a_view_is_refused(postgres: str, database: psycopg.Connection[Any], model: Model, folder: str) -> None:
    database.execute("CREATE TABLE docs (id text PRIMARY KEY, content text, embedding vector(48))")
    database.execute("CREATE VIEW seen AS SELECT * FROM docs")
    with pytest.raises(SearchError, match="seen is no plain table"):
        add_pictures(postgres, "seen", USUAL, folder, model)


def test_rows_that_the_table_refuses_leave_nothing_behind(
    postgres: str, database: psycopg.Connection[Any], model: Model, folder: str
) -> None:
    database.execute(
        "CREATE TABLE docs (id varchar(8) PRIMARY KEY, content text, embedding vector(48), CHECK (id <> 'a/07.jpg'))"
    )
    with pytest.raises(SearchError, match=r"cannot be written: .*check constraint"):
        add_pictures(postgres, "docs", USUAL, folder, model)
    assert dump(database, "docs") == []


def test_another_name_for_a_column_that_is_taken(
    postgres: str, database: psycopg.Connection[Any], model: Model, folder: str
) -> None:
    database.execute("CREATE TABLE docs (id bigserial PRIMARY KEY, kind int, content text, embedding vector(48))")
    write_rows(database, model, "docs")
    index = add_pictures(postgres, "docs", USUAL.model_copy(update={"kind": "modality"}), folder, model)
    assert index.count("image") == 20
    assert index.search(np.ones(WIDTH), where={"modality": "image", "kind": None}, top=99, kind="image")[19:]
    assert open_index(postgres, "docs").store.columns.kind == "modality", "recorded: nobody names it again"


def test_numbers_as_uids_take_no_texts(
    postgres: str, database: psycopg.Connection[Any], model: Model, tmp_path: Path
) -> None:
    database.execute("CREATE TABLE docs (id bigserial PRIMARY KEY, content text, embedding vector(48))")
    (tmp_path / "t.jsonl").write_text('{"uid": "5", "text": "a dog"}')
    task = Task(
        open_store(postgres, "docs", USUAL), Options(texts=str(tmp_path / "t.jsonl"), alter_table=True), lambda: model
    )
    with pytest.raises(SearchError, match="uids of texts are no strings here"):
        make_plan(task)
    store = open_store(postgres, "docs", USUAL)
    store.apply_changes(WIDTH)
    with pytest.raises(SearchError, match="takes no texts"):
        store.upsert(make_texts(draw_vectors(1, 0, 0, WIDTH)))


def test_filters_by_other_columns(postgres: str, database: psycopg.Connection[Any], model: Model, folder: str) -> None:
    database.execute(
        "CREATE TYPE mood AS ENUM ('glad', 'sad'); CREATE TABLE docs (id bigserial PRIMARY KEY, content text, embedding "
        "vector(48), n int DEFAULT 1, x float DEFAULT 0.5, b bool DEFAULT true, d date DEFAULT '2026-01-02', m mood DEFAULT "
        "'glad', u uuid DEFAULT '00000000-0000-0000-0000-000000000001', j jsonb)"
    )
    write_rows(database, model, "docs")
    index = add_pictures(postgres, "docs", USUAL, folder, model)

    def count(**where: Any) -> int:
        return len(index.search(np.ones(WIDTH), top=99, where=where))

    all_of = len(WORDS) + 20
    for where in (
        {"n": 1},
        {"x": 0.5},
        {"b": True},
        {"d": "2026-01-02"},
        {"m": "glad"},
        {"u": "00000000-0000-0000-0000-000000000001"},
    ):
        assert count(**where) == all_of
    assert count(n=2) == count(b=False) == count(m="sad") == count(n=None) == 0
    assert count(n=10**30) == 0
    for where, message in (
        ({"m": "happy"}, "cannot be searched: invalid input value for enum"),
        ({"d": "x"}, "cannot be searched: invalid input syntax for type date"),
        ({"n": True}, "column n is compared with int"),
        ({"j": "x"}, "no column 'j'"),
        ({"content": "a\0b"}, "cannot be searched"),
    ):
        with pytest.raises(SearchError, match=message):
            count(**where)
