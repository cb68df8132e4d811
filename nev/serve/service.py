"""What all routes of a server share: the engine behind its two queues, the threads that decode, and the limits."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from fastapi import Request
from numpy.typing import NDArray

from nev.data.decode import BadImage
from nev.inference.pictures import read_square
from nev.ops.vectors import Floats
from nev.serve.batcher import Batcher, ItemFailed
from nev.serve.engine import CANARY, Engine, Sentence, TextVector
from nev.serve.errors import ApiError
from nev.serve.fetch import fetch_picture
from nev.serve.items import Picture, decode_data_url, is_web, refuse_item
from nev.serve.metrics import Meters
from nev.serve.settings import Settings

if TYPE_CHECKING:
    from nev.inference.model import Kind

T = TypeVar("T")
FETCHES = 8  # pictures that are fetched from the web at once
CLOSED = 499  # the status of a request whose caller has gone, as nginx has it; nobody sees it but the metrics


class Embedded:
    """Vectors of the items of a request, float32 [n, D]; tokens of its texts; how many texts were cut."""

    def __init__(self, vectors: Floats, tokens: int, cut: int) -> None:
        self.vectors, self.tokens, self.cut = vectors, tokens, cut


class Service:
    """An engine as routes call it. `running` starts and ends it, in the event loop that answers."""

    def __init__(self, engine: Engine, settings: Settings, meters: Meters) -> None:
        self.engine, self.settings, self.meters = engine, settings, meters
        self.name = settings.name or engine.name

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Queues and threads, for the body of a `with`. Both towers have run once before the body begins."""
        engine, settings, meters = self.engine, self.settings, self.meters
        self.texts: Batcher[Sentence, TextVector] = Batcher(
            "text", engine.encode_texts, settings.max_texts, settings.max_waiting, meters
        )
        self.pictures: Batcher[NDArray[np.uint8], Floats] = Batcher(
            "picture", self._encode_squares, settings.max_pictures, settings.max_waiting, meters
        )
        self._decoders = ThreadPoolExecutor(settings.threads, thread_name_prefix="nev-decode")
        self._fetches = asyncio.Semaphore(FETCHES)
        self.texts.start()
        self.pictures.start()
        try:
            await self.check_health()
            yield
        finally:
            await self.texts.stop()
            await self.pictures.stop()
            self._decoders.shutdown(wait=False, cancel_futures=True)

    def _encode_squares(self, squares: list[NDArray[np.uint8]]) -> Floats:
        return self.engine.encode_images(np.stack(squares))

    async def check_health(self) -> None:
        """Return where both towers work. Raises ApiError, 503."""
        side = self.engine.image_size
        await self.texts.probe(Sentence(CANARY, "query"))
        await self.pictures.probe(np.full((side, side, 3), 128, np.uint8))

    async def embed(self, items: Sequence[str | Picture | bytes], kind: Kind = "query") -> Embedded:
        """Embed the items of a request, in their order.

        items: texts, pictures by data URL or address, and pictures as the bytes of their files.
        Raises ApiError: 422 with the number of the item that cannot be used, 429 where too many wait.
        """
        texts = [n for n, item in enumerate(items) if type(item) is str]
        pictures = [n for n, item in enumerate(items) if type(item) is not str]
        self._check_items(items, texts)
        with self.texts.waiting.admit(len(texts)), self.pictures.waiting.admit(len(pictures)):
            squares = await gather_or_cancel(*(self._read_square(n, items[n]) for n in pictures))
            sentences, pictured = await gather_or_cancel(
                self._encode(self.texts, [Sentence(str(items[n]), kind) for n in texts], texts),
                self._encode(self.pictures, squares, pictures),
            )
        vectors = np.empty((len(items), self.engine.width), np.float32)
        if texts:
            vectors[texts] = np.stack([each.vector for each in sentences])
        if pictures:
            vectors[pictures] = np.stack(pictured)
        for number in np.flatnonzero(~np.isfinite(vectors).all(axis=1)):
            raise refuse_item(int(number), "the model gives no finite vector for it")
        return Embedded(vectors, sum(each.tokens for each in sentences), sum(each.cut for each in sentences))

    def _check_items(self, items: Sequence[Any], texts: Sequence[int]) -> None:
        if len(items) > self.settings.max_items:
            raise ApiError(
                422,
                f"input: {len(items):,} items, and a request may have {self.settings.max_items:,}",
                "input",
                "too_many",
            )
        for number in texts:
            length = len(items[number])
            if length > self.settings.max_characters:
                raise refuse_item(
                    number, f"{length:,} characters, more than {self.settings.max_characters:,}", "too_long"
                )

    async def _encode(self, queue: Batcher[Any, T], items: list[Any], numbers: list[int]) -> list[T]:
        try:
            return await queue.encode(items)
        except ItemFailed as error:
            number = numbers[error.number]
            raise ApiError(
                500,
                f"the model failed at input[{number}]; the server's log says why",
                f"input[{number}]",
                "model_failed",
            ) from error

    async def _read_square(self, number: int, item: Any) -> NDArray[np.uint8]:
        """A picture as the model sees it. number: of the item in its request."""
        try:
            data = await self._fetch(item) if isinstance(item, Picture) and is_web(item) else item
            return await self.in_thread(partial(_decode, data, self.engine))
        except BadImage as error:
            raise refuse_item(number, str(error)) from error

    async def _fetch(self, url: str) -> bytes:
        if not self.settings.allow_urls:
            raise BadImage("this server fetches no pictures (--allow-urls): send a data URL")
        async with self._fetches:
            return await fetch_picture(url, self.engine.limits.max_bytes, self.settings.url_seconds)

    async def in_thread(self, work: Callable[[], T]) -> T:
        """Run what takes a while in one of the threads that decode."""
        return await asyncio.get_running_loop().run_in_executor(self._decoders, work)


def _decode(item: str | bytes, engine: Engine) -> NDArray[np.uint8]:
    """A picture as the model sees it, uint8 [S, S, 3]. item: a data URL, or the bytes of a file."""
    data = decode_data_url(item) if isinstance(item, str) else item
    square = read_square(data, engine.image_size, engine.limits)
    if square.reason:
        raise BadImage(square.reason)
    return square.pixels


async def gather_or_cancel(*work: Coroutine[Any, Any, Any]) -> list[Any]:
    """The results of several coroutines. Where one fails, or the caller is cancelled, the others are cancelled, too."""
    tasks = [asyncio.ensure_future(each) for each in work]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()


async def until_gone(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """Do work for a request, and stop it as soon as the caller has gone. Raises ApiError then, for nobody to see."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_wait_until_gone(request))
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ApiError(CLOSED, "the caller has gone")
    finally:
        gone.cancel()
        task.cancel()


async def _wait_until_gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
