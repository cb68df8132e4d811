"""Validation beside training (`eval.asynchronous`): the driver scores checkpoints as they are written, and no step waits.

Ray Train has the same (`ray.train.report(..., validation=True)`, Ray 2.60), but its report is a barrier between the workers and
brings the checkpoint to Ray's storage. Checkpoints of nev are written behind the steps by rank 0 alone, and read from there.
"""

from __future__ import annotations

import json
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, NamedTuple, Self

from ray.exceptions import RayError

from nev.common.errors import NevError
from nev.runs.manifest import VALIDATION, pending_validation, read_manifest
from nev.runs.metrics_log import make_point, write_validation
from nev.storage.files import StorageError, filesystem, join, storage_errors_as, write_atomic
from nev.train.job import Job

if TYPE_CHECKING:
    from nev.models.text import TextTower

MAX_WAITING = (
    2  # checkpoints: where validation is slower than training, the oldest is left out, so that disks do not fill
)
PAUSE_S = 5.0  # after a failure
TRIES = 3  # of one checkpoint, where storage or a process fails
RETRIED = (StorageError, RayError, OSError)


class ValidationOutcome(NamedTuple):
    """The metrics of a checkpoint's validation. problem: why there are none."""

    step: int
    metrics: dict[str, float]
    problem: str | None = None


class Validator:
    """A thread that scores the checkpoints of a run. Checkpoints that an earlier start has not validated come first.

    score: computes the metrics of a checkpoint, from its location.
    After an error in the body of its `with`, and at the end of the process, the thread writes nothing more.
    """

    def __init__(self, job: Job, score: Callable[[str], dict[str, float]]) -> None:
        self._job, self._score = job, score
        pending = pending_validation(job.run, job.validates)
        self._waiting = deque(int(location.rsplit("-", 1)[1]) for location in pending)
        self._left_out: deque[int] = deque()
        self._outcomes: deque[ValidationOutcome] = deque()
        self._tries: Counter[int] = Counter()
        self._changed, self._no_more, self._stopped, self._ended = threading.Condition(), False, False, False
        self._thread = threading.Thread(target=self._run, name="nev-validator", daemon=True)

    def add(self, step: int) -> None:
        """Queue the checkpoint of a step, which is complete. Past MAX_WAITING the oldest one in the queue is left out."""
        if not self._job.validates(step):
            return
        with self._changed:
            if step not in self._waiting:
                self._waiting.append(step)
            while len(self._waiting) > MAX_WAITING:
                oldest = min(self._waiting)  # a checkpoint whose validation failed stands last, and may be the oldest
                self._waiting.remove(oldest)
                self._left_out.append(oldest)
            self._changed.notify()

    def take_outcomes(self) -> list[ValidationOutcome]:
        """The validations that ended since the last call."""
        return [self._outcomes.popleft() for _ in range(len(self._outcomes))]

    def finished(self, wait_s: float) -> bool:
        """Wait up to `wait_s` seconds. Returns whether every checkpoint is validated; `add` may not be called any more.

        Raises RuntimeError where the thread has died; its traceback is in the log.
        """
        with self._changed:
            self._no_more = True
            self._changed.notify()
        self._thread.join(wait_s)
        alive = self._thread.is_alive()
        if not alive and not self._ended:
            raise RuntimeError("the validation beside training has died; its traceback stands above")
        return not alive

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._changed:
            self._stopped = True
            self._changed.notify()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._left_out or self._no_more or self._stopped)
                if self._stopped or not (self._waiting or self._left_out):
                    self._ended = True
                    return
                left_out = bool(self._left_out)
                step = (self._left_out or self._waiting).popleft()
            self._try(step, left_out)

    def _try(self, step: int, left_out: bool) -> None:
        """Validate a checkpoint and write the result. A failure is retried last, and at the next start of the run."""
        try:
            late = f"step {step}: not validated, since training is faster than validation"
            outcome = ValidationOutcome(step, {}, late) if left_out else self._validate(step)
            self._write(outcome)
        except RETRIED as error:
            self._tries[step] += 1
            if self._tries[step] < TRIES:
                with self._changed:
                    self._waiting.append(step)
                    self._changed.wait_for(lambda: self._stopped, PAUSE_S)
                return
            problem = f"step {step}: not validated ({first_line(error)}); the next start of the run tries again"
            outcome = ValidationOutcome(step, {}, problem)
        if not self._stopped:
            self._outcomes.append(outcome)

    def _validate(self, step: int) -> ValidationOutcome:
        try:
            return ValidationOutcome(step, self._score(self._location(step)))
        except RETRIED:
            raise
        except (NevError, ValueError, RuntimeError, MemoryError) as error:  # a retry would end the same way
            return ValidationOutcome(step, {}, f"step {step}: not validated ({first_line(error)})")

    def _write(self, outcome: ValidationOutcome) -> None:
        """Write the metrics beside the checkpoint, which may be removed from now on, and in the run's metrics log.

        Nothing is written for a checkpoint that is gone.
        """
        location = self._location(outcome.step)
        fs, path = filesystem(join(location, "state.json"))
        with storage_errors_as(location, "written"):
            if self._stopped or not fs.exists(path):
                return
            write_validation(self._job.run, make_point(outcome.step, outcome.metrics))
            write_atomic(join(location, VALIDATION), json.dumps(outcome.metrics).encode())

    def _location(self, step: int) -> str:
        return join(self._job.run, "checkpoints", f"step-{step:08d}")


def first_line(error: BaseException) -> str:
    """The first line of an error's message; its type where there is none."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def validate_checkpoint(job: Job, text: TextTower, checkpoint: str) -> dict[str, float]:
    """Score a checkpoint on the connected Ray, write its vectors beside it, and return the metrics.

    text: the text tower before training.
    """
    from nev.embed.embedder import Embedder
    from nev.eval.validation.on_cluster import embed
    from nev.eval.validation.scoring import score_validation
    from nev.eval.validation.task import Result
    from nev.eval.validation.vectors import vectors_file, vectors_to_bytes

    assert job.validation
    workers = job.config.workers
    embedder = Embedder(checkpoint, read_manifest(checkpoint), job.config, text)
    embedded, texts = embed(job.validation, embedder, workers.most * workers.gpus)
    metrics = score_validation(job.validation, embedded, texts, embedder.logit_scale)
    result = Result(metrics, embedded, texts)
    vectors = join(checkpoint, vectors_file(job.validation))
    with storage_errors_as(vectors, "written"):
        write_atomic(vectors, vectors_to_bytes(job.validation, result))
    return metrics


@contextmanager
def async_validation(job: Job, text: TextTower) -> Iterator[Validator | None]:
    """The validator of a run with `eval.asynchronous`; None for another run. text: the text tower before training."""
    if not (job.config.eval.asynchronous and job.validation):
        yield None
        return
    with Validator(job, partial(validate_checkpoint, job, text)) as validator:
        yield validator
