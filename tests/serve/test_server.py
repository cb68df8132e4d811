"""A server on a port: OpenAI's own client, callers at once, callers who go, and the end."""

from __future__ import annotations

import asyncio
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
from helpers.serving import (
    WIDTH,
    Forwards,
    counting_engine,
    data_url,
    picture,
    run_in_thread,
    vector_of,
    wait_for,
)
from typer.testing import CliRunner

from nev.commands.main import make_app as make_cli
from nev.inference.model import Model
from nev.serve.app import make_app
from nev.serve.replicas import Scale, _refuse_open_ports, parse_scale
from nev.serve.server import ServeError, bind, is_loopback, read_token
from nev.serve.service import gather_or_cancel
from nev.serve.torch_engine import make_engine


@pytest.fixture(scope="module")
def counting() -> Iterator[tuple[str, Forwards]]:
    """The address of a server without a model, and what its forwards were called with."""
    engine, seen = counting_engine()
    with run_in_thread(make_app(engine)) as url:
        yield url, seen


@pytest.fixture
def slow(counting: tuple[str, Forwards]) -> Iterator[tuple[str, Forwards]]:
    """The same, where a first text is in a forward that ends when `open` is set."""
    url, seen = counting
    seen.texts.clear()
    seen.open.clear()
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(ask, url, "first")
        wait_for(lambda: seen.sizes() == [1])
        yield url, seen
        seen.open.set()
        assert first.result()["data"]


def ask(url: str, *items: Any) -> Any:
    body = json.dumps({"input": list(items)}).encode()
    request = urllib.request.Request(f"{url}/v1/embeddings", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=30) as answer:
        return json.load(answer)


def test_openais_client(small_model: Model) -> None:
    with run_in_thread(make_app(make_engine(small_model))) as url:
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        name = client.models.list().data[0].id
        answer = client.embeddings.create(model=name, input=["a dog", "a cat"])  # asks for base64 by itself
        vectors = np.array([each.embedding for each in answer.data])
        np.testing.assert_allclose(vectors, small_model.encode_text(["a dog", "a cat"]), atol=1e-5)
        assert answer.usage.total_tokens == 8
        mixed: Any = ["a dog", {"image": data_url(picture(1))}]
        answer = client.embeddings.create(
            model=name, input=mixed, dimensions=9, encoding_format="float", extra_body={"input_type": "document"}
        )
        wanted = [small_model.encode_text("a dog", width=9), small_model.encode_image(picture(1), width=9)]
        np.testing.assert_allclose([each.embedding for each in answer.data], wanted, atol=1e-5)
        with pytest.raises(openai.UnprocessableEntityError, match=r"input\[0\]"):
            client.embeddings.create(model=name, input=[[1, 2, 3]])
        with pytest.raises(openai.NotFoundError, match="'other'"):
            client.embeddings.create(model="other", input="a")


def test_callers_at_once_share_a_forward(slow: tuple[str, Forwards]) -> None:
    url, seen = slow
    texts = [f"caller {n}" for n in range(20)]
    with ThreadPoolExecutor(20) as pool:
        calls = [pool.submit(ask, url, text) for text in texts]
        wait_for(lambda: metric(url, 'nev_waiting_items{kind="text"}') == 21)
        seen.open.set()
        answers = [call.result() for call in calls]
    assert seen.sizes() == [1, 20]
    for text, answer in zip(texts, answers, strict=True):
        np.testing.assert_allclose(answer["data"][0]["embedding"], vector_of(("query", text)), atol=1e-6)


def metric(url: str, name: str) -> float:
    with urllib.request.urlopen(f"{url}/metrics") as answer:
        lines = answer.read().decode().splitlines()
    return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(name))


def test_a_caller_who_goes_costs_no_forward(slow: tuple[str, Forwards]) -> None:
    url, seen = slow
    host, _, port = url.removeprefix("http://").partition(":")
    before = metric(url, 'nev_dropped_items_total{kind="text"}')
    gone = http.client.HTTPConnection(host, int(port))
    body = json.dumps({"input": ["I", "am", "leaving"]})
    gone.request("POST", "/v1/embeddings", body, {"Content-Type": "application/json"})
    wait_for(lambda: metric(url, 'nev_waiting_items{kind="text"}') == 4)
    gone.close()
    wait_for(lambda: metric(url, 'nev_waiting_items{kind="text"}') == 1)
    with ThreadPoolExecutor(1) as pool:
        stays = pool.submit(ask, url, "I stay")
        wait_for(lambda: metric(url, 'nev_waiting_items{kind="text"}') == 2)
        seen.open.set()
        assert stays.result()["data"]
    assert [each.text for batch in seen.texts for each in batch] == ["first", "I stay"]
    assert metric(url, 'nev_dropped_items_total{kind="text"}') == before + 3
    assert metric(url, 'nev_requests_total{method="POST",route="/v1/embeddings",status="499"}') == 1


def test_an_item_that_breaks_the_model_fails_for_its_caller_alone(slow: tuple[str, Forwards]) -> None:
    url, seen = slow
    seen.poison.add("poison")
    with ThreadPoolExecutor(5) as pool:
        calls = {text: pool.submit(ask, url, text) for text in ("a", "b", "poison", "c")}
        wait_for(lambda: metric(url, 'nev_waiting_items{kind="text"}') == 5)
        seen.open.set()
        with pytest.raises(urllib.request.HTTPError, match="500"):
            calls.pop("poison").result()
        for text, call in calls.items():
            np.testing.assert_allclose(call.result()["data"][0]["embedding"], vector_of(("query", text)), atol=1e-6)
    with urllib.request.urlopen(f"{url}/health") as answer:
        assert answer.status == 200


SCRIPT = """
import sys, threading
from helpers.serving import counting_engine
from nev.serve.app import make_app
from nev.serve.replicas import Scale, _refuse_open_ports, parse_scale
from nev.serve.server import bind, run_server
engine, seen = counting_engine()
taken = bind("127.0.0.1", 0)
def ready():
    seen.open.clear()
    print(taken.getsockname()[1], flush=True)
def open_later():
    sys.stdin.readline()
    seen.open.set()
threading.Thread(target=open_later, daemon=True).start()
run_server(make_app(engine), taken, ready)
"""


@pytest.mark.slow
def test_sigterm_answers_what_has_come() -> None:
    paths = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    server = subprocess.Popen(
        [sys.executable, "-c", SCRIPT],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": paths},
    )
    assert server.stdout
    assert server.stdin
    url = f"http://127.0.0.1:{server.stdout.readline().strip()}"
    with ThreadPoolExecutor(1) as pool:
        call = pool.submit(ask, url, "a")
        wait_for(lambda: metric(url, 'nev_waiting_items{kind="text"}') == 1)
        server.send_signal(signal.SIGTERM)
        wait_for(lambda: not _accepts(url))
        assert not call.done()
        server.stdin.write("\n")
        server.stdin.flush()
        assert len(call.result()["data"][0]["embedding"]) == WIDTH
    assert server.wait(30) == -signal.SIGTERM


def _accepts(url: str) -> bool:
    host, _, port = url.removeprefix("http://").partition(":")
    try:
        with socket.create_connection((host, int(port)), timeout=1):
            return True
    except OSError:
        return False


def test_a_port_that_is_taken_is_found_before_the_model_is_opened(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = CliRunner().invoke(make_cli(), ["serve", "--model", str(tmp_path / "absent"), "--port", str(port)])
    assert done.exit_code == 2
    assert "--port 0 takes a free port" in " ".join(done.output.split())


def test_what_a_token_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NEV_TOKEN", raising=False)
    assert read_token(None) is None
    file = tmp_path / "token"
    file.write_text("s3cret\n")
    token = read_token(str(file))
    assert token
    assert token.get_secret_value() == "s3cret"
    assert "s3cret" not in repr(token)
    monkeypatch.setenv("NEV_TOKEN", "other")
    other = read_token(None)
    assert other
    assert other.get_secret_value() == "other"
    for wrong in ("", "  \n", "two words", "two\nlines", "ümlaut"):
        file.write_text(wrong)
        with pytest.raises(ServeError, match="no token"):
            read_token(str(file))
    with pytest.raises(ServeError, match="cannot be read"):
        read_token(str(tmp_path / "absent"))


def test_what_a_failed_request_began_is_cancelled() -> None:
    ended: list[str] = []

    async def wait() -> None:
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            ended.append("cancelled")
            raise

    async def fail() -> None:
        await asyncio.sleep(0.01)
        raise ValueError("no picture")

    async def main() -> None:
        with pytest.raises(ValueError, match="no picture"):
            await gather_or_cancel(wait(), fail())
        await asyncio.sleep(0)

    asyncio.run(main())
    assert ended == ["cancelled"]


def test_what_only_this_machine_reaches() -> None:
    assert [host for host in ("127.0.0.1", "localhost", "::1", "127.9.9.9") if not is_loopback(host)] == []
    assert [host for host in ("0.0.0.0", "::", "192.168.0.1", "example.com") if is_loopback(host)] == []
    with bind("127.0.0.1", 0) as taken:
        taken.listen()
        with pytest.raises(ServeError, match="cannot be bound"):
            bind("127.0.0.1", taken.getsockname()[1])


def test_the_command_serves_and_warns_where_it_is_open_to_others(
    small_location: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """`nev serve` from its options to an answer, with uvicorn ended from another thread."""
    from nev.serve import server

    found: dict[str, Any] = {}
    run = server.run_server

    def run_and_ask(app: Any, taken: socket.socket, when_ready: Any) -> None:
        made: list[Any] = []

        def ask_then_end() -> None:
            when_ready()
            port = taken.getsockname()[1]

            def work() -> None:
                found["answer"] = ask(f"http://127.0.0.1:{port}", "a dog")
                made[0].should_exit = True

            threading.Thread(target=work).start()

        run(app, taken, ask_then_end, made.append)

    monkeypatch.setattr(server, "run_server", run_and_ask)
    monkeypatch.delenv("NEV_TOKEN", raising=False)
    arguments = [
        "serve",
        "--model",
        small_location,
        "--port",
        "0",
        "--host",
        "0.0.0.0",
        "--name",
        "ours",
        "--device",
        "cpu",
    ]
    done = CliRunner().invoke(make_cli(), arguments)
    assert done.exit_code == 0, done.output
    assert found["answer"]["model"] == "ours"
    assert "there is no token" in " ".join(done.output.split())
    assert done.output.count("http://") == 1


def test_how_many_replicas() -> None:
    assert parse_scale(None, None) is None
    assert parse_scale(3, None) == Scale(3, 3)
    assert parse_scale(None, "1:4") == Scale(1, 4)
    for replicas, autoscale in ((2, "1:4"), (None, "4:1"), (None, "0:2"), (None, "4"), (None, "a:b")):
        with pytest.raises(ServeError, match="MIN:MAX"):
            parse_scale(replicas, autoscale)


def test_settings_of_ray_that_open_ports_are_refused() -> None:
    _refuse_open_ports({"RAY_SERVE_ENABLE_HA_PROXY": "0", "RAY_SERVE_OTHER": "1"})
    for name in ("RAY_SERVE_ENABLE_HA_PROXY", "RAY_SERVE_ENABLE_DIRECT_INGRESS", "RAY_SERVE_THROUGHPUT_OPTIMIZED"):
        with pytest.raises(ServeError, match=name):
            _refuse_open_ports({name: "1"})
