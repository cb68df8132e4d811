"""Tables of LanceDB: those that other programs made, indexes under filters, several writers, and S3."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lancedb
import numpy as np
import pyarrow as pa
import pytest
from helpers.search import (
    USUAL,
    WIDTH,
    WORDS,
    draw_pair,
    draw_vectors,
    fill_store,
    make_images,
    make_store,
    make_texts,
)

from nev.data.vectors import as_column
from nev.inference.model import Model
from nev.search.fill import fill
from nev.search.index import open_index
from nev.search.lance import LanceStore
from nev.search.open import open_store
from nev.search.plan import Options, Task, make_plan
from nev.search.store import Columns, SearchError, StoreSpec, Upserted, VectorStore

if TYPE_CHECKING:
    from helpers.s3_server import Proxy


def make_docs(place: Path, model: Model, ids: pa.Array, numbers: pa.DataType, **more: Any) -> pa.Table:
    """A table as another program makes it. ids: its keys. numbers: of a vector. more: further columns."""
    vectors = 2 * model.encode_text(WORDS, kind="document")
    column = as_column(vectors.astype(numbers.to_pandas_dtype()), pa.list_(numbers, model.width))
    table = pa.table({"id": ids, "content": WORDS, "embedding": column, **more})
    lancedb.connect(str(place)).create_table("docs", table)
    return table


def add_pictures(place: Path, columns: Columns | None, folder: str, model: Model, alter_table: bool = True) -> None:
    task = Task(open_store(str(place), "docs", columns), Options(images=folder, alter_table=alter_table), lambda: model)
    fill(task, make_plan(task))


@pytest.mark.parametrize("numbers", [pa.float32(), pa.float16(), pa.float64()], ids=str)
@pytest.mark.parametrize("keys", ["numbers", "strings"])
def test_pictures_join_a_table_and_nothing_there_changes(
    tmp_path: Path, model: Model, folder: str, numbers: pa.DataType, keys: str
) -> None:
    ids = (
        pa.array(range(len(WORDS)))
        if keys == "numbers"
        else pa.array([f"d{n}" for n in range(len(WORDS))], pa.large_string())
    )
    before = make_docs(tmp_path / "db", model, ids, numbers, tenant=pa.array(["x"] * len(WORDS)))
    with pytest.raises(
        SearchError, match=r"(?s)lacks what pictures need\. --alter-table .*add columns to table docs: kind"
    ):
        add_pictures(tmp_path / "db", USUAL, folder, model, alter_table=False)
    add_pictures(tmp_path / "db", USUAL, folder, model)
    table = lancedb.connect(str(tmp_path / "db")).open_table("docs")
    after = table.search().where("kind IS NULL").limit(None).to_arrow().select(before.column_names)
    assert after.num_rows == len(WORDS)
    assert after.sort_by("id").cast(before.schema).equals(before.sort_by("id"))
    index = open_index(str(tmp_path / "db"), "docs")
    assert (index.count("text"), index.count("image")) == (len(WORDS), 20)
    first = index.search(model.encode_text(WORDS[4], kind="document"), top=1)[0]
    assert (first.uid, first.kind, first.text) == ("4" if keys == "numbers" else "d4", "text", WORDS[4])
    assert index.thumbnail("a/03.jpg") is None
    assert index.store.read(["4", "d4", "a/03.jpg", "nix"], ["uid"]).num_rows == 2
    assert {hit.kind for hit in index.search(np.ones(model.width), where={"tenant": "x"}, top=99)} == {"text"}
    assert len(index.search(np.ones(model.width), where={"tenant": None}, top=99)) == 20

    table.update(where="kind = 'image'", values={"tenant": "mine"})
    add_pictures(tmp_path / "db", None, folder, model, alter_table=False)
    again = lancedb.connect(str(tmp_path / "db")).open_table("docs")
    assert again.count_rows() == len(WORDS) + 20
    assert again.count_rows("tenant = 'mine'") == 20, "columns of the owner keep their values"


def test_tables_that_cannot_take_pictures(tmp_path: Path, model: Model, folder: str) -> None:
    ids = pa.array([f"d{n}" for n in range(len(WORDS))])
    make_docs(tmp_path / "kind", model, ids, pa.float32(), kind=pa.array(range(len(WORDS))))
    with pytest.raises(SearchError, match="column kind is int64, and nev writes string there"):
        add_pictures(tmp_path / "kind", USUAL, folder, model)
    make_docs(tmp_path / "names", model, ids, pa.float32())
    with pytest.raises(SearchError, match=r"there is no column vector\. The columns are id, content, embedding"):
        add_pictures(tmp_path / "names", None, folder, model)
    with pytest.raises(SearchError, match="column content is string, and no list of a fixed number of floats"):
        add_pictures(tmp_path / "names", USUAL.model_copy(update={"vector": "content"}), folder, model)
    table = make_docs(tmp_path / "strict", model, ids, pa.float32())
    fields = [*table.schema, pa.field("owner", pa.string(), nullable=False)]
    lancedb.connect(str(tmp_path / "strict")).create_table("docs", schema=pa.schema(fields), mode="overwrite")
    with pytest.raises(SearchError, match="a picture has no value for owner, where null is not allowed"):
        add_pictures(tmp_path / "strict", USUAL, folder, model)


def test_rows_without_a_vector_are_counted_and_never_found(tmp_path: Path) -> None:
    store = fill_store(make_store("lancedb", tmp_path), *draw_pair(5, 5))
    table = lancedb.connect(str(tmp_path / "lancedb")).open_table("items")
    table.add(
        pa.table(
            {"uid": ["empty"], "text": ["a dog without a vector"]},
            schema=pa.schema([table.schema.field("uid"), ("text", pa.string())]),
        )
    )
    store = make_store("lancedb", tmp_path)
    assert (store.count(), store.count_without_vector()) == (10, 1)
    store.build("none", True)
    index = open_index(str(tmp_path / "lancedb"))
    assert len(index.search(np.ones(WIDTH), top=99)) == 10
    assert "empty" not in {hit.uid for hit in index.search(np.ones(WIDTH), top=99, words="without")}
    assert index.vector("empty") is None


# -- indexes --


@pytest.mark.slow
@pytest.mark.parametrize(("ann", "kind"), [("ivf", "IvfFlat"), ("hnsw", "IvfHnswSq")])
def test_an_index_finds_what_a_scan_finds(tmp_path: Path, ann: str, kind: str) -> None:
    """Few pictures far from many texts: the partitions, and the graph, around a query of words hold texts alone."""
    images, texts = draw_vectors(150, 1, 1.5), draw_vectors(6000, 2, -1.5)
    store = fill_store(make_store("lancedb", tmp_path), images, texts, None)
    assert store.build(ann, False) == [f"vectors: {kind} of 6,150 rows", "full text: none"]  # type: ignore[arg-type]
    index = open_index(str(tmp_path / "lancedb"))
    for query in draw_vectors(5, 5, -1.5):
        found = [hit.uid for hit in index.search(query, kind="image")]
        assert found == [f"p{row:03d}" for row in np.argsort(-(images @ query))[:10]]
        exact = {f"t{row:03d}" for row in np.argsort(-(texts @ query))[:10]}
        assert len({hit.uid for hit in index.search(query, kind="text")} & exact) >= 9
        assert [hit.uid for hit in index.search(query, where={"text": "a dog number4321"})] == ["t4321"]
    assert len(index.search(query, kind="image", top=200)) == 150
    store.upsert(make_images(draw_vectors(1, 9, 1.5), "new"))  # not yet in the index, and filtered all the same
    store.upsert(make_texts(draw_vectors(1, 9, 1.5), "new-text"))
    found = open_index(str(tmp_path / "lancedb")).search(draw_vectors(1, 9, 1.5)[0], "image", top=2, kind="image")
    assert found[0].uid == "new000"
    assert found[1].kind == "image"


def test_an_index_of_many_partitions_is_read_whole(tmp_path: Path) -> None:
    """Its owner made it. Those 20 of its 200 partitions that are nearest to a query of words hold few pictures."""
    images, texts = draw_vectors(4000, 1, 0.5, topics=40), draw_vectors(4000, 2, -0.5, topics=40)
    fill_store(make_store("lancedb", tmp_path), images, texts, None)
    table = lancedb.connect(str(tmp_path / "lancedb")).open_table("items")
    table.create_index("vector", config=lancedb.index.IvfFlat(distance_type="cosine", num_partitions=200))
    index = open_index(str(tmp_path / "lancedb"))
    for query in draw_vectors(40, 5, -0.5, topics=40):
        found = [hit.uid for hit in index.search(query, kind="image", top=50)]
        assert found == [f"p{row:03d}" for row in np.argsort(-(images @ query))[:50]]


def test_an_index_by_another_distance_is_not_used(tmp_path: Path) -> None:
    """Vectors of other lengths: the nearest by l2 are not those by cosine."""
    store = fill_store(make_store("lancedb", tmp_path), *draw_pair(200, 300))
    table = lancedb.connect(str(tmp_path / "lancedb")).open_table("items")
    table.create_index("vector", config=lancedb.index.IvfFlat(distance_type="l2", num_partitions=2))
    store = make_store("lancedb", tmp_path)
    assert store.build("auto", False)[0] == "vectors: full scan of 500 rows"
    query = draw_vectors(1, 5, 0.5)[0]
    found = open_index(str(tmp_path / "lancedb")).search(query, kind="image", calibrated=False)
    assert [hit.uid for hit in found] == [f"p{row:03d}" for row in np.argsort(-(draw_pair(200, 300)[0] @ query))[:10]]


def test_words_of_new_rows_are_found_before_the_next_build(tmp_path: Path) -> None:
    store = fill_store(make_store("lancedb", tmp_path), *draw_pair(5, 5))
    with pytest.raises(SearchError, match=r"column text has no full-text index\. `nev index --full-text` makes one"):
        open_index(str(tmp_path / "lancedb")).search(np.ones(WIDTH), words="dog")
    store.build("auto", True)
    store.upsert(make_texts(draw_vectors(30, 8, 0), "n"))
    found = open_index(str(tmp_path / "lancedb")).search(np.ones(WIDTH), words="number27", top=2)
    assert "n027" in {hit.uid for hit in found}


# -- several processes --


def run_twice(work: Callable[[int], object]) -> list[BaseException]:
    """Call `work` in two threads at once. Returns what was raised."""
    errors, barrier = list[BaseException](), threading.Barrier(2)

    def run(number: int) -> None:
        barrier.wait()
        try:
            work(number)
        except BaseException as error:  # noqa: BLE001  shown by the caller's assertion
            errors.append(error)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return errors


def write_all(store: VectorStore) -> None:
    store.apply_changes(WIDTH)
    store.write_spec(StoreSpec(width=WIDTH))
    for _ in range(2):
        store.upsert(make_images(draw_vectors(200, 1, 0)))
    store.build("ivf", True)


def test_two_writers_at_once_make_no_row_twice(tmp_path: Path) -> None:
    assert run_twice(lambda number: write_all(make_store("lancedb", tmp_path))) == []
    uids = lancedb.connect(str(tmp_path / "lancedb")).open_table("items").to_arrow()["uid"].to_pylist()
    assert (len(uids), len(set(uids))) == (200, 200)


def test_two_writers_of_a_table_without_a_primary_key_are_told(tmp_path: Path, model: Model) -> None:
    """LanceDB lets both insert the same uids. The second to commit notices, and says what to do."""
    make_docs(tmp_path / "db", model, pa.array([f"d{n}" for n in range(len(WORDS))]), pa.float32())
    LanceStore(str(tmp_path / "db"), "docs", USUAL).apply_changes(model.width)
    stores = [LanceStore(str(tmp_path / "db"), "docs", USUAL) for _ in range(2)]
    items = make_images(draw_vectors(3000, 1, 0, model.width))
    errors = run_twice(lambda number: stores[number].upsert(items))
    rows = LanceStore(str(tmp_path / "db"), "docs", USUAL).count("image")
    if rows == 3000:
        assert errors == [], "one came after the other"
    else:
        assert "another process wrote the same items at the same time" in " ".join(map(str, errors))


def test_a_search_while_rows_are_written(tmp_path: Path) -> None:
    fill_store(make_store("lancedb", tmp_path), *draw_pair(50, 50))
    index, counts = open_index(str(tmp_path / "lancedb")), list[int]()

    def work(number: int) -> None:
        if number:
            counts.extend(len(index.search(np.ones(WIDTH), top=999)) for _ in range(15))
        else:
            for part in range(5):
                make_store("lancedb", tmp_path).upsert(make_images(draw_vectors(10, part, 0), f"n{part}-"))

    assert run_twice(work) == []
    assert set(counts) <= {100, 110, 120, 130, 140, 150}, "whole commits alone"


# -- S3 --


def test_an_index_on_s3(s3: Proxy, model: Model, folder: str, tmp_path: Path) -> None:
    store = open_store("s3://bucket/index", "items")
    assert store.width is None
    task = Task(store, Options(images=folder, full_text=True), lambda: model)
    assert fill(task, make_plan(task)).images == Upserted(20, 0)
    again = Task(open_store("s3://bucket/index", "items"), Options(images=folder))
    assert fill(again, make_plan(again)).images == Upserted(0, 20)
    index = open_index("s3://bucket/index")
    assert index.search(draw_vectors(20, 3, 0.5, model.width)[7], "image", top=1)[0].uid == "a/07.jpg"
    assert s3.count("PUT") > 0
    fill_store(open_store("s3://bucket/exact", "items", store="exact"), *draw_pair(5, 5))
    assert open_index("s3://bucket/exact").count() == 10


def test_two_writers_on_s3(s3: Proxy) -> None:
    """Commits need a conditional PUT, which S3 has since 2024."""
    open_store("s3://bucket/index", "items").apply_changes(WIDTH)
    assert (
        run_twice(lambda number: open_store("s3://bucket/index", "items").upsert(make_images(draw_vectors(50, 1, 0))))
        == []
    )
    assert open_index("s3://bucket/index").count() == 50


def test_a_bucket_that_is_not_there(s3: Proxy) -> None:
    with pytest.raises(SearchError, match="s3://nix/index"):
        open_index("s3://nix/index", store="lancedb")
