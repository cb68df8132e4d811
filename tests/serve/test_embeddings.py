"""`/v1/embeddings` and its siblings: whose vector is whose, and OpenAI's form."""

from __future__ import annotations

import base64
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from fastapi.testclient import TestClient
from helpers.serving import counting_engine, data_url, picture, read_vectors, vector_of
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nev.inference.model import Model
from nev.serve.app import make_app
from nev.serve.settings import Settings

SAME = 1e-5
LONG = "longer than the encoder reads " * 40


def ask(client: TestClient, given: Any, **more: Any) -> Any:
    return client.post("/v1/embeddings", json={"input": given, **more})


def test_vectors_are_those_of_the_model(client: TestClient, small_model: Model) -> None:
    red, wide = picture(1), picture(2, width=90, height=30)
    given = [
        "a dog",
        {"image": data_url(red)},
        {"text": LONG},
        {"type": "image_url", "image_url": {"url": data_url(wide)}},
    ]
    vectors = read_vectors(ask(client, given))
    wanted = [
        small_model.encode_text("a dog"),
        small_model.encode_image(red),
        small_model.encode_text(LONG),
        small_model.encode_image(wide),
    ]
    np.testing.assert_allclose(vectors, wanted, atol=SAME)
    assert np.abs(vectors[0] - vectors[2]).max() > 100 * SAME


def test_a_plain_string_is_a_text_whatever_it_looks_like(client: TestClient, small_model: Model) -> None:
    for text in ("https://example.com/a.png", "/etc/passwd", data_url(picture(1)), "", "   ", "\x00"):
        np.testing.assert_allclose(read_vectors(ask(client, text)), [small_model.encode_text(text)], atol=SAME)


@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(
        st.lists(st.one_of(st.text(max_size=60), st.integers(0, 9)), min_size=1, max_size=6), min_size=1, max_size=8
    )
)
def test_nobody_gets_the_vectors_of_another(client: TestClient, small_model: Model, requests: list[list[Any]]) -> None:
    """Requests at once, of texts and pictures mixed: each gets what it would get alone."""
    requests = [[each.replace("\ud800", "") if isinstance(each, str) else each for each in items] for items in requests]

    def call(items: list[Any]) -> Any:
        return read_vectors(
            ask(client, [each if isinstance(each, str) else {"image": data_url(picture(each))} for each in items])
        )

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(call, requests))
    for items, vectors in zip(requests, found, strict=True):
        wanted = [
            small_model.encode_text(each) if isinstance(each, str) else small_model.encode_image(picture(each))
            for each in items
        ]
        np.testing.assert_allclose(vectors, wanted, atol=SAME)


def test_both_encodings_hold_the_same_bits(client: TestClient) -> None:
    given = ["a dog", {"image": data_url(picture(3))}]
    numbers = read_vectors(ask(client, given))
    for asked in ({"encoding_format": "float"}, {"encoding_format": None}, {}):
        assert read_vectors(ask(client, given, **asked)).tolist() == numbers.tolist()
    data = ask(client, given, encoding_format="base64").json()["data"]
    rows = np.stack([np.frombuffer(base64.b64decode(each["embedding"]), "<f4") for each in data])
    assert rows.tobytes() == numbers.tobytes()


def test_dimensions_are_the_first_numbers_of_unit_length(client: TestClient, small_model: Model) -> None:
    vectors = read_vectors(ask(client, ["a dog", {"image": data_url(picture(3))}], dimensions=7))
    wanted = np.stack([small_model.encode_text("a dog", width=7), small_model.encode_image(picture(3), width=7)])
    np.testing.assert_allclose(vectors, wanted, atol=SAME)
    refused = ask(client, "a dog", dimensions=small_model.width + 1)
    assert refused.status_code == 422
    assert refused.json()["error"]["param"] == "dimensions"


def test_the_answer_has_openais_form(client: TestClient) -> None:
    answer = ask(client, ["a dog", LONG], model="small", user="me").json()
    assert answer["object"] == "list"
    assert answer["model"] == "small"
    assert {each["object"] for each in answer["data"]} == {"embedding"}
    longest = 96  # positions of the small encoder
    assert answer["usage"] == {"prompt_tokens": 4 + longest, "total_tokens": 4 + longest, "truncated_texts": 1}
    assert ask(client, [{"image": data_url(picture(3))}]).json()["usage"]["total_tokens"] == 0


def test_a_query_is_not_a_document() -> None:
    engine, seen = counting_engine()
    with TestClient(make_app(engine)) as client:
        for asked, kind in ((None, "query"), ("query", "query"), ("document", "document")):
            vectors = read_vectors(ask(client, ["a dog"], input_type=asked))
            np.testing.assert_allclose(vectors, [vector_of((kind, "a dog"))], atol=SAME)
        assert ask(client, "a dog", input_type="search").status_code == 422
    assert len(seen.sizes()) == 3


def test_files_of_pictures(client: TestClient, small_model: Model) -> None:
    files = [picture(1), picture(2, width=90, height=30)]
    answer = client.post("/v1/embeddings/images", files=[("image", ("a.png", data)) for data in files])
    np.testing.assert_allclose(read_vectors(answer), small_model.encode_image(files), atol=SAME)
    fields = {"dimensions": "5", "encoding_format": "base64", "model": "small"}
    answer = client.post("/v1/embeddings/images", files=[("image", ("a.png", files[0]))], data=fields)
    row = np.frombuffer(base64.b64decode(answer.json()["data"][0]["embedding"]), "<f4")
    np.testing.assert_allclose(row, small_model.encode_image(files[0], width=5), atol=SAME)
    for wrong in ({"files": [("file", ("a.png", files[0]))]}, {"data": {"image": "a.png"}}, {"content": b"x"}):
        assert client.post("/v1/embeddings/images", **wrong).status_code == 422


def test_the_model_has_a_name(client: TestClient) -> None:
    (card,) = client.get("/v1/models").json()["data"]
    assert card["id"] == "small"
    refused = ask(client, "a dog", model="text-embedding-3-small")
    assert refused.status_code == 404
    assert refused.json()["error"]["code"] == "model_not_found"
    assert "'small'" in refused.json()["error"]["message"]
    with TestClient(make_app(counting_engine()[0], settings=Settings(name="ours"))) as client:
        assert ask(client, "a dog", model="ours").json()["model"] == "ours"


@pytest.mark.parametrize(
    ("body", "place", "says"),
    [
        ({"input": [1, 2, 3]}, "input[0]", "Lists of tokens are not taken"),
        ({"input": [[1, 2], [3]]}, "input[0]", "Lists of tokens are not taken"),
        ({"input": 5}, "input", "a text, or a list"),
        ({"input": []}, "input", "at least 1"),
        ({"input": ["a", {"imge": "x"}]}, "input[1]", "an item is"),
        ({"input": ["a", {"image": 3}]}, "input[1].image", "string"),
        ({"input": ["a", {"text": "a", "image": "b"}]}, "input[1].image", "not permitted"),
        ({"input": ["a", {"image": "aGVsbG8="}]}, "input[1]", "data URL"),
        ({"input": [{"image": "/etc/passwd"}]}, "input[0]", "data URL"),
        ({"input": [{"image": "file:///etc/passwd"}]}, "input[0]", "data URL"),
        ({"input": [{"image": "data:image/png;base64,!!"}]}, "input[0]", "not base64"),
        ({"input": [{"image": "data:image/png;base64,aGVsbG8="}]}, "input[0]", "not an image"),
        ({"input": [{"image": "http://127.0.0.1/a.png"}]}, "input[0]", "fetches no pictures"),
        ({"input": "a", "dimension": 3}, "dimension", "not permitted"),
        ({"input": "a", "encoding_format": "hex"}, "encoding_format", "'float' or 'base64'"),
        ({"input": "a", "dimensions": 0}, "dimensions", "greater than or equal to 1"),
        ({}, "input", "required"),
    ],
)
def test_what_is_refused_says_where_and_why(client: TestClient, body: Any, place: str, says: str) -> None:
    answer = client.post("/v1/embeddings", json=body)
    error = answer.json()["error"]
    assert answer.status_code == 422
    assert error["param"] == place
    assert says in error["message"]
    assert error["type"] == "invalid_request_error"
    assert error["code"]


def test_errors_without_a_route_have_the_same_form(client: TestClient) -> None:
    no_json = {"content": b"{", "headers": {"content-type": "application/json"}}
    for answer, status in (
        (client.get("/nowhere"), 404),
        (client.delete("/v1/embeddings"), 405),
        (client.post("/v1/embeddings", **no_json), 422),
        (client.post("/v1/embeddings", content=b'{"input": "a"}'), 422),
        (client.post("/v1/embeddings", content=b'{"input": "\xff"}', headers=no_json["headers"]), 422),
        (client.post("/v1/embeddings", content=b'{"input": "\\ud800"}', headers=no_json["headers"]), 422),
        (client.post("/v1/embeddings/images", content=b"x", headers={"content-type": "multipart/form-data"}), 400),
    ):
        assert (answer.status_code, set(answer.json()["error"])) == (status, {"message", "type", "param", "code"}), (
            answer.text
        )


def test_a_bug_is_a_500_without_its_details() -> None:
    engine, seen = counting_engine(encode_images=lambda pixels: np.full((len(pixels), 16), np.nan, np.float32))
    with TestClient(make_app(engine), raise_server_exceptions=False) as client:
        answer = ask(client, [{"image": data_url(picture(1))}])
        assert (answer.status_code, answer.json()["error"]["param"]) == (422, "input[0]")
        assert "no finite vector" in answer.text
        seen.poison.add("secret")
        answer = ask(client, ["fine", "secret"])
        assert (answer.status_code, answer.json()["error"]["param"]) == (500, "input[1]")
        assert "broke" not in answer.text
        client.app.state.service.embed = None  # type: ignore[attr-defined]
        answer = ask(client, "a dog")
        assert (answer.status_code, answer.json()["error"]["type"]) == (500, "server_error")
        assert "NoneType" not in answer.text
