"""What every store does alike: LanceDB, PostgreSQL and the exact store."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from helpers.search import STORES, WIDTH, draw_pair, draw_vectors, fill_store, make_images, make_store, make_texts

from nev.search.open import open_store
from nev.search.store import SearchError, StoreSpec, Upserted, VectorStore, check_written, make_items, read_unit_vectors

Open = Callable[[], VectorStore]


@pytest.fixture(params=STORES)
def opened(request: pytest.FixtureRequest, tmp_path: Path) -> Open:
    """Opens the table of one kind of store, as often as it is called."""
    address = request.getfixturevalue("postgres") if request.param == "postgres" else ""
    return lambda: make_store(request.param, tmp_path, address)


def rows_of(store: VectorStore, uids: list[str]) -> list[dict[str, object]]:
    return store.read(uids).sort_by("uid").to_pylist()


def test_the_same_items_twice_change_nothing(opened: Open) -> None:
    images, texts, means = draw_pair(40, 30)
    store = fill_store(opened(), images, texts, means)
    uids = [*make_images(images)["uid"].to_pylist(), *make_texts(texts)["uid"].to_pylist()]
    before = rows_of(store, uids)
    assert len(before) == 70
    assert store.upsert(make_images(images)) == Upserted(0, 40)
    assert store.upsert(make_texts(texts)) == Upserted(0, 30)
    assert rows_of(opened(), uids) == before
    assert (store.count("image"), store.count("text"), store.count()) == (40, 30, 70)


def test_new_and_changed_items_are_counted_apart(opened: Open) -> None:
    images, texts, means = draw_pair(10, 10)
    store = fill_store(opened(), images, texts, means)
    assert store.upsert(make_images(draw_vectors(15, 7, 0.6))) == Upserted(5, 10)
    found = store.read(["p003", "p012", "t001", "nix"])
    assert sorted(found["uid"].to_pylist()) == ["p003", "p012", "t001"]
    item = store.read(["p012"]).to_pylist()[0]
    assert (item["kind"], item["text"], item["source"], item["thumbnail"]) == (
        "image",
        None,
        "folder/p012.jpg",
        b"p012",
    )
    assert np.allclose(item["vector"], draw_vectors(15, 7, 0.6)[12], atol=1e-6)
    assert store.read([]).num_rows == 0


def test_a_search_is_the_exact_one(opened: Open) -> None:
    images, texts, means = draw_pair(300, 200)
    store = fill_store(opened(), images, texts, means)
    for query in draw_vectors(5, 3, 0.0):
        for kind, vectors, prefix in (("image", images, "p"), ("text", texts, "t")):
            expected = [f"{prefix}{row:03d}" for row in np.argsort(-(vectors @ query))[:20]]
            found = store.search(query, 20, kind)
            assert found["uid"].to_pylist() == expected
            assert set(found["kind"].to_pylist()) == {kind}
            assert found.column_names == ["uid", "kind", "text", "source", "vector"]
            assert np.allclose(read_unit_vectors(found)[0], vectors[int(expected[0][1:])], atol=1e-6)
    assert store.search(query, 1000, "image").num_rows == 300


def test_what_is_recorded_survives(opened: Open) -> None:
    images, texts, means = draw_pair(30, 30)
    store = opened()
    assert store.width is None
    assert store.read_spec() is None
    assert store.list_changes(WIDTH)
    fill_store(store, images, texts, means)
    assert store.list_changes(WIDTH) == []
    spec = StoreSpec(width=WIDTH, text_fingerprint="t" * 64, model="m", fingerprint="f" * 64, calibration=means)
    store.write_spec(spec)
    store.upsert(make_images(images[:3], "q"))
    store.build("auto", store.columns is not None and "parquet" not in store.name)
    again = opened()
    assert again.read_spec() == spec
    assert again.width == WIDTH


def test_a_sample_is_fixed_and_changes_little_when_the_table_grows(opened: Open) -> None:
    images, texts, means = draw_pair(200, 10)
    store = fill_store(opened(), images, texts, means)
    first = set(store.sample("image", 50)["uid"].to_pylist())
    assert len(first) == 50
    assert set(opened().sample("image", 50)["uid"].to_pylist()) == first
    assert set(store.sample("image", 50, seed=1)["uid"].to_pylist()) != first
    store.upsert(make_images(draw_vectors(20, 9, 0.6), "q"))
    assert len(first & set(store.sample("image", 50)["uid"].to_pylist())) >= 40
    texts_found = store.sample("text", 50)
    assert set(texts_found["uid"].to_pylist()) == {f"t{row:03d}" for row in range(10)}
    assert texts_found.column_names == ["uid", "text", "vector"]


def test_all_pictures_are_deleted_and_no_text(opened: Open) -> None:
    store = fill_store(opened(), *draw_pair(12, 8))
    assert store.delete_images() == 12
    assert (store.count("image"), store.count("text")) == (0, 8)


def test_a_filter_holds_rows_that_hold_the_value(opened: Open) -> None:
    store = fill_store(opened(), *draw_pair(50, 50))
    query = draw_vectors(1, 3, 0.0)[0]
    assert store.search(query, 9, "image", {"source": "folder/p007.jpg"})["uid"].to_pylist() == ["p007"]
    assert store.search(query, 99, "text", {"source": None}).num_rows == 50
    assert store.search(query, 99, "image", {"source": None, "text": None}).num_rows == 0
    assert store.search(query, 9, "text", {"text": "a dog number3", "uid": "t003"})["uid"].to_pylist() == ["t003"]


INJECTIONS = [
    "' OR 1=1 --",
    "x' OR 'a'='a",
    "a dog number1'; DROP TABLE items; --",
    "%s",
    "{uid}",
    "\\' OR true --",
    '" OR ""="',
    "`",
]


@pytest.mark.parametrize("value", INJECTIONS)
def test_a_value_of_a_filter_is_never_code(opened: Open, value: str) -> None:
    images, texts, means = draw_pair(20, 20)
    store = fill_store(opened(), images, texts, means)
    query = draw_vectors(1, 3, 0.0)[0]
    assert store.search(query, 99, "text", {"text": value}).num_rows == 0
    assert store.read([value]).num_rows == 0
    store.upsert(make_items("text", [f"odd {value}"], texts[:1], text=pa.array([value])))
    assert store.search(query, 99, "text", {"text": value})["uid"].to_pylist() == [f"odd {value}"]
    assert store.read([f"odd {value}"]).num_rows == 1
    assert opened().count() == 41


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ({"colour": "red"}, r"no column 'colour' to filter by\. There are .*uid.*text"),
        ({"text = '' OR 1=1 --": "x"}, "no column"),
        ({"vector": "x"}, "no column 'vector'"),
        ({"text": 3}, "column text is compared with str, or null, and not with 3"),
        ({"text": ["a", "b"]}, "and not with"),
    ],
)
def test_a_filter_that_cannot_be_is_refused(opened: Open, where: dict[str, object], message: str) -> None:
    store = fill_store(opened(), *draw_pair(5, 5))
    with pytest.raises(SearchError, match=message):
        store.search(draw_vectors(1, 3, 0.0)[0], 9, "text", where)  # type: ignore[arg-type]


def test_a_table_that_is_not_there_is_said_to_be_so(opened: Open) -> None:
    with pytest.raises(SearchError, match=r"no such table\. `nev index` makes one"):
        opened().count()


def test_an_exact_store_that_another_process_has_changed_is_not_written_over(tmp_path: Path) -> None:
    first = fill_store(make_store("exact", tmp_path), *draw_pair(5, 5))
    content = first._load  # type: ignore[attr-defined]

    def change_in_between() -> object:
        loaded = content()
        first._load = content  # type: ignore[attr-defined]
        make_store("exact", tmp_path).upsert(make_images(draw_vectors(3, 9, 0), "other"))
        return loaded

    first._load = change_in_between  # type: ignore[attr-defined]
    with pytest.raises(SearchError, match="was changed by another process meanwhile"):
        first.upsert(make_images(draw_vectors(3, 8, 0), "mine"))
    assert make_store("exact", tmp_path).count() == 13


def test_a_store_that_loses_rows_is_an_error() -> None:
    assert check_written("x", 5, Upserted(2, 3)) == Upserted(2, 3)
    with pytest.raises(SearchError, match="5 items were given, and the store reports 2 new and 2 updated"):
        check_written("x", 5, Upserted(2, 2))


@pytest.mark.parametrize(
    ("files", "kind"),
    [
        ([], "LanceStore"),
        (["items.lance/x"], "LanceStore"),
        (["items.parquet"], "ExactStore"),
        (["readme.txt"], "LanceStore"),
    ],
)
def test_a_folder_tells_its_store(tmp_path: Path, files: list[str], kind: str) -> None:
    fill_store(open_store(str(tmp_path / "made"), "items", store="exact"), *draw_pair(3, 3))
    folder = tmp_path / "index"
    for file in files:
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_bytes((tmp_path / "made" / "items.parquet").read_bytes())
    assert type(open_store(str(folder), "other")).__name__ == kind
    assert files or not folder.exists(), "looking makes no folder"


def test_a_location_that_tells_nothing_is_refused(tmp_path: Path) -> None:
    for name in ("a.lance", "b.parquet"):
        (tmp_path / name).mkdir()
    with pytest.raises(SearchError, match="choose by --store lancedb or exact"):
        open_store(str(tmp_path), "items")
    with pytest.raises(SearchError, match=r"mysql://: an index lies in a folder, s3://BUCKET/PREFIX or postgresql"):
        open_store("mysql://host/db", "items")
    with pytest.raises(SearchError, match="store postgres: PostgreSQL has a location postgresql"):
        open_store(str(tmp_path), "items", store="postgres")
    with pytest.raises(SearchError, match="it is one of lancedb, postgres, exact"):
        open_store(str(tmp_path), "items", store="qdrant")
