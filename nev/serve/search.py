"""`/search`, `/thumbnails` and `/map`: what the index of a server answers."""

from __future__ import annotations

import asyncio
import logging
import math
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from functools import partial
from typing import Annotated, Any, NamedTuple, TypeVar

import numpy as np
from fastapi import APIRouter, Query, Request, Response

from nev.config.model_spec import ModelError
from nev.ops.vectors import Floats, scale_to_unit
from nev.search.index import Hit, Index
from nev.search.ranking import Means, move_images, read_means
from nev.search.store import SearchError, StoreFailed
from nev.serve.errors import ApiError, describe_errors
from nev.serve.items import Picture
from nev.serve.search_schema import FoundItem, Kind, QuerySummary, SearchAnswer, SearchQuestion, WordsQuestion
from nev.serve.service import Service, until_gone
from nev.serve.strict_json import StrictRoute
from nev.serve.waiting import Waiting

T = TypeVar("T")
RECORD_SECONDS = 5.0  # between looks at what is recorded of the index
THREADS = 4  # searches at once; a store computes outside of Python's lock


class Part(NamedTuple):
    """One of the things that are searched for. vector: float32 [D], of unit length, not calibrated."""

    kind: Kind
    vector: Floats


Place = Callable[[Floats, Index, bool], list[list[float]]]  # vectors [n, D], and whether the map is calibrated


class Searcher:
    """An index as routes call it: in threads, and no more at once than may wait."""

    def __init__(
        self, service: Service, index: Index | None, on_change: Sequence[Callable[[Index], object]] = ()
    ) -> None:
        """on_change: called where another program has changed what is recorded of the index."""
        self.service, self.index, self._on_change = service, index, on_change
        self._looked_at, self._lock = time.monotonic(), threading.Lock()
        self._thumbnails: bool | None = None
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="nev-search")
        self._waiting = Waiting("search", service.settings.max_waiting, service.meters)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Look into the index once, so that the first caller does not wait for it; end the threads afterwards."""
        looked = asyncio.create_task(self.call(_look)) if self.index else None
        try:
            yield
        finally:
            if looked:
                looked.cancel()
                await asyncio.gather(looked, return_exceptions=True)
            self._threads.shutdown(wait=False, cancel_futures=True)

    async def call(self, work: Callable[[Index], T]) -> T:
        """Run work on the index, in a thread. Raises ApiError: 404 without an index, 422 for what the index refuses."""
        index = self._open_index()
        with self._waiting.admit(1):
            start = time.perf_counter()
            try:
                return await asyncio.get_running_loop().run_in_executor(self._threads, self._run, work, index)
            except (StoreFailed, ModelError) as error:
                logging.getLogger("nev.serve").error("%s", error)
                raise ApiError(503, "the index cannot be searched now: try again", code="index_unavailable") from error
            except SearchError as error:
                raise ApiError(422, str(error), code="search_refused") from error
            finally:
                self._waiting.note_seconds((time.perf_counter() - start) / THREADS)

    def _run(self, work: Callable[[Index], T], index: Index) -> T:
        """Do work, after a look at what is recorded of the index: `nev index` may have replaced its pictures."""
        with self._lock:
            if time.monotonic() - self._looked_at > RECORD_SECONDS:
                if index.store.read_spec() != index.spec:
                    index.refresh()
                    self._thumbnails = None
                    for call in self._on_change:
                        call(index)
                self._looked_at = time.monotonic()
        return work(index)

    async def search(self, question: SearchQuestion, place: Place) -> SearchAnswer:
        """Answer a question. place: the position of a vector on the map."""
        start = time.perf_counter()
        self._check(question)
        parts = await self._embed(question)
        kind = parts[0].kind if len(parts) == 1 else "both"
        hits, calibrated, (position, *positions) = await self.call(partial(_search, question, parts, place))
        shown = await self.call(self._has_thumbnails)
        milliseconds = round(1000 * (time.perf_counter() - start), 1)
        return SearchAnswer(
            hits=[_describe(hit, at, shown) for hit, at in zip(hits, positions, strict=True)],
            offset=question.offset,
            top=question.top,
            calibrated=calibrated,
            query=QuerySummary(kind=kind, position=position),
            milliseconds=milliseconds,
        )

    def _has_thumbnails(self, index: Index) -> bool:
        """Whether pictures have thumbnails, by the first that are drawn. Looked up once."""
        if self._thumbnails is None:
            uids = index.sample("image", 8)["uid"].to_pylist()
            if not uids:
                return False
            self._thumbnails = index.store.read(uids, ["uid", "thumbnail"])["thumbnail"].null_count < len(uids)
        return self._thumbnails

    def _open_index(self) -> Index:
        if self.index is None:
            raise ApiError(404, "this server has no index: nev serve --index", code="no_index")
        return self.index

    def _check(self, question: SearchQuestion) -> None:
        self._open_index()
        if question.text is None and question.image is None and question.uid is None:
            raise ApiError(422, "give text, image or uid: what is to be searched for", "text", "no_query")
        if question.hybrid and question.text is None:
            raise ApiError(422, "hybrid: the full text is searched for the words of `text`", "hybrid", "no_query")
        columns = self._open_index().store.columns
        open_columns = {columns.uid, columns.kind, columns.source, *self.service.settings.filter_columns}
        if closed := sorted((question.where or {}).keys() - open_columns):
            raise ApiError(
                422, f"where: {', '.join(closed)} is no column to filter by: {', '.join(sorted(open_columns))}", "where"
            )
        if not all(math.isfinite(value) for value in (question.where or {}).values() if isinstance(value, float)):
            raise ApiError(422, "where: a number is not finite", "where")
        most = self.service.settings.max_top
        if question.offset + question.top > most:
            raise ApiError(422, f"offset + top: a list ends after {most:,} hits", "top", "too_many")

    async def _embed(self, question: SearchQuestion) -> list[Part]:
        """The vectors that a question is made of."""
        given: list[str | Picture] = [] if question.text is None else [question.text]
        given += [] if question.image is None else [Picture(question.image)]
        parts = [] if question.uid is None else [await self.call(partial(_read_item, question.uid))]
        if given:
            embedded = await self.service.embed(given)
            for item, vector in zip(given, embedded.vectors, strict=True):
                parts.append(Part("image" if type(item) is Picture else "text", vector))
        return parts


def _search(
    question: SearchQuestion, parts: list[Part], place: Place, index: Index
) -> tuple[list[Hit], bool, list[list[float]]]:
    """Hits without the item that was searched for, whether they are calibrated, and the positions of query and hits."""
    calibration = index.calibration if question.calibrated else None
    means = read_means(calibration) if calibration else None
    moved = [_move(part.vector, part.kind, means) for part in parts]  # pictures to where the texts are, before the mean
    query, kind = (parts[0].vector, parts[0].kind) if len(parts) == 1 else (average(moved), "text")
    end = question.offset + question.top
    more = question.uid is not None
    hits = index.search(
        query,
        kind,
        top=end + 1 if more else question.top,
        offset=0 if more else question.offset,
        kind=question.kind,
        where=question.where,
        words=question.text if question.hybrid else None,
        min_score=question.min_score,
        min_percentile=question.min_percentile,
        calibrated=question.calibrated,
    )
    if more:
        hits = [hit for hit in hits if hit.uid != question.uid][question.offset : end]
    vectors = [average(moved), *(_move(hit.vector, hit.kind, means) for hit in hits)]
    return hits, means is not None, place(np.stack(vectors), index, question.calibrated)


def _look(index: Index) -> None:
    """Search for anything: indexes and the samples of percentiles are read then."""
    index.search(np.ones(index.width, np.float32), top=1)


def _move(vector: Floats, kind: str, means: Means | None) -> Floats:
    """A vector, [D], as it is compared."""
    return np.asarray(move_images(vector[None], means)[0] if kind == "image" else vector, np.float32)


def _read_item(uid: str, index: Index) -> Part:
    """The vector and the kind of an item."""
    vector = index.vector(uid)
    if vector is None:
        raise ApiError(404, f"the index has no item {uid!r}", "uid", "no_item")
    kinds = index.store.read([uid], ["uid", "kind"])["kind"].to_pylist()
    return Part("image" if kinds == ["image"] else "text", vector)


def average(vectors: list[Floats]) -> Floats:
    """The mean of vectors, [D], of unit length."""
    return np.asarray(scale_to_unit(np.mean(vectors, axis=0, keepdims=True))[0])


def _describe(hit: Hit, position: list[float], thumbnails: bool) -> FoundItem:
    return FoundItem(
        uid=hit.uid,
        kind=hit.kind,
        score=hit.score,
        percentile=hit.percentile,
        text=hit.text,
        source=hit.source,
        thumbnail=thumbnails and hit.kind == "image",
        position=position,
    )


def make_router(searcher: Searcher, place: Place) -> APIRouter:
    """The routes over an index. Without an index they answer 404. place: the position of a vector on the map."""
    router = APIRouter(tags=["search"], route_class=StrictRoute)
    errors = describe_errors(401, 404, 413, 422, 429, 500, 503)

    @router.post("/search", response_model=SearchAnswer, responses=errors)
    async def search(request: Request, question: SearchQuestion) -> Any:
        """Search for words, a picture, an item, or several of them."""
        return await until_gone(request, searcher.search(question, place))

    @router.get("/search", response_model=SearchAnswer, responses=errors)
    async def search_words(request: Request, question: Annotated[WordsQuestion, Query()]) -> Any:
        """Search for words or an item, by an address that can be shared."""
        return await until_gone(request, searcher.search(question.as_question(), place))

    @router.get(
        "/thumbnails/{uid:path}",
        response_class=Response,
        responses={200: {"content": {"image/jpeg": {"schema": {"type": "string", "format": "binary"}}}}, **errors},
    )
    async def read_thumbnail(uid: str) -> Response:
        """The thumbnail of a picture of the index."""
        data = await searcher.call(lambda index: index.thumbnail(uid))
        if data is None:
            raise ApiError(404, f"no thumbnail of {uid!r}", "uid", "no_thumbnail")
        headers = {"Cache-Control": "private, max-age=3600", "X-Content-Type-Options": "nosniff"}
        return Response(data, media_type="image/jpeg", headers=headers)

    return router
