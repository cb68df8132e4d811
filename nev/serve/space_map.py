"""`/map` and `/info`: the plane of the space that a page draws, and what a server has."""

from __future__ import annotations

import threading
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from fastapi import APIRouter
from pydantic import BaseModel

from nev.common.version import __version__
from nev.ops.vectors import Floats
from nev.search.index import Index
from nev.search.projection import Projection, fit_projection
from nev.search.ranking import move_images, read_means
from nev.search.store import SearchError, read_unit_vectors
from nev.serve.errors import describe_errors
from nev.serve.search import Searcher
from nev.serve.search_schema import Kind, Pair

POINTS = 1000  # of each kind
LETTERS = 120  # of a point's text


class SpaceMap(BaseModel):
    """Items of both kinds on a plane (PCA). explained: the share of the variance along each axis. texts: their beginnings."""

    points: list[Pair]
    uids: list[str]
    kinds: list[Kind]
    texts: list[str | None]
    explained: Pair


class IndexInfo(BaseModel):
    """The index. location: its name, without its place. hybrid: whether the full text can be searched."""

    location: str
    images: int
    texts: int
    hybrid: bool


class LimitsInfo(BaseModel):
    """The limits of a request."""

    body_bytes: int
    items: int
    characters: int
    image_bytes: int
    image_pixels: int
    hits: int
    urls: bool


class Info(BaseModel):
    """What a server has. calibration: whether lists of pictures and texts can be calibrated."""

    model: str
    runtime: str
    precision: str
    width: int
    fingerprint: str | None
    text_fingerprint: str | None
    index: IndexInfo | None
    calibration: bool
    limits: LimitsInfo
    version: str


class _Drawn(NamedTuple):
    projection: Projection
    drawn: SpaceMap


class MapMaker:
    """Draws each map once, when it is first needed: with pictures where they are, and where a calibration moves them."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._full_text: bool | None = None
        self._drawn: dict[bool, _Drawn] = {}

    def forget(self, index: Index) -> None:
        """Draw the maps anew: the index has changed."""
        with self._lock:
            self._drawn.clear()

    def draw(self, index: Index, calibrated: bool) -> SpaceMap:
        """A map."""
        return self._draw(index, calibrated).drawn

    def place(self, vectors: Floats, index: Index, calibrated: bool) -> list[list[float]]:
        """The positions of vectors, [n, D], on a map. Pictures' are moved already where it is calibrated."""
        positions: list[list[float]] = self._draw(index, calibrated).projection.project(vectors).tolist()
        return positions

    def has_full_text(self, index: Index) -> bool:
        """Whether the index finds words. Looked up once: without an index of words, PostgreSQL reads the whole table for it."""
        with self._lock:
            if self._full_text is None:
                self._full_text = _has_full_text(index)
            return self._full_text

    def _draw(self, index: Index, calibrated: bool) -> _Drawn:
        with self._lock:
            if calibrated not in self._drawn:
                self._drawn[calibrated] = draw_map(index, calibrated)
            return self._drawn[calibrated]


def draw_map(index: Index, calibrated: bool) -> _Drawn:
    """The map of a fixed sample of the index, the same items with and without calibration, each by axes of its own."""
    kinds: tuple[Kind, ...] = ("image", "text")
    means = read_means(index.calibration) if calibrated and index.calibration else None
    samples = [(kind, index.sample(kind, POINTS)) for kind in kinds]
    vectors = [
        move_images(read_unit_vectors(sample), means if kind == "image" else None)
        for kind, sample in samples
        if sample.num_rows
    ]
    rows = np.concatenate(vectors) if vectors else np.zeros((0, index.width), np.float32)
    projection = fit_projection(rows)
    drawn = SpaceMap(
        points=projection.project(rows).tolist(),
        uids=[uid for _, sample in samples for uid in sample["uid"].to_pylist()],
        kinds=[kind for kind, sample in samples for _ in range(sample.num_rows)],
        texts=[text and text[:LETTERS] for _, sample in samples for text in sample["text"].to_pylist()],
        explained=list(projection.explained),
    )
    return _Drawn(projection, drawn)


def describe_index(maker: MapMaker, index: Index) -> IndexInfo:
    """The index, for `/info`."""
    return IndexInfo(
        location=index.store.name.rpartition(" table ")[2].rpartition("/")[2],
        images=index.count("image"),
        texts=index.count("text"),
        hybrid=maker.has_full_text(index),
    )


def _has_full_text(index: Index) -> bool:
    try:
        index.store.search_words("a", 1)
    except SearchError:
        return False
    return True


def make_router(searcher: Searcher, maker: MapMaker) -> APIRouter:
    """The routes `/map` and `/info`."""
    router = APIRouter(tags=["search"])
    service, index = searcher.service, searcher.index

    @router.get("/map", response_model=SpaceMap, responses=describe_errors(401, 404, 429, 500))
    async def draw(calibrated: bool = True) -> Any:
        """A sample of the index on a plane. Answers of `/search` with the same `calibrated` have positions on it."""
        return await searcher.call(lambda index: maker.draw(index, calibrated))

    @router.get("/info", response_model=Info, responses=describe_errors(401, 429, 500))
    async def inform() -> Any:
        """What this server has: model, index, limits."""
        engine, settings = service.engine, service.settings
        return Info(
            model=service.name,
            runtime=engine.runtime,
            precision=engine.precision,
            width=engine.width,
            fingerprint=engine.fingerprint,
            text_fingerprint=engine.text_fingerprint,
            index=await searcher.call(partial(describe_index, maker)) if index else None,
            calibration=index is not None and index.calibration is not None,
            limits=LimitsInfo(
                body_bytes=settings.max_body_bytes,
                items=settings.max_items,
                characters=settings.max_characters,
                image_bytes=engine.limits.max_bytes,
                image_pixels=engine.limits.max_pixels,
                hits=settings.max_top,
                urls=settings.allow_urls,
            ),
            version=__version__,
        )

    return router
