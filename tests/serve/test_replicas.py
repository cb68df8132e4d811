"""Ray Serve: the same application in two processes, one of which is killed under load."""

from __future__ import annotations

import json
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import psutil
import pytest
import ray

from nev.commands.serve import make
from nev.inference.model import Model
from nev.serve.replicas import Scale, start_replicas, stop_replicas
from nev.serve.server import ServeError, bind
from nev.serve.settings import Settings

pytestmark = [pytest.mark.ray, pytest.mark.slow]


@pytest.fixture(scope="module")
def url(ray_cluster: None, small_location: str) -> Iterator[str]:
    """Two replicas of the small model."""
    with bind("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
    open_app = partial(
        make,
        model=small_location,
        index=None,
        table="items",
        settings=Settings(),
        precision="fp32",
        device="cpu",
        threads=1,
        text=None,
        revision=None,
        trust_remote_code=False,
    )
    start_replicas(open_app, Scale(2, 2), "127.0.0.1", port, 16, cpus=0.5, gpus=0)
    yield f"http://127.0.0.1:{port}"
    stop_replicas()


def post(url: str, given: Any) -> Any:
    body = json.dumps({"input": given}).encode()
    request = urllib.request.Request(f"{url}/v1/embeddings", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)


def replicas() -> list[str]:
    return [each["name"] for each in ray.util.list_named_actors(True) if each["name"].startswith("SERVE_REPLICA::nev#")]


def test_the_same_application(url: str, small_model: Model) -> None:
    data = post(url, ["a dog", "a cat"])["data"]
    np.testing.assert_allclose(
        [each["embedding"] for each in data], small_model.encode_text(["a dog", "a cat"]), atol=1e-5
    )
    with urllib.request.urlopen(f"{url}/health") as answer:
        assert json.load(answer) == {"status": "ok"}
    with pytest.raises(urllib.error.HTTPError) as refused:
        post(url, [1])
    assert refused.value.code == 422
    assert json.load(refused.value)["error"]["param"] == "input[0]"
    port = int(url.rpartition(":")[2])
    bound = {
        each.laddr.ip for each in psutil.net_connections("tcp") if each.status == "LISTEN" and each.laddr.port == port
    }
    assert bound == {"127.0.0.1"}
    with pytest.raises(ServeError, match="already"):
        start_replicas(lambda: None, Scale(1, 1), "127.0.0.1", 0, 16, cpus=0.5, gpus=0)  # type: ignore[arg-type,return-value]


def test_a_replica_is_killed_under_load(url: str, small_model: Model) -> None:
    wanted = small_model.encode_text("a dog")
    failed: list[str] = []
    answered, end = [0], threading.Event()

    def work() -> None:
        while not end.is_set():
            for attempt in (1, 2):
                try:
                    vector = post(url, "a dog")["data"][0]["embedding"]
                    np.testing.assert_allclose(vector, wanted, atol=1e-5)
                    answered[0] += 1
                    break
                except (OSError, AssertionError) as error:
                    if attempt == 2:
                        failed.append(repr(error))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    time.sleep(1)
    before = replicas()
    assert len(before) == 2
    ray.kill(ray.get_actor(before[0], namespace="serve"))
    deadline = time.monotonic() + 60
    while (set(replicas()) - set(before) == set() or len(replicas()) < 2) and time.monotonic() < deadline:
        time.sleep(0.2)
    time.sleep(2)
    end.set()
    for thread in threads:
        thread.join(60)
    assert len(replicas()) == 2
    assert failed == []
    assert answered[0] > 50
