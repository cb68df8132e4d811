"""Servers in tests: an engine that counts, the small model's engine, and uvicorn in a thread on a free port."""

from __future__ import annotations

import base64
import hashlib
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from fastapi import FastAPI
from numpy.typing import NDArray

from helpers.pictures import encoded, photo
from nev.config.data import Limits
from nev.serve.engine import CANARY, Engine, Sentence, TextVector

WIDTH, SIDE = 16, 8
SLOW = 30  # seconds after which a test has failed


def vector_of(value: object) -> NDArray[np.float32]:
    """A unit vector that belongs to a value alone."""
    seed = int.from_bytes(hashlib.sha256(repr(value).encode()).digest()[:8], "little")
    vector = np.random.default_rng(seed).normal(size=WIDTH).astype(np.float32)
    return vector / np.linalg.norm(vector)


@dataclass
class Forwards:
    """What a counting engine was called with. open: cleared, every forward waits. poison: texts that break a forward."""

    texts: list[list[Sentence]] = field(default_factory=list)
    pictures: list[int] = field(default_factory=list)
    open: threading.Event = field(default_factory=threading.Event)
    poison: set[str] = field(default_factory=set)
    broken: bool = False

    def __post_init__(self) -> None:
        self.open.set()

    def sizes(self) -> list[int]:
        """Texts of each forward, without those that ask for health."""
        return [len(batch) for batch in self.texts if [each.text for each in batch] != [CANARY]]


def counting_engine(**changes: Any) -> tuple[Engine, Forwards]:
    """An engine without a model: each text and each picture has a vector of its own."""
    seen = Forwards()

    def encode_texts(sentences: Sequence[Sentence]) -> list[TextVector]:
        seen.texts.append(list(sentences))
        assert seen.open.wait(SLOW)
        if seen.broken or any(sentence.text in seen.poison for sentence in sentences):
            raise RuntimeError("the model broke")
        return [
            TextVector(vector_of((each.kind, each.text)), len(each.text.split()), len(each.text) > 50)
            for each in sentences
        ]

    def encode_images(pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        seen.pictures.append(len(pixels))
        assert seen.open.wait(SLOW)
        if seen.broken:
            raise RuntimeError("the model broke")
        return np.stack([vector_of(square.tobytes()) for square in pixels])

    parts: dict[str, Any] = {
        "name": "counting",
        "runtime": "numpy",
        "precision": "fp32",
        "width": WIDTH,
        "image_size": SIDE,
        "limits": Limits(),
        "fingerprint": "f" * 64,
        "text_fingerprint": "t" * 64,
        "encode_images": encode_images,
        "encode_texts": encode_texts,
    }
    return Engine(**(parts | changes)), seen


def data_url(data: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def picture(seed: int, **size: int) -> bytes:
    """The bytes of a PNG."""
    return encoded(photo(seed, **size), "PNG")


def read_vectors(answer: Any) -> NDArray[np.float32]:
    """The vectors of an answer in the format `float`: [n, D]."""
    assert answer.status_code == 200, answer.text
    data = answer.json()["data"]
    assert [each["index"] for each in data] == list(range(len(data)))
    return np.array([each["embedding"] for each in data], np.float32)


@contextmanager
def run_in_thread(app: FastAPI) -> Iterator[str]:
    """Serve an application by uvicorn in a thread: its URL."""
    from nev.serve.server import bind, run_server

    taken, ready = bind("127.0.0.1", 0), threading.Event()
    servers: list[Any] = []
    thread = threading.Thread(target=run_server, args=(app, taken, ready.set, servers.append), daemon=True)
    thread.start()
    assert ready.wait(SLOW)
    try:
        yield f"http://127.0.0.1:{taken.getsockname()[1]}"
    finally:
        servers[0].should_exit = True
        thread.join(SLOW)


def wait_for(condition: Callable[[], bool]) -> None:
    """Wait until something is so."""
    tick = threading.Event()
    for _ in range(SLOW * 100):
        if condition():
            return
        tick.wait(0.01)
    raise AssertionError("it did not come to be")
