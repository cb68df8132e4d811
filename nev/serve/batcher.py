"""Dynamic batching: what waits while one forward runs goes into the next forward together.

One batcher has one kind of items, one queue, and one thread for the forward. Requests take turns in a batch, so that a request of
two thousand items does not keep a request of one item waiting.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Generic, TypeVar

from nev.serve.errors import ApiError
from nev.serve.metrics import Meters
from nev.serve.waiting import Waiting

Item = TypeVar("Item")
Result = TypeVar("Result")

# Callers that wait for one forward send their next requests within some milliseconds of its end. Without a pause the first of
# them would run alone, and the others behind it. The pause ends when nothing more comes, and is a small part of a forward.
PAUSE_SECONDS, PAUSE_SHARE = 0.001, 0.1
# A success so recent is proof enough that the model works. A forward that takes so long hangs.
FRESH_SECONDS, HUNG_SECONDS = 10.0, 120.0
log = logging.getLogger("nev.serve")


class ItemFailed(Exception):
    """The model failed at one item: of a request, by its number."""

    def __init__(self, number: int, error: Exception) -> None:
        super().__init__(f"{type(error).__name__}: {error}")
        self.number = number


class _Job(Generic[Item, Result]):
    """The items of one request. left: items without a result. next: number of the first item that no batch has."""

    def __init__(self, items: Sequence[Item], future: asyncio.Future[None]) -> None:
        self.items, self.future = items, future
        self.results: list[Result | None] = [None] * len(items)
        self.next, self.left = 0, len(items)


class Batcher(Generic[Item, Result]):
    """A queue before a forward. `start` and `stop` belong to the event loop that `encode` is called from.

    kind: of the items, for metrics and threads. run: the forward, items to results in their order; called in a thread.
    max_batch: most items of a forward. max_waiting: items from which on `waiting.admit` refuses.
    """

    def __init__(
        self, kind: str, run: Callable[[list[Item]], Iterable[Result]], max_batch: int, max_waiting: int, meters: Meters
    ) -> None:
        self.kind, self._run, self._max_batch, self._meters = kind, run, max_batch, meters
        self.waiting = Waiting(kind, max_waiting, meters)
        self._jobs: deque[_Job[Item, Result]] = deque()
        self._wake = asyncio.Event()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=f"nev-{kind}")
        self._task: asyncio.Task[None] | None = None
        self._last_size, self._last_seconds = 0, 0.0
        self._batch: list[tuple[_Job[Item, Result], int]] = []
        self._last_success, self._suspect, self._probing = -math.inf, False, asyncio.Lock()

    def start(self) -> None:
        """Begin to answer."""
        self._task = asyncio.create_task(self._work(), name=f"nev-{self.kind}")
        self._task.add_done_callback(self._fail_waiting)

    async def stop(self) -> None:
        """End. What still waits fails."""
        if self._task:
            self._task.cancel()
            await asyncio.wait([self._task])
        self._thread.shutdown(wait=False, cancel_futures=True)

    async def encode(self, items: Sequence[Item]) -> list[Result]:
        """The results of items, in their order. A caller that is cancelled takes its items out of the queue.

        Raises ItemFailed for the first item that the model fails at, ApiError where the queue is not worked on.
        """
        return await self._put(items, first=False) if items else []

    async def probe(self, item: Item) -> None:
        """Return where the model works: it did within the last seconds, or it does so now, for `item`, before all that waits.

        Raises ApiError, 503.
        """
        try:
            async with asyncio.timeout(HUNG_SECONDS), self._probing:
                self._check_alive()
                if self._suspect or time.monotonic() - self._last_success > FRESH_SECONDS:
                    await self._put([item], first=True)
                    self._suspect = False
        except TimeoutError:
            raise ApiError(503, f"a forward of {self.kind}s hangs", code="unhealthy") from None
        except ItemFailed as error:
            raise ApiError(503, f"the model fails at {self.kind}s: {error}", code="unhealthy") from error

    def _check_alive(self) -> None:
        if self._task is None or self._task.done():
            raise ApiError(
                503, f"{self.kind}s are not answered: the server is about to end, or its log says why", code="not_ready"
            )

    async def _put(self, items: Sequence[Item], first: bool) -> list[Result]:
        self._check_alive()
        job: _Job[Item, Result] = _Job(items, asyncio.get_running_loop().create_future())
        (self._jobs.appendleft if first else self._jobs.append)(job)
        self._wake.set()
        await job.future
        return job.results  # type: ignore[return-value]

    async def _work(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            while not self._jobs:
                self._wake.clear()
                await self._wake.wait()
            await self._pause()
            self._batch = self._take()
            if not self._batch:
                continue
            items, start = [job.items[number] for job, number in self._batch], time.monotonic()
            results = await loop.run_in_executor(self._thread, self._run_batch, items)
            self._note_forward(len(items), time.monotonic() - start)
            for (job, number), result in zip(self._batch, results, strict=True):
                self._deliver(job, number, result)
            self._batch = []

    async def _pause(self) -> None:
        """Wait for the other callers of the last batch, as long as they keep coming."""
        end = time.monotonic() + PAUSE_SHARE * self._last_seconds
        before, count = 0, self._count_queued()
        while before < count < min(self._last_size, self._max_batch) and time.monotonic() < end:
            await asyncio.sleep(PAUSE_SECONDS)
            before, count = count, self._count_queued()

    def _count_queued(self) -> int:
        return sum(len(job.items) - job.next for job in self._jobs)

    def _take(self) -> list[tuple[_Job[Item, Result], int]]:
        """The next batch: an equal share of each request in turn. Requests whose callers have gone are dropped."""
        batch: list[tuple[_Job[Item, Result], int]] = []
        share = max(1, self._max_batch // max(1, len(self._jobs)))
        while self._jobs and len(batch) < self._max_batch:
            job = self._jobs.popleft()
            if job.future.done():
                self._meters.dropped.labels(self.kind).inc(len(job.items) - job.next)
                continue
            end = min(job.next + share, job.next + self._max_batch - len(batch), len(job.items))
            batch += [(job, number) for number in range(job.next, end)]
            job.next = end
            if job.next < len(job.items):
                self._jobs.append(job)
        return batch

    def _run_batch(self, items: list[Item]) -> Sequence[Result | Exception]:
        """Run a batch, in the thread. Where the batch fails, each item runs alone: an item fails for nobody but its caller."""
        try:
            return list(self._run(items))
        except Exception as error:  # whatever a runtime raises
            log.error("a forward of %d %ss failed", len(items), self.kind, exc_info=error)
            return [error] if len(items) == 1 else [self._run_alone(item) for item in items]

    def _run_alone(self, item: Item) -> Result | Exception:
        try:
            return next(iter(self._run([item])))
        except Exception as error:  # whatever a runtime raises; the batch's error is in the log
            log.debug("one of them is %r", error, exc_info=error)
            return error

    def _deliver(self, job: _Job[Item, Result], number: int, result: Result | Exception) -> None:
        if isinstance(result, Exception):
            self._meters.failed.labels(self.kind).inc()
            self._suspect = True
            if not job.future.done():
                job.future.set_exception(ItemFailed(number, result))
            return
        self._last_success = time.monotonic()
        self._meters.items.labels(self.kind).inc()
        job.results[number] = result
        job.left -= 1
        if not job.left and not job.future.done():
            job.future.set_result(None)

    def _note_forward(self, size: int, seconds: float) -> None:
        self._last_size, self._last_seconds = size, seconds
        self.waiting.note_seconds(seconds / size)
        self._meters.batch_size.labels(self.kind).observe(size)
        self._meters.forward_seconds.labels(self.kind).observe(seconds)

    def _fail_waiting(self, task: asyncio.Task[None]) -> None:
        """Answer what waits when the queue is not worked on any more, and let the log say why."""
        if not task.cancelled() and task.exception():
            log.error("the queue of %ss has ended", self.kind, exc_info=task.exception())
        for job in [*self._jobs, *(job for job, _ in self._batch)]:
            if not job.future.done():
                job.future.set_exception(ApiError(503, "the server is about to end", code="not_ready"))
        self._jobs.clear()
