"""Ranked lists of an index: calibrated, exact, paged, cut off, and fused with full text."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from helpers.models import make_experiment, write_checkpoint
from helpers.search import STORES, WIDTH, draw_pair, draw_vectors, fill_store, make_images, make_store, make_texts
from hypothesis import given, settings
from hypothesis import strategies as st

import nev
from nev.ops.vectors import scale_to_unit, shift_mean
from nev.search.index import FUSED, Hit, Index, open_index
from nev.search.store import SearchError, StoreSpec, VectorStore, make_items

Make = Callable[..., Index]


@pytest.fixture(params=STORES)
def make_index(request: pytest.FixtureRequest, tmp_path: Path) -> Make:
    """Makes an index of pictures and texts in one kind of store. calibrated: whether means are recorded."""
    address = request.getfixturevalue("postgres") if request.param == "postgres" else ""

    def make(images: int = 60, texts: int = 50, calibrated: bool = True) -> Index:
        pictures, sentences, means = draw_pair(images, texts)
        store = make_store(request.param, tmp_path, address)
        fill_store(store, pictures, sentences, means if calibrated else None)
        store.build("auto", request.param != "exact")
        return open_index(address or str(tmp_path / request.param), store=request.param)

    return make


def rank(
    query: np.ndarray, images: int, texts: int, calibrated: bool, picture: bool = False
) -> list[tuple[str, float]]:
    """All items with their scores, best first, by plain numpy."""
    pictures, sentences, means = draw_pair(images, texts)
    query = query / np.linalg.norm(query)
    if calibrated:
        both = np.asarray(means.image_mean, np.float32), np.asarray(means.text_mean, np.float32)
        pictures = shift_mean(pictures, *both)
        query = shift_mean(query[None], *both)[0] if picture else query
    scores = {f"p{row:03d}": float(score) for row, score in enumerate(pictures @ query)}
    scores |= {f"t{row:03d}": float(score) for row, score in enumerate(sentences @ query)}
    return sorted(scores.items(), key=lambda pair: (-pair[1], pair[0]))


def uids(hits: list[Hit]) -> list[str]:
    return [hit.uid for hit in hits]


@pytest.mark.parametrize("calibrated", [True, False])
@pytest.mark.parametrize("picture", [True, False])
def test_a_mixed_list_is_the_exact_one(make_index: Make, calibrated: bool, picture: bool) -> None:
    index = make_index(images=600, texts=90)
    for query in draw_vectors(4, 5, 0.4 if picture else -0.4) * 3:
        expected = rank(query, 600, 90, calibrated, picture)
        hits = index.search(query, "image" if picture else "text", top=40, calibrated=calibrated)
        assert uids(hits) == [uid for uid, _ in expected[:40]]
        assert np.allclose([hit.score for hit in hits], [score for _, score in expected[:40]], atol=1e-5)
        assert all(hit.kind == ("image" if hit.uid[0] == "p" else "text") for hit in hits)


def test_without_calibration_the_modality_gap_puts_texts_first(make_index: Make) -> None:
    index = make_index(images=300, texts=300)
    query = draw_vectors(1, 5, -0.6)[0]
    texts = [sum(hit.kind == "text" for hit in index.search(query, top=20, calibrated=each)) for each in (False, True)]
    assert texts[0] >= 18
    assert texts[1] <= 15


def test_a_calibrated_list_of_many_pictures_is_exact(tmp_path: Path) -> None:
    """Pictures whose distances from the mean of texts differ: by the plain cosine the first ten would be among the first 300."""
    rng = np.random.default_rng(0)
    pictures = draw_vectors(8000, 1, 0.6, 64) + np.outer(rng.normal(size=8000), np.eye(64)[0])
    sentences = draw_vectors(50, 2, -0.6, 64)
    pictures = scale_to_unit(pictures)
    means = nev.config.model_spec.Calibration(
        image_mean=tuple(pictures.mean(axis=0)), text_mean=tuple(sentences.mean(axis=0))
    )
    fill_store(make_store("exact", tmp_path), pictures, sentences, means)
    index = open_index(str(tmp_path / "exact"))
    moved = shift_mean(pictures, np.asarray(means.image_mean, np.float32), np.asarray(means.text_mean, np.float32))
    for query in draw_vectors(20, 5, -0.6, 64):
        found = uids(index.search(query, kind="image"))
        assert found == [f"p{row:03d}" for row in np.argsort(-(moved @ query))[:10]]


def test_a_list_is_that_of_the_model(tmp_path: Path) -> None:
    """`Model.rank` over the vectors that the exact store holds."""
    model = nev.load(write_checkpoint(make_experiment(tmp_path)), device="cpu")
    rng = np.random.default_rng(0)
    pictures, sentences = (scale_to_unit(rng.normal(size=(30, model.width))) for _ in range(2))
    store = make_store("exact", tmp_path)
    fill_store(store, pictures, sentences, model.spec.calibration)
    index = open_index(str(tmp_path / "exact"))
    query = model.encode_text("a red circle")
    expected = model.rank(query, images=pictures, texts=sentences, top=25)
    hits = index.search(query, top=25)
    assert uids(hits) == [f"{'p' if each.kind == 'image' else 't'}{each.position:03d}" for each in expected]
    assert np.allclose([hit.score for hit in hits], [each.score for each in expected], atol=1e-5)


@settings(max_examples=25)
@given(
    images=st.integers(0, 40),
    texts=st.integers(0, 40),
    width=st.integers(2, 8),
    seed=st.integers(0, 2**16),
    far=st.floats(0, 3),
)
def test_the_calibrated_order_is_exact_for_small_tables(
    tmp_path_factory: pytest.TempPathFactory, images: int, texts: int, width: int, seed: int, far: float
) -> None:
    """The first ten by LanceDB are the first ten of all, whatever the vectors and the means."""
    rng = np.random.default_rng(seed)
    pictures, sentences = (rng.normal(size=(count, width)).astype(np.float32) for count in (images, texts))
    means = nev.config.model_spec.Calibration(
        image_mean=tuple(far * rng.normal(size=width)), text_mean=tuple(far * rng.normal(size=width))
    )
    folder = tmp_path_factory.mktemp("property")
    for kind in ("exact", "lancedb"):
        fill_store(make_store(kind, folder), pictures, sentences, means)
    exact, lance = (open_index(str(folder / kind)) for kind in ("exact", "lancedb"))
    query = rng.normal(size=width)
    both = np.asarray(means.image_mean, np.float32), np.asarray(means.text_mean, np.float32)
    unit = (query / np.linalg.norm(query)).astype(np.float32)
    moved = shift_mean(make_images(pictures)["vector"].combine_chunks().flatten().to_numpy().reshape(-1, width), *both)
    scores = np.concatenate([moved @ unit, [hit.score for hit in exact.search(query, top=99, kind="text")]])
    best = np.sort(scores)[::-1][:10]
    for index in (exact, lance):
        assert np.allclose([hit.score for hit in index.search(query)], best, atol=1e-5)


def test_pages_join_to_the_whole_list(make_index: Make) -> None:
    index = make_index(images=70, texts=60)
    query = draw_vectors(1, 5, 0.0)[0]
    whole = uids(index.search(query, top=130))
    assert len(set(whole)) == 130
    pages = [uids(index.search(query, top=7, offset=offset)) for offset in range(0, 140, 7)]
    assert [uid for page in pages for uid in page] == whole
    assert index.search(query, top=7, offset=130) == []
    if not index.store.name.endswith(".parquet"):
        whole = uids(index.search(query, top=60, words="dog"))
        pages = [uids(index.search(query, top=6, offset=offset, words="dog")) for offset in range(0, 60, 6)]
        assert [uid for page in pages for uid in page] == whole


def test_pages_of_a_fused_list_join_and_a_cut_off_comes_first(tmp_path: Path) -> None:
    pictures, sentences, means = draw_pair(150, 160)
    store = fill_store(make_store("lancedb", tmp_path), pictures, sentences, means)
    store.build("none", True)
    index, query = open_index(str(tmp_path / "lancedb")), draw_vectors(1, 5, 0.0)[0]
    whole = uids(index.search(query, top=310, words="dog"))
    assert FUSED <= len(set(whole)) == len(whole) <= 2 * FUSED, "the list ends with the hits that were fused"
    pages = [uids(index.search(query, top=24, offset=offset, words="dog")) for offset in range(0, 312, 24)]
    assert [uid for page in pages for uid in page] == whole
    plain = {hit.uid for hit in index.search(query, top=310, min_percentile=90)}
    assert {hit.uid for hit in index.search(query, top=310, min_percentile=90, words="dog")} == plain


def test_equal_scores_are_in_the_order_of_uids_on_every_page(tmp_path: Path) -> None:
    """200 copies of one picture: a store may give any of them first."""
    store = make_store("lancedb", tmp_path)
    store.apply_changes(WIDTH)
    same, others = np.tile(draw_vectors(1, 1, 0.0), (200, 1)), draw_vectors(300, 2, 0.0)
    rng = np.random.default_rng(0)
    store.upsert(make_items("image", [f"same{row:03d}" for row in rng.permutation(200)], same))
    store.upsert(make_images(others))
    index = open_index(str(tmp_path / "lancedb"))
    pages = [uids(index.search(same[0], top=9, offset=offset)) for offset in range(0, 198, 9)]
    assert [uid for page in pages for uid in page] == [f"same{row:03d}" for row in range(198)]


def test_a_cut_off_by_score_and_by_percentile(make_index: Make) -> None:
    index = make_index(images=300, texts=200)
    query = draw_vectors(1, 5, 0.0)[0]
    hits = index.search(query, top=500)
    pictures, sentences, means = draw_pair(300, 200)
    moved = shift_mean(pictures, np.asarray(means.image_mean, np.float32), np.asarray(means.text_mean, np.float32))
    for hit in hits[::23]:
        own = (moved if hit.kind == "image" else sentences) @ query
        assert hit.percentile == pytest.approx(100 * (own <= hit.score + 1e-6).mean(), abs=0.51)
    limit = hits[30].score
    assert uids(index.search(query, top=500, min_score=limit)) == uids(hits)[:31]
    best = index.search(query, top=500, min_percentile=95)
    assert uids(best) == [hit.uid for hit in hits if hit.percentile is not None and hit.percentile >= 95]
    assert 20 <= len(best) <= 30


def test_few_items_have_no_percentile(make_index: Make) -> None:
    hits = make_index(images=20, texts=20).search(draw_vectors(1, 5, 0.0)[0], min_percentile=99)
    assert len(hits) == 10
    assert {hit.percentile for hit in hits} == {None}


def test_percentiles_come_when_the_table_has_grown(tmp_path: Path) -> None:
    store = make_store("exact", tmp_path)
    store.apply_changes(WIDTH)
    store.upsert(make_images(draw_vectors(20, 1, 0.0)))
    index = open_index(str(tmp_path / "exact"))
    assert index.search(np.ones(WIDTH))[0].percentile is None
    store.upsert(make_images(draw_vectors(150, 2, 0.0), "more"))
    assert index.search(np.ones(WIDTH))[0].percentile == 100


def test_a_kind_and_a_filter(make_index: Make) -> None:
    index = make_index()
    query = draw_vectors(1, 5, 0.0)[0]
    assert {hit.kind for hit in index.search(query, top=100, kind="text")} == {"text"}
    assert len(index.search(query, top=100, kind="image")) == 60
    assert uids(index.search(query, where={"source": "folder/p011.jpg"})) == ["p011"]


def test_words_lift_what_holds_them(make_index: Make) -> None:
    index = make_index()
    query = draw_vectors(1, 5, 0.0)[0]
    if index.store.name.endswith(".parquet"):
        with pytest.raises(SearchError, match="this store has no full text"):
            index.search(query, words="dog")
        return
    plain = index.search(query, top=110)
    target = (
        plain[-1].uid if plain[-1].kind == "text" else next(hit.uid for hit in reversed(plain) if hit.kind == "text")
    )
    number = int(target[1:])
    found = index.search(query, top=5, words=f"number{number}")
    assert target in uids(found)[:2], "first in one of the two lists"
    assert plain[0].uid in uids(found)[:2]
    hit = next(hit for hit in found if hit.uid == target)
    assert hit.score == pytest.approx(next(each.score for each in plain if each.uid == target), abs=1e-5)
    assert uids(index.search(query, top=5, words="zebra")) == uids(plain)[:5]
    assert uids(index.search(query, top=5, words="'; DROP TABLE items; -- \" OR (")) is not None
    assert target not in uids(index.search(query, top=5, words=f"number{number}", kind="image"))
    assert uids(index.search(query, words="dog", where={"text": f"a dog number{number}"})) == [target]


def test_items_by_uid(make_index: Make) -> None:
    index = make_index()
    pictures, _, means = draw_pair(60, 50)
    assert index.thumbnail("p004") == b"p004"
    assert index.thumbnail("t004") is None
    assert index.thumbnail("nix") is None
    vector = index.vector("p004")
    assert vector is not None
    assert np.allclose(vector, pictures[4], atol=1e-6)
    assert index.vector("nix") is None
    assert (index.width, index.count(), index.count("image"), index.calibration) == (WIDTH, 110, 60, means)
    assert index.read(["t001"]).to_pylist()[0]["text"] == "a dog number1"
    assert uids(index.search(vector, "image", top=1)) == ["p004"]


def test_what_cannot_be_searched_is_refused(make_index: Make) -> None:
    index = make_index(calibrated=False)
    with pytest.raises(SearchError, match=f"a query of 3 numbers, and the vectors of .* have {WIDTH}"):
        index.search([1.0, 2.0, 3.0])
    for bad in (np.zeros(WIDTH), np.full(WIDTH, np.nan)):
        with pytest.raises(SearchError, match="has no direction"):
            index.search(bad)
    with pytest.raises(SearchError, match="top is at least 1"):
        index.search(np.ones(WIDTH), top=0)
    with pytest.raises(SearchError, match="no column 'nix'"):
        index.search(np.ones(WIDTH), where={"nix": 1})


def test_an_index_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(SearchError, match=r"no such table\. `nev index` makes one"):
        open_index(str(tmp_path / "nothing"))


def test_a_reader_sees_rows_of_another_writer(tmp_path: Path) -> None:
    """In the exact store at once; in LanceDB after `CONSISTENCY`, which is 0 here."""
    from datetime import timedelta

    from nev.search import lance

    before, lance.CONSISTENCY = lance.CONSISTENCY, timedelta(0)
    try:
        for kind in ("exact", "lancedb"):
            fill_store(make_store(kind, tmp_path), *draw_pair(5, 5))
            reader = open_index(str(tmp_path / kind))
            assert reader.count() == 10
            writer: VectorStore = make_store(kind, tmp_path)
            writer.upsert(make_texts(draw_vectors(9, 8, 0.0), "new"))
            writer.write_spec(StoreSpec(width=WIDTH, model="other"))
            assert reader.count() == 19
            assert len(reader.search(np.ones(WIDTH), top=99)) == 19
            reader.refresh()
            assert reader.spec is not None
            assert reader.spec.model == "other"
    finally:
        lance.CONSISTENCY = before
