"""Tables in PostgreSQL that other programs made: what nev adds to them, what it leaves alone, and what it refuses."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psycopg
import pytest
from helpers.models import make_experiment, write_checkpoint
from helpers.search import draw_vectors, fill_store, make_images, make_store, make_texts, write_pictures
from typer.testing import CliRunner

import nev
from nev.commands.main import app
from nev.inference.model import Model
from nev.search import postgres as postgres_store
from nev.search.fill import fill
from nev.search.index import Index, open_index
from nev.search.open import open_store
from nev.search.plan import Options, Task, make_plan
from nev.search.store import Columns, SearchError, StoreFailed, StoreSpec, Upserted, make_items

WORDS = [f"a {colour} {shape} {n}" for n in range(3) for colour in ("red", "blue") for shape in ("dog", "cat", "car")]
WIDTH = 48


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_checkpoint(make_experiment(tmp_path_factory.mktemp("model")))


@pytest.fixture(scope="module")
def model(checkpoint: str) -> Model:
    return nev.load(checkpoint, device="cpu")


@pytest.fixture
def database(postgres: str) -> Iterator[psycopg.Connection[Any]]:
    """A database with pgvector, as another program uses it."""
    with psycopg.connect(postgres, autocommit=True) as connection:
        connection.execute("CREATE EXTENSION vector")
        yield connection


def write_rows(
    database: psycopg.Connection[Any], model: Model, table: str, columns: str = "content, embedding"
) -> None:
    """Texts of WORDS with their vectors, of length 2: not every program scales them."""
    for text, vector in zip(WORDS, 2 * model.encode_text(WORDS, kind="document"), strict=True):
        database.execute(f"INSERT INTO {table} ({columns}) VALUES (%s, %s)", (text, str(vector.tolist())))


def dump(database: psycopg.Connection[Any], table: str, columns: str = "id, content, embedding::text") -> list[Any]:
    return database.execute(f"SELECT {columns} FROM {table} ORDER BY 1").fetchall()


@pytest.fixture
def folder(model: Model, tmp_path: Path) -> str:
    """Vector files of 20 pictures."""
    uids = [f"a/{n:02d}.jpg" for n in range(20)]
    return write_pictures(tmp_path / "vectors", model, uids, draw_vectors(20, 3, 0.5, WIDTH), source=uids)


def add_pictures(address: str, table: str, columns: Columns | None, folder: str, model: Model, **options: Any) -> Index:
    store = open_store(address, table, columns)
    task = Task(store, Options(images=folder, **{"alter_table": True, **options}), lambda: model)
    fill(task, make_plan(task))
    return open_index(address, table)


USUAL = Columns(uid="id", vector="embedding", text="content")
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


# -- indexes --


def indexes(database: psycopg.Connection[Any], table: str) -> set[str]:
    return {row[0] for row in database.execute("SELECT indexname FROM pg_indexes WHERE tablename = %s", (table,))}


def test_indexes_are_made_once_and_a_broken_one_again(
    postgres: str, database: psycopg.Connection[Any], tmp_path: Path
) -> None:
    store = make_store("postgres", tmp_path, postgres)
    fill_store(store, draw_vectors(300, 1, 0.5), draw_vectors(200, 2, 0.5), None)
    assert store.build("auto", False) == ["vectors: full scan of 500 rows", "full text: full scan"]
    assert indexes(database, "items") == {"items_pkey"}
    assert store.build("hnsw", True) == [
        "vectors: index of (kind = 'image'::text) and of (kind IS DISTINCT FROM 'image'::text)",
        "full text: index",
    ]
    made = {
        "items_pkey",
        "items_nev_full_text",
        *(f"items_nev_{kind}" for kind in ("image", "text", "image_hnsw", "text_hnsw")),
    }
    assert indexes(database, "items") == made
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
    assert indexes(database, "items") == {
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


# -- connections and several processes --


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
    assert len(indexes(database, "items")) == 6


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
