"""How much waits: a request that would wait too long is refused at once, and told when to come again."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

from nev.serve.errors import ApiError
from nev.serve.metrics import Meters

SMOOTHING = 0.2  # weight of the newest item in the mean of seconds


class Waiting:
    """Items of a kind that are accepted and not answered. kind: in messages and metrics. most: from which on `admit` refuses."""

    def __init__(self, kind: str, most: int, meters: Meters) -> None:
        self.kind, self._most, self._meters = kind, most, meters
        self._count, self._seconds = 0, 0.0

    @contextmanager
    def admit(self, count: int) -> Iterator[None]:
        """Count items as waiting, for the body of a `with`. Raises ApiError, 429, where too many wait already."""
        if count and self._count >= self._most:
            self._meters.rejected.labels("queue").inc()
            seconds = max(1, math.ceil(self._count * self._seconds))
            message = f"{self._count:,} of {self.kind} wait already: try again in about {seconds} s"
            raise ApiError(429, message, code="queue_full", headers={"Retry-After": str(seconds)})
        self._change(count)
        try:
            yield
        finally:
            self._change(-count)

    def note_seconds(self, seconds: float) -> None:
        """Note how long one item took."""
        self._seconds += (SMOOTHING if self._seconds else 1) * (seconds - self._seconds)

    def _change(self, count: int) -> None:
        self._count += count
        self._meters.waiting.labels(self.kind).set(self._count)
