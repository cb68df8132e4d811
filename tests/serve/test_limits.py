"""Limits, the token, health: what is refused costs nobody else anything."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from fastapi.testclient import TestClient
from helpers.pictures import encoded, photo
from helpers.serving import counting_engine, data_url, picture, read_vectors, vector_of
from pydantic import SecretStr

from nev.inference.model import Model
from nev.serve import batcher
from nev.serve.app import make_app
from nev.serve.metrics import make_meters
from nev.serve.settings import Settings


def bomb() -> bytes:
    """A PNG of 50,000 x 50,000 pixels, whose head is all that there is to it."""
    head = struct.pack(">IIBBBBB", 50_000, 50_000, 8, 2, 0, 0, 0)
    pixels = zlib.compress(bytes(1000))

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def metric(client: TestClient, name: str) -> float:
    lines = client.get("/metrics").text.splitlines()
    return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(name))


def ask(client: TestClient, *items: Any) -> Any:
    return client.post("/v1/embeddings", json={"input": list(items)})


HARD: list[tuple[str, list[Any], int, str]] = [
    ("one pixel", [{"image": data_url(encoded(photo(1, width=1, height=1), "PNG"))}], 200, ""),
    ("a thin line", [{"image": data_url(encoded(photo(1, width=3000, height=1), "PNG"))}], 200, ""),
    ("a bomb", [{"image": data_url(bomb())}], 422, "2500000000 pixels"),
    ("truncated JPEG", [{"image": data_url(encoded(photo(1, width=300, height=300))[:2000])}], 422, "truncated"),
    ("truncated PNG", [{"image": data_url(picture(1, width=300, height=300)[:2000])}], 422, "truncated"),
    ("100 KB of text", ["word " * 20_480], 422, "characters"),
    ("50 KB of text", ["word " * 10_000], 200, ""),
    ("10,000 items", ["a"] * 10_000, 422, "10,000 items"),
    ("good beside bad", ["a dog", {"image": data_url(b"no picture")}], 422, "input[1]"),
]


@pytest.mark.parametrize(("name", "items", "status", "says"), HARD, ids=[row[0] for row in HARD])
def test_hard_input_has_its_own_answer(
    client: TestClient, small_model: Model, name: str, items: list[Any], status: int, says: str
) -> None:
    answer = ask(client, *items)
    assert answer.status_code == status
    assert says in answer.text
    assert client.get("/health").json() == {"status": "ok"}
    np.testing.assert_allclose(read_vectors(ask(client, "a dog")), [small_model.encode_text("a dog")], atol=1e-5)


def in_pieces(size: int, count: int) -> Iterator[bytes]:
    """A body without Content-Length."""
    for _ in range(count):
        yield b" " * size


def test_a_body_is_refused_before_it_has_come() -> None:
    engine, _ = counting_engine()
    with TestClient(make_app(engine, settings=Settings(max_body_bytes=1000, max_bytes_in_flight=1500))) as client:
        sent: list[int] = []

        def watched() -> Iterator[bytes]:
            for piece in in_pieces(300, 100):
                sent.append(len(piece))
                yield piece

        head = {"content-type": "application/json"}
        for answer in (
            client.post("/v1/embeddings", content=b" " * 1001, headers=head),
            client.post("/v1/embeddings", content=watched(), headers=head),
            client.post("/v1/embeddings/images", files=[("image", ("a", b" " * 1001))]),
            client.get("/health", headers={"content-length": "1001"}),
            client.get("/health", headers={"content-length": "9" * 5000}),
        ):
            assert answer.status_code == 413, answer.text
            assert "1,000 bytes" in answer.json()["error"]["message"]
        assert ask(client, "a" * 900).status_code == 200


def test_bodies_in_flight_are_limited_together() -> None:
    """Three callers at once, each within the limit of a body."""
    import asyncio

    from nev.serve.guard import Guard

    statuses: list[int] = []
    meters = make_meters()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await asyncio.sleep(0.01)
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    guard = Guard(app, Settings(max_body_bytes=1000, max_bytes_in_flight=2000), meters)

    async def call() -> None:
        async def receive() -> dict[str, Any]:
            return {"type": "http.request", "body": b" " * 900, "more_body": False}

        async def send(message: Any) -> None:
            if message["type"] == "http.response.start":
                statuses.append(message["status"])

        await guard({"type": "http", "path": "/search", "method": "POST", "headers": []}, receive, send)

    async def main() -> None:
        await asyncio.gather(*(call() for _ in range(3)))
        await call()

    asyncio.run(main())
    assert sorted(statuses) == [200, 200, 200, 429]
    assert guard.bytes_in_flight == 0
    assert meters.rejected.labels("bytes")._value.get() == 1


def test_a_full_queue_is_a_429_with_retry_after() -> None:
    engine, _ = counting_engine()
    with TestClient(make_app(engine, settings=Settings(max_waiting=3))) as client:
        with client.app.state.service.texts.waiting.admit(3):  # type: ignore[attr-defined]
            answer = ask(client, "a dog")
            assert answer.status_code == 429
            assert int(answer.headers["retry-after"]) >= 1
            assert answer.json()["error"]["type"] == "rate_limit_error"
            assert ask(client, {"image": data_url(picture(1))}).status_code == 200  # pictures have a queue of their own
            assert client.get("/health").status_code == 200
        assert ask(client, *("a" * 10)).status_code == 200  # a request larger than the queue comes in where it is empty
        assert metric(client, "nev_rejected_requests_total") == 1


def test_without_the_token_nothing_is_answered() -> None:
    engine, seen = counting_engine()
    with TestClient(make_app(engine, settings=Settings(token=SecretStr("s3cret")))) as client:
        before = len(seen.texts)
        paths = ("/metrics", "/openapi.json", "/v1/models", "/info", "/search?q=a", "/map", "/thumbnails/a", "/nowhere")
        for header in (
            None,
            "Bearer",
            "Bearer s3cre",
            "Bearer s3crets",
            "Basic s3cret",
            "s3cret",
            "Bearer \xe9",
            "Bearer s3cret x",
        ):
            headers = {} if header is None else {"authorization": header.encode("latin-1")}
            for answer in (
                *(client.get(path, headers=headers) for path in paths),
                client.post("/v1/embeddings", json={"input": "a"}, headers=headers),
            ):
                assert answer.status_code == 401, (header, answer.url)
                assert answer.headers["www-authenticate"] == "Bearer"
                assert answer.json()["error"]["type"] == "authentication_error"
        assert client.get("/health").status_code == 200
        assert len(seen.texts) == before
        for header in ("Bearer s3cret", "bearer  s3cret"):
            answer = client.post("/v1/embeddings", json={"input": "a"}, headers={"authorization": header})
            np.testing.assert_allclose(read_vectors(answer), [vector_of(("query", "a"))], atol=1e-6)
        document = client.get("/openapi.json", headers={"authorization": "Bearer s3cret"}).json()
        assert document["components"]["securitySchemes"]["token"] == {"type": "http", "scheme": "bearer"}


def test_health_fails_with_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batcher, "FRESH_SECONDS", 0)
    engine, seen = counting_engine()
    with TestClient(make_app(engine)) as client:
        assert client.get("/health").status_code == 200
        seen.broken = True
        answer = client.get("/health")
        assert answer.status_code == 503
        assert answer.json()["error"]["code"] == "unhealthy"
        seen.broken = False
        assert client.get("/health").status_code == 200


def test_health_fails_where_the_queue_is_not_worked_on() -> None:
    engine, _ = counting_engine()
    with TestClient(make_app(engine)) as client:
        client.portal.call(client.app.state.service.pictures._task.cancel)  # type: ignore[attr-defined,union-attr]
        assert client.get("/health").status_code == 503
        assert ask(client, {"image": data_url(picture(1))}).status_code == 503
        assert ask(client, "a dog").status_code == 200


def test_metrics_count_routes_batches_and_items() -> None:
    engine, _ = counting_engine()
    with TestClient(make_app(engine)) as client:
        ask(client, "a", "b", {"image": data_url(picture(1))})
        ask(client, {"image": "x"})
        client.get("/secret/path/of/a/caller")
        client.request("BREW", "/coffee")
        text = client.get("/metrics").text
        for line in (
            'nev_requests_total{method="POST",route="/v1/embeddings",status="200"} 1.0',
            'nev_requests_total{method="POST",route="/v1/embeddings",status="422"} 1.0',
            'nev_requests_total{method="",route="unmatched",status="404"} 2.0',
            'nev_items_total{kind="text"} 3.0',  # with the one that shows that the model works
            'nev_items_total{kind="picture"} 2.0',
            'nev_batch_size_bucket{kind="text",le="2.0"} 2.0',
            'nev_waiting_items{kind="text"} 0.0',
        ):
            assert line in text, text
        assert "secret" not in text
        assert "process_resident_memory_bytes" in text
