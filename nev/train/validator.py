"""Validation beside training (`eval.asynchronous`): the driver scores checkpoints as they are written, and no step waits for it.

Ray Train can do so, too (`ray.train.report(..., validation=True)`, Ray 2.60), but its report is a barrier between the workers and
copies the checkpoint; nev's are written behind the steps by rank 0 alone, so the driver takes them from there.
"""

from __future__ import annotations

import json
import threading
from collections import deque
from collections.abc import Callable
from typing import NamedTuple

from nev.data.storage import join, naming, write_whole
from nev.errors import NevError
from nev.train.job import Job
from nev.train.journal import point, write_validation
from nev.train.manifest import VALIDATION, awaiting

BEHIND = 2  # checkpoints that may wait: validation that is slower than training leaves the oldest out, so that disks do not fill


class Validated(NamedTuple):
    """What became of a checkpoint's validation: its metrics, or why there are none."""

    step: int
    metrics: dict[str, float]
    problem: str | None = None


class Validator:
    """A thread that scores the checkpoints of a run. score: a checkpoint's location to its metrics.

    Checkpoints that an earlier start has left come first. A process that ends does not wait for it.
    """

    def __init__(self, job: Job, score: Callable[[str], dict[str, float]]) -> None:
        self._job, self._score = job, score
        self._waiting = deque(int(location.rsplit("-", 1)[1]) for location in awaiting(job.run, job.validates))
        self._done: deque[Validated] = deque()
        self._news, self._closed = threading.Condition(), False
        self._thread = threading.Thread(target=self._run, name="nev-validator", daemon=True)
        self._thread.start()

    def written(self, step: int) -> None:
        """A checkpoint of this step is whole."""
        if not self._job.validates(step):
            return
        with self._news:
            if step not in self._waiting:
                self._waiting.append(step)
            left_out = [self._waiting.popleft() for _ in range(len(self._waiting) - BEHIND)]
            self._news.notify()
        for old in left_out:
            self._keep(Validated(old, {}, f"step {old}: not validated, since training is faster than validation"))

    def done(self) -> list[Validated]:
        """What was validated since the last call."""
        return [self._done.popleft() for _ in range(len(self._done))]

    def finish(self) -> None:
        """Wait until everything is validated that is there."""
        with self._news:
            self._closed = True
            self._news.notify()
        self._thread.join()

    def _run(self) -> None:
        while True:
            with self._news:
                self._news.wait_for(lambda: self._waiting or self._closed)
                if not self._waiting:
                    return
                step = self._waiting.popleft()
            self._keep(self._validated(step))

    def _validated(self, step: int) -> Validated:
        from ray.exceptions import RayError

        try:
            return Validated(step, self._score(self._location(step)))
        except (NevError, RayError, OSError) as error:
            return Validated(step, {}, f"step {step}: not validated ({str(error).strip().splitlines()[0]})")

    def _keep(self, found: Validated) -> None:
        """Beside the checkpoint, which may be removed from now on, and in the journal."""
        location = join(self._location(found.step), VALIDATION)
        try:
            with naming(location, "written"):
                write_validation(self._job.run, point(found.step, found.metrics))
                write_whole(location, json.dumps(found.metrics).encode())
        except NevError as error:
            found = found._replace(problem=f"step {found.step}: {error}")
        self._done.append(found)

    def _location(self, step: int) -> str:
        return join(self._job.run, "checkpoints", f"step-{step:08d}")
