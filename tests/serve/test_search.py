"""`/search`, `/thumbnails`, `/map` and `/info` over a real index, and an index of another space."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fastapi.testclient import TestClient
from helpers.pictures import encoded, photo
from helpers.serving import data_url, picture

from nev.config.model_spec import ModelError
from nev.inference.model import Model
from nev.ops.vectors import scale_to_unit, shift_mean
from nev.search.exact import ExactStore
from nev.search.index import Index, open_index
from nev.search.store import StoreSpec, make_items
from nev.serve.app import make_app
from nev.serve.server import local_names
from nev.serve.settings import Settings
from nev.serve.torch_engine import make_engine

TEXTS = [f"{colour} {thing}" for colour in ("red", "blue", "green") for thing in ("dog", "cat", "house", "tree")]
PICTURES = 12
ODD = "folder/ä b?c#d.png"  # a uid that an address has to escape


def write_index(folder: Path, model: Model, **changes: Any) -> Index:
    """An index of TEXTS, as documents, and of twelve pictures."""
    store = ExactStore(str(folder), "items")
    width = changes.get("width", model.width)
    store.apply_changes(width)
    texts = model.encode_text(TEXTS, kind="document")[:, :width]
    images = model.encode_image([picture(n) for n in range(PICTURES)])[:, :width]
    thumbnails = [encoded(photo(n)) for n in range(PICTURES)]
    uids = [ODD, *(f"image-{n}" for n in range(1, PICTURES))]
    store.upsert(make_items("text", [f"text-{n}" for n in range(len(TEXTS))], texts, text=TEXTS))
    store.upsert(make_items("image", uids, images, source=[f"{uid}.png" for uid in uids], thumbnail=thumbnails))
    recorded = {"width": width, "text_fingerprint": model.text_fingerprint, "calibration": model.spec.calibration}
    store.write_spec(StoreSpec(**(recorded | changes)))
    return open_index(str(folder))


@pytest.fixture(scope="module")
def index(small_model: Model, tmp_path_factory: pytest.TempPathFactory) -> Index:
    return write_index(tmp_path_factory.mktemp("index"), small_model)


@pytest.fixture(scope="module")
def searching(small_model: Model, index: Index) -> Iterator[TestClient]:
    with TestClient(make_app(make_engine(small_model), index)) as client:
        yield client


def search(client: TestClient, **question: Any) -> Any:
    answer = client.post("/search", json=question)
    assert answer.status_code == 200, answer.text
    return answer.json()


def uids(answer: Any) -> list[str]:
    return [hit["uid"] for hit in answer["hits"]]


def test_words_rank_texts_and_pictures_as_the_model_does(searching: TestClient, small_model: Model) -> None:
    for calibrated in (True, False):
        answer = search(searching, text="red dog", top=40, calibrated=calibrated)
        pictures = [picture(n) for n in range(PICTURES)]
        ranked = small_model.rank("red dog", images=pictures, texts=TEXTS, top=40, calibrated=calibrated)
        wanted = [f"{each.kind}-{each.position}".replace("image-0", ODD) for each in ranked]
        assert uids(answer) == wanted
        assert answer["calibrated"] is calibrated
        np.testing.assert_allclose([hit["score"] for hit in answer["hits"]], [each.score for each in ranked], atol=1e-5)
    assert answer["query"]["kind"] == "text"
    first = answer["hits"][0]
    assert set(first) == {"uid", "kind", "score", "percentile", "text", "source", "thumbnail", "position"}


def test_a_picture_finds_itself_first_among_pictures(searching: TestClient) -> None:
    answer = search(searching, image=data_url(picture(5)), kind="image", top=3)
    assert uids(answer)[0] == "image-5"
    assert answer["query"]["kind"] == "image"
    assert answer["hits"][0]["score"] == pytest.approx(1, abs=1e-5)
    assert answer["hits"][0]["source"] == "image-5.png"


def test_words_and_a_picture_are_averaged(searching: TestClient, small_model: Model, index: Index) -> None:
    answer = search(searching, text="red dog", image=data_url(picture(5)), top=40)
    assert answer["query"]["kind"] == "both"
    means = small_model.spec.calibration
    assert means
    image = shift_mean(
        small_model.encode_image([picture(5)]), np.float32(means.image_mean), np.float32(means.text_mean)
    )
    mean = scale_to_unit(image + small_model.encode_text(["red dog"]))[0]
    assert uids(answer) == [hit.uid for hit in index.search(mean, "text", top=40)]
    assert uids(answer) != uids(search(searching, text="red dog", top=40))
    alone = search(searching, uid="image-5", text="red dog", top=40)
    assert [uid for uid in uids(answer) if uid != "image-5"] == uids(alone)


def test_more_like_an_item_leaves_the_item_out_on_every_page(searching: TestClient) -> None:
    whole = uids(search(searching, uid=ODD, top=30))
    assert len(whole) == len(TEXTS) + PICTURES - 1
    assert ODD not in whole
    pages = [uids(search(searching, uid=ODD, top=5, offset=offset)) for offset in range(0, 25, 5)]
    assert [uid for page in pages for uid in page] == whole
    assert searching.post("/search", json={"uid": "nobody"}).status_code == 404


def test_pages_filters_and_cut_offs(searching: TestClient) -> None:
    whole = search(searching, text="blue cat", top=30)["hits"]
    assert uids(search(searching, text="blue cat", top=4, offset=3)) == [hit["uid"] for hit in whole[3:7]]
    assert {hit["kind"] for hit in search(searching, text="blue cat", kind="text", top=30)["hits"]} == {"text"}
    least = whole[6]["score"]
    assert len(search(searching, text="blue cat", top=30, min_score=least)["hits"]) == 7
    assert uids(search(searching, text="blue cat", where={"source": "image-3.png"})) == ["image-3"]
    address = searching.get("/search", params={"q": "blue cat", "top": 4, "offset": 3, "calibrated": True})
    assert uids(address.json()) == [hit["uid"] for hit in whole[3:7]]


@pytest.mark.parametrize(
    ("question", "says"),
    [
        ({}, "text, image or uid"),
        ({"text": "a", "top": 0}, "greater than or equal to 1"),
        ({"text": "a", "top": 900, "offset": 200}, "ends after 1,000"),
        ({"text": "a", "where": {"text": "red dog"}}, "text is no column to filter by: kind, source, uid"),
        ({"text": "a", "where": {"nowhere": 1}}, "nowhere is no column to filter by"),
        ({"text": "a", "where": {"source": 1}}, "compared with"),
        ({"text": "a", "hybrid": True}, "no full text"),
        ({"uid": "text-1", "hybrid": True}, "words"),
        ({"image": "http://example.com/a.png"}, "fetches no pictures"),
        ({"text": "a", "min_percentile": 101}, "less than or equal to 100"),
    ],
)
def test_what_cannot_be_searched_says_why(searching: TestClient, question: Any, says: str) -> None:
    answer = searching.post("/search", json=question)
    assert answer.status_code == 422
    assert says in answer.json()["error"]["message"]


def test_an_address_with_an_unknown_parameter_is_refused(searching: TestClient) -> None:
    assert searching.get("/search", params={"q": "red dog", "top": 2}).status_code == 200
    answer = searching.get("/search", params={"q": "red dog", "where": "kind"})
    assert answer.status_code == 422
    assert "where" in answer.json()["error"]["message"]


def test_thumbnails_by_uid_alone(searching: TestClient) -> None:
    answer = searching.get("/thumbnails/folder/%C3%A4%20b%3Fc%23d.png")
    assert answer.content == encoded(photo(0))
    assert answer.headers["content-type"] == "image/jpeg"
    assert searching.get("/thumbnails/folder%2F%C3%A4%20b%3Fc%23d.png").content == encoded(photo(0))
    for uid in ("text-1", "nobody", "../../etc/passwd", ""):
        assert searching.get(f"/thumbnails/{uid}").status_code == 404


def test_the_map_and_the_place_of_a_query(searching: TestClient, small_model: Model) -> None:
    drawn = searching.get("/map").json()
    assert drawn["kinds"] == ["image"] * PICTURES + ["text"] * len(TEXTS)
    assert sorted(filter(None, drawn["texts"])) == sorted(TEXTS)
    points = np.array(drawn["points"])
    assert points.shape == (PICTURES + len(TEXTS), 2)
    for uid in ("image-5", "text-3"):
        place = search(searching, uid=uid)["query"]["position"]
        np.testing.assert_allclose(place, points[drawn["uids"].index(uid)], atol=1e-5)
    both = search(searching, text="red dog", image=data_url(picture(5)))["query"]["position"]
    assert len(both) == 2


def test_info_says_what_there_is(searching: TestClient, client: TestClient, small_model: Model) -> None:
    info = searching.get("/info").json()
    assert info["index"] == {"location": "items.parquet", "images": PICTURES, "texts": len(TEXTS), "hybrid": False}
    assert info["calibration"] is True
    assert info["text_fingerprint"] == small_model.text_fingerprint
    assert info["limits"]["items"] == 2048
    without = client.get("/info").json()
    assert (without["index"], without["calibration"], without["model"]) == (None, False, "small")
    for path in ("/search?q=a", "/map", "/thumbnails/a"):
        answer = client.get(path)
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "no_index")


def test_an_index_of_another_space_is_refused(small_model: Model, tmp_path: Path) -> None:
    engine = make_engine(small_model)
    for changes, says in (({"text_fingerprint": "0" * 64}, "another text encoder"), ({"width": 8}, "8 numbers")):
        other = write_index(tmp_path, small_model, **changes)
        with pytest.raises(ModelError, match=says):
            make_app(engine, other)
        shutil.rmtree(tmp_path)


def test_an_index_of_another_vision_encoder_is_refused(small_model: Model, tmp_path: Path) -> None:
    index = write_index(tmp_path, small_model, fingerprint="0" * 64)
    with pytest.raises(ModelError, match="another vision encoder"):
        make_app(make_engine(small_model), index)


def test_a_picture_without_a_thumbnail_says_so(small_model: Model, tmp_path: Path) -> None:
    index = write_index(tmp_path, small_model)
    bare = make_items("image", ["bare"], small_model.encode_image([picture(0)]))
    index.store.delete_images()
    index.store.upsert(bare)
    with TestClient(make_app(make_engine(small_model), index)) as client:
        assert [hit["thumbnail"] for hit in search(client, text="a", kind="image")["hits"]] == [False]


def test_a_server_sees_what_nev_index_has_changed(
    small_model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nev.serve.search.RECORD_SECONDS", 0.0)
    index = write_index(tmp_path, small_model, calibration=None)
    with TestClient(make_app(make_engine(small_model), index)) as client:
        assert search(client, text="red dog")["calibrated"] is False
        before = client.get("/map").json()["uids"]
        other = ExactStore(str(tmp_path), "items")
        other.delete_images()
        other.write_spec(index.spec.model_copy(update={"calibration": small_model.spec.calibration}))
        assert search(client, text="red dog")["calibrated"] is True
        assert len(client.get("/map").json()["uids"]) == len(before) - PICTURES
        other.write_spec(index.spec.model_copy(update={"text_fingerprint": "0" * 64}))
        answer = client.post("/search", json={"text": "red dog"})
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "index_unavailable")
        assert "0" * 12 not in answer.text


def test_a_local_server_answers_to_its_own_names_alone(small_model: Model, index: Index) -> None:
    """A page of another site, whose name leads to this machine (DNS rebinding)."""
    settings = Settings(hosts=local_names("127.0.0.1", ["Search.corp"]))
    with TestClient(make_app(make_engine(small_model), index, settings), base_url="http://localhost:8000") as client:
        for host in ("localhost:8000", "127.0.0.1", "[::1]:8000", "search.corp", "SEARCH.corp:80"):
            assert client.get("/info", headers={"Host": host}).status_code == 200, host
        for host in ("evil.example", "evil.example:8000", "localhost.evil.example", ""):
            assert client.get("/info", headers={"Host": host}).status_code == 421, host


def test_columns_are_open_to_filters_by_name(small_model: Model, index: Index) -> None:
    settings = Settings(filter_columns=frozenset({"text"}))
    with TestClient(make_app(make_engine(small_model), index, settings)) as client:
        hits = search(client, text="blue", where={"text": "red dog"})["hits"]
        assert [hit["text"] for hit in hits] == ["red dog"]
