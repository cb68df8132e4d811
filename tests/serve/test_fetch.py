"""Pictures from the web: which addresses are refused, and that the connection goes to the checked address."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from fastapi.testclient import TestClient
from helpers.serving import counting_engine, picture, read_vectors

from nev.data.decode import BadImage
from nev.serve import service
from nev.serve.app import make_app
from nev.serve.fetch import fetch_picture, is_public, resolve_name
from nev.serve.settings import Settings

PICTURE = picture(1)
LIMIT = 100_000


class Web(BaseHTTPRequestHandler):
    """A site with a picture, a redirect, too many bytes, and an answer that never ends."""

    asked: list[str]

    def do_GET(self) -> None:
        self.server.asked.append(f"{self.headers['host']}{self.path}")  # type: ignore[attr-defined]
        if self.path == "/moved":
            self.send_response(302)
            self.send_header("Location", "/a.png")
            self.end_headers()
            return
        if self.path == "/absent":
            self.send_error(404)
            return
        self.send_response(200)
        self.end_headers()  # without a length
        pieces = {"/endless": b" " * 10_000, "/slow": b" "}.get(self.path)
        try:
            if pieces is None:
                self.wfile.write(PICTURE)
                return
            while True:
                self.wfile.write(pieces)
                threading.Event().wait(0.0 if self.path == "/endless" else 0.05)
        except OSError:
            return  # the caller has gone

    def log_message(self, *args: Any) -> None:
        return


@pytest.fixture(scope="module")
def web() -> Iterator[Any]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Web)
    server.asked = []  # type: ignore[attr-defined]
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()


def fetch(url: str, **options: Any) -> bytes:
    return asyncio.run(fetch_picture(url, LIMIT, options.pop("seconds", 5), **options))


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1",
        "10.0.0.1",
        "172.16.0.1",
        "192.168.1.1",
        "169.254.169.254",
        "100.64.0.1",
        "0.0.0.0",
        "224.0.0.1",
        "240.0.0.1",
        "255.255.255.255",
        "::1",
        "::",
        "fe80::1%eth0",
        "fc00::1",
        "fec0::1",
        "ff02::1",
        "::ffff:127.0.0.1",
        "::ffff:a9fe:a9fe",
        "64:ff9b::7f00:1",
        "2002:7f00:1::",
        "2001:0:4136:e378:8000:63bf:3fff:fdd2",
    ],
)
def test_addresses_that_are_not_public(address: str) -> None:
    assert not is_public(address)
    reached: list[str] = []

    async def resolve(host: str, port: int) -> list[str]:
        reached.append(host)
        return ["93.184.215.14", address]  # one of the two is enough

    with pytest.raises(BadImage, match="public web"):
        fetch("http://pictures.example/a.png", resolve=resolve)
    assert reached == ["pictures.example"]


def test_public_addresses() -> None:
    for address in (
        "93.184.215.14",
        "8.8.8.8",
        "2606:2800:21f:cb07:6820:80da:af6b:8b2c",
        "::ffff:8.8.8.8",
        "64:ff9b::808:808",
    ):
        assert is_public(address)


@pytest.mark.parametrize(
    "url",
    [
        "http://127.0.0.1/",
        "http://localhost/",
        "http://[::1]/",
        "http://[::ffff:127.0.0.1]/",
        "http://2130706433/",
        "http://0x7f.1/",
        "http://127.1/",
        "http://0177.0.0.1/",
        "http://0/",
    ],
)
def test_this_machine_by_any_name(url: str) -> None:
    with pytest.raises(BadImage, match=r"public web|cannot be fetched"):
        fetch(url)


@pytest.mark.parametrize(
    "url",
    ["ftp://example.com/a", "http://", "http:///a", "http://me:pw@example.com/", "http://[::1", "http://a:99999/"],
)
def test_what_is_no_address(url: str) -> None:
    with pytest.raises(BadImage, match=r"address|http"):
        fetch(url, resolve=_never)


async def _never(host: str, port: int) -> list[str]:
    raise AssertionError("not to be resolved")


def test_the_connection_goes_to_the_address_that_was_checked(web: Any) -> None:
    """DNS rebinding: the name has another address at every question, so there must be one question."""
    answers = [["127.0.0.1"], ["10.0.0.1"]]

    async def resolve(host: str, port: int) -> list[str]:
        return answers.pop(0)

    url = f"http://pictures.example:{web.server_port}/a.png"
    assert fetch(url, resolve=resolve, is_allowed=lambda address: address == "127.0.0.1") == PICTURE
    assert answers == [["10.0.0.1"]]
    assert web.asked[-1] == f"pictures.example:{web.server_port}/a.png"


def test_redirects_errors_sizes_and_times(web: Any) -> None:
    base = f"http://127.0.0.1:{web.server_port}"
    before = len(web.asked)
    for path, says, seconds in (
        ("/moved", "answers 302, and redirects are not followed", 5),
        ("/absent", "answers 404", 5),
        ("/endless", "more than 100,000 bytes", 5),
        ("/slow", "not fetched within 0.3 s", 0.3),
    ):
        with pytest.raises(BadImage, match=says):
            fetch(base + path, seconds=seconds, is_allowed=lambda address: True)
    assert len(web.asked) == before + 4
    with pytest.raises(BadImage, match="cannot be fetched"):
        fetch("http://127.0.0.1:1/", is_allowed=lambda address: True)


def test_a_server_that_may_fetch(web: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    async def resolve(host: str, port: int) -> list[str]:
        return ["127.0.0.1"] if host == "pictures.example" else await resolve_name(host, port)

    async def fetch_here(url: str, max_bytes: int, seconds: float) -> bytes:
        return await fetch_picture(url, max_bytes, seconds, resolve, lambda address: "pictures.example" in url)

    monkeypatch.setattr(service, "fetch_picture", fetch_here)
    engine, _ = counting_engine()
    with TestClient(make_app(engine, settings=Settings(allow_urls=True))) as client:

        def ask(*urls: str) -> Any:
            items = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
            return client.post("/v1/embeddings", json={"input": items})

        inside = f"http://127.0.0.1:{web.server_port}/a.png"
        outside = inside.replace("127.0.0.1", "pictures.example")
        file = client.post("/v1/embeddings/images", files=[("image", ("a.png", PICTURE))])
        assert read_vectors(ask(outside)).tolist() == read_vectors(file).tolist()
        refused = ask(outside, inside)
        assert (refused.status_code, refused.json()["error"]["param"]) == (422, "input[1]")
        assert "127.0.0.1" not in refused.text
