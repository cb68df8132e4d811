"""The API that the page speaks to, over drawn pictures and made-up vectors with a modality gap, on a free local port."""

from __future__ import annotations

import base64
import hashlib
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse

from nev.data.prepare.synthetic import COLOURS, SHAPES, describe, render
from nev.ops.vectors import Floats, scale_to_unit, shift_mean
from nev.serve.page import add_page

WIDTH = 48
SCRIPT = '<script>document.title = "struck"</script><img src=x onerror="document.title = \'struck\'">'
ODD_UID = "a/b c?d#e%f/../g"
PICTURES, TEXTS, PAGE = 50, 60, 24  # items of each kind, and hits that the page shows at once


def draw_vectors(names: list[str]) -> dict[str, Floats]:
    """A random direction a name: the same on every machine."""
    return {name: np.random.default_rng(n).normal(size=WIDTH).astype(np.float32) for n, name in enumerate(names)}


DIRECTIONS = draw_vectors([*COLOURS, *SHAPES, "picture", "sentence"])


def make_vector(words: str, modality: str, noise: str, spread: float = 0.5) -> Floats:
    """A unit vector of the colours and shapes in `words`, away from the other modality's, moved a little by `noise`: [D]."""
    known = [name for name in (*COLOURS, *SHAPES) if re.search(rf"\b{name}", words)]
    seed = int.from_bytes(hashlib.sha256(noise.encode()).digest()[:4], "big")
    jitter = np.random.default_rng(seed).normal(size=WIDTH)
    total = sum((DIRECTIONS[name] for name in known), start=np.zeros(WIDTH, np.float32))
    return scale_to_unit((total + spread * jitter + 1.5 * DIRECTIONS[modality])[None])[0]


@cache
def draw_picture(number: int) -> tuple[bytes, str]:
    """A JPEG that is not in the index, and its caption."""
    row = render(number, 7, "val")
    return bytes(row["image"]), str(row["caption"])


@dataclass
class Faults:
    """What a test sets, and what reached the server.

    answers: status and headers of the next answers of /search, in the place of hits. token: what the API asks for.
    indexed: whether an index is open. calibration: whether the model has means. hybrid: whether there is full text.
    positions: whether hits have places on the map. queries: bodies of /search.
    """

    answers: list[tuple[int, dict[str, str]]] = field(default_factory=list)
    token: str = ""
    indexed: bool = True
    calibration: bool = True
    hybrid: bool = True
    positions: bool = True
    queries: list[dict[str, Any]] = field(default_factory=list)


class Items:
    """Items with unit vectors, [n, D], and both maps of them."""

    def __init__(self, pictures: int, texts: int) -> None:
        rows = [render(n, 0, "train") for n in range(pictures)]
        self.thumbnails = {str(row["uid"]): bytes(row["image"]) for row in rows}
        self.uids = list(self.thumbnails)
        self.texts = [str(row["caption"]) for row in rows]
        self.uids += [f"text-{n:04d}" for n in range(texts)]
        self.texts += [describe(n, 1, "val").caption for n in range(texts)]
        self.kinds = ["image"] * pictures + ["text"] * texts
        # A text that would be markup, a long text, and a picture whose uid is odd in an address.
        self.texts[pictures] = f"{SCRIPT} a red ring"
        self.texts[pictures + 1] = "a green square, and then " + "very " * 120 + "much more of a caption"
        self.texts[pictures + 2] = "averylongwordwithoutaspace" * 8 + " a red ring"
        self.thumbnails[ODD_UID] = self.thumbnails.pop(self.uids[0])
        self.uids[0] = ODD_UID
        modality = {"image": "picture", "text": "sentence"}
        names = zip(self.uids, self.texts, self.kinds, strict=True)
        self.raw = np.stack([make_vector(text, modality[kind], uid) for uid, text, kind in names])
        self.is_image = np.array(self.kinds) == "image"
        self.means = self.raw[self.is_image].mean(axis=0), self.raw[~self.is_image].mean(axis=0)
        self.calibrated = np.where(self.is_image[:, None], shift_mean(self.raw, *self.means), self.raw)
        self.axes = {calibrated: _fit(self.vectors(calibrated)) for calibrated in (True, False)}

    def vectors(self, calibrated: bool) -> Floats:
        return self.calibrated if calibrated else self.raw

    def place(self, vectors: Floats, calibrated: bool) -> list[list[float]]:
        mean, axes, _ = self.axes[calibrated]
        return [[round(float(x), 4) for x in row] for row in (vectors - mean) @ axes.T]


def _fit(vectors: Floats) -> tuple[Floats, Floats, list[float]]:
    """Mean, two principal axes, and the shares of variance that they explain."""
    mean = vectors.mean(axis=0)
    _, sizes, axes = np.linalg.svd(vectors - mean, full_matrices=False)
    return mean, axes[:2], [round(float(size), 4) for size in (sizes**2 / (sizes**2).sum())[:2]]


def make_app(faults: Faults, items: Items) -> FastAPI:
    app = FastAPI(openapi_url=None)

    @app.middleware("http")
    async def check_token(request: Request, call_next: Any) -> Response:
        free = request.url.path == "/" or request.url.path.startswith("/static/")
        if not free and faults.token and request.headers.get("Authorization") != f"Bearer {faults.token}":
            return refuse(401, "this service needs a token: Authorization: Bearer TOKEN")
        answer: Response = await call_next(request)
        return answer

    @app.get("/info")
    def info() -> dict[str, Any]:
        index = {"location": "drawn", "images": sum(items.is_image), "texts": sum(~items.is_image)}
        index = {name: value if isinstance(value, str) else int(value) for name, value in index.items()}
        return {
            "model": "made-up",
            "width": WIDTH,
            "index": {**index, "hybrid": faults.hybrid} if faults.indexed else None,
            "calibration": faults.calibration,
            "limits": {},
            "version": "0",
        }

    @app.get("/map")
    def get_map(calibrated: bool = False) -> dict[str, Any]:
        return {
            "points": items.place(items.vectors(calibrated), calibrated),
            "uids": items.uids,
            "kinds": items.kinds,
            "texts": [text[:120] for text in items.texts],
            "explained": items.axes[calibrated][2],
        }

    @app.get("/thumbnails/{uid:path}")
    def thumbnail(uid: str) -> Response:
        if uid not in items.thumbnails:
            return refuse(404, f"no thumbnail of {uid!r}")
        return Response(items.thumbnails[uid], media_type="image/jpeg")

    @app.post("/v1/embeddings")
    async def embed(request: Request) -> Any:
        body = await request.json()
        vectors = [
            embed_picture(item["image"]) if "image" in item else make_vector(item["text"], "sentence", item["text"])
            for item in body["input"]
        ]
        return {"data": [{"index": n, "embedding": vector.tolist()} for n, vector in enumerate(vectors)]}

    @app.post("/search")
    async def search(request: Request) -> Any:
        body = await request.json()
        faults.queries.append(body)
        if faults.answers:
            status, headers = faults.answers.pop(0)
            return refuse(status, f"made-up fault {status}", headers)
        return rank(items, body, faults)

    add_page(app)
    return app


def embed_picture(url: str) -> Floats:
    """The vector of a drawing of `draw_picture`; of other bytes a vector that is near nothing: [D]."""
    data = base64.b64decode(url.partition(",")[2])
    captions = dict(draw_picture(number) for number in range(8))
    return make_vector(captions.get(data, ""), "picture", hashlib.sha256(data).hexdigest())


def rank(items: Items, body: dict[str, Any], faults: Faults) -> dict[str, Any]:
    """Hits of a query by exact cosines, each with its percentile within the cosines of its modality."""
    calibrated = body["calibrated"] and faults.calibration
    vectors, parts = items.vectors(calibrated), {}
    if body["text"]:
        parts["text"] = make_vector(body["text"], "sentence", body["text"], spread=0.1)
    if body["image"]:
        picture = embed_picture(body["image"])[None]
        parts["image"] = (shift_mean(picture, *items.means) if calibrated else picture)[0]
    if body["uid"]:
        number = items.uids.index(body["uid"])
        parts["both" if parts else items.kinds[number]] = vectors[number]
    query = scale_to_unit(np.mean(list(parts.values()), axis=0)[None])
    scores = (vectors @ query.T)[:, 0]
    percentiles = np.zeros(len(scores))
    for own in (items.is_image, ~items.is_image):
        percentiles[own] = 100 * (scores[own][:, None] >= scores[own][None]).mean(axis=1)
    order = [
        int(n)
        for n in np.argsort(-scores, kind="stable")
        if items.uids[n] != body["uid"]
        and body["kind"] in (None, items.kinds[n])
        and percentiles[n] >= (body["min_percentile"] or 0)
        and not (body["hybrid"] and body["text"] and body["text"] not in items.texts[n])
    ]
    places = items.place(vectors, calibrated)
    hits = [
        {
            "uid": items.uids[n],
            "kind": items.kinds[n],
            "score": float(scores[n]),
            "percentile": float(percentiles[n]),
            "text": items.texts[n],
            "source": f"folder/{items.uids[n]}.jpg" if items.is_image[n] else None,
            "thumbnail": items.uids[n] in items.thumbnails,
            **({"position": places[n]} if faults.positions else {}),
        }
        for n in order[body["offset"] : body["offset"] + body["top"]]
    ]
    return {
        "hits": hits,
        "offset": body["offset"],
        "top": body["top"],
        "calibrated": calibrated,
        "query": {
            "kind": "both" if len(parts) > 1 else next(iter(parts)),
            "position": items.place(query, calibrated)[0],
        },
        "milliseconds": 3.2,
    }


def rank_names(items: Items, top: int = PAGE, **query: Any) -> list[str]:
    """Names of the hits that the ranking has for a query."""
    empty = {"text": None, "image": None, "uid": None, "kind": None, "min_percentile": None, "hybrid": False}
    body = {**empty, "calibrated": True, "offset": 0, "top": top, **query}
    return [hit["text"][:120] for hit in rank(items, body, Faults())["hits"]]


def refuse(status: int, message: str, headers: dict[str, str] | None = None) -> JSONResponse:
    error = {"message": message, "type": "invalid_request_error", "param": None, "code": None}
    return JSONResponse({"error": error}, status, headers)


@contextmanager
def serve_app(app: FastAPI) -> Iterator[str]:
    """Run an application in a thread; its address."""
    config = uvicorn.Config(app, port=0, log_level="error", lifespan="off")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        thread.join(0.01)
        assert thread.is_alive(), "the server has ended"
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()
