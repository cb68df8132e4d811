"""Validation beside training (`eval.asynchronous`): the driver scores checkpoints as they are written, and no step waits.

Ray Train can do so, too (`ray.train.report(..., validation=True)`, Ray 2.60), but its report is a barrier between the workers and
brings the checkpoint to its own storage; nev's are written behind the steps by rank 0 alone, so the driver takes them from there.
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
from nev.common.signals import Stopped, set_by_sigterm
from nev.config.experiment import Experiment
from nev.runs.manifest import VALIDATION, pending_validation
from nev.runs.metrics_log import make_point, write_validation
from nev.storage.files import StorageError, filesystem, join, storage_errors_as, write_atomic
from nev.train.driver.metrics import MetricsLogger
from nev.train.job import Job

if TYPE_CHECKING:
    from nev.train.job import Job


BEHIND = 2  # checkpoints that may wait: validation that is slower than training leaves the oldest out, so that disks do not fill
PAUSE_S = 5.0  # after a failure
TRIES = 3  # of one checkpoint, where storage or a process fails


class ValidationOutcome(NamedTuple):
    """What became of a checkpoint's validation: its metrics, or why there are none."""

    step: int
    metrics: dict[str, float]
    problem: str | None = None


class Validator:
    """A thread that scores the checkpoints of a run. score: a checkpoint's location to its metrics.

    Checkpoints that an earlier start has left come first. Left with an error, or by a process that ends, it writes nothing more.
    """

    def __init__(self, job: Job, score: Callable[[str], dict[str, float]]) -> None:
        self._job, self._score = job, score
        self._waiting = deque(
            int(location.rsplit("-", 1)[1]) for location in pending_validation(job.run, job.validates)
        )
        self._left_out: deque[int] = deque()
        self._done: deque[ValidationOutcome] = deque()
        self._tries: Counter[int] = Counter()
        self._news, self._no_more, self._stopped, self._ended = threading.Condition(), False, False, False
        self._thread = threading.Thread(target=self._run, name="nev-validator", daemon=True)

    def written(self, step: int) -> None:
        """A checkpoint of this step is whole."""
        if not self._job.validates(step):
            return
        with self._news:
            if step not in self._waiting:
                self._waiting.append(step)
            while len(self._waiting) > BEHIND:
                self._left_out.append(self._waiting.popleft())
            self._news.notify()

    def done(self) -> list[ValidationOutcome]:
        """What was validated since the last call."""
        return [self._done.popleft() for _ in range(len(self._done))]

    def finished(self, wait_s: float) -> bool:
        """Whether everything that is there is validated; it waits for so many seconds. Nothing may be `written` after this.

        Raises RuntimeError where the thread has died, of what stands in its traceback.
        """
        with self._news:
            self._no_more = True
            self._news.notify()
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
        with self._news:
            self._stopped = True
            self._news.notify()

    def _run(self) -> None:
        while True:
            with self._news:
                self._news.wait_for(lambda: self._waiting or self._left_out or self._no_more or self._stopped)
                if self._stopped or not (self._waiting or self._left_out):
                    self._ended = True
                    return
                left_out = bool(self._left_out)
                step = (self._left_out or self._waiting).popleft()
            self._try(step, left_out)

    def _try(self, step: int, left_out: bool) -> None:
        """Validate a checkpoint and keep the result. What fails is tried again later, at last by the next start of the run."""
        try:
            late = f"step {step}: not validated, since training is faster than validation"
            found = ValidationOutcome(step, {}, late) if left_out else self._validated(step)
            self._keep(found)
        except (StorageError, RayError, OSError) as error:
            self._tries[step] += 1
            if self._tries[step] < TRIES:
                with self._news:
                    self._waiting.append(step)
                    self._news.wait_for(lambda: self._stopped, PAUSE_S)
                return
            found = ValidationOutcome(
                step, {}, f"step {step}: not validated ({first_line(error)}); the next start of the run tries again"
            )
        if not self._stopped:
            self._done.append(found)

    def _validated(self, step: int) -> ValidationOutcome:
        try:
            return ValidationOutcome(step, self._score(self._location(step)))
        except (StorageError, RayError, OSError):
            raise
        except (NevError, ValueError, RuntimeError, MemoryError) as error:  # no try will be better
            return ValidationOutcome(step, {}, f"step {step}: not validated ({first_line(error)})")

    def _keep(self, found: ValidationOutcome) -> None:
        """Beside the checkpoint, which may be removed from now on, and in the journal; nothing of one that is gone."""
        location = self._location(found.step)
        fs, path = filesystem(join(location, "state.json"))
        with storage_errors_as(location, "written"):
            if self._stopped or not fs.exists(path):
                return
            write_validation(self._job.run, make_point(found.step, found.metrics))
            write_atomic(join(location, VALIDATION), json.dumps(found.metrics).encode())

    def _location(self, step: int) -> str:
        return join(self._job.run, "checkpoints", f"step-{step:08d}")


def first_line(error: BaseException) -> str:
    """What an error says, in a line."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def validate_checkpoint(config: Experiment, job: Job, checkpoint: str) -> dict[str, float]:
    """Score a checkpoint on the connected Ray, and keep its vectors with it. Returns the metrics."""
    from nev.eval.validation.on_cluster import embed
    from nev.eval.validation.task import Result
    from nev.eval.validation.validate import score
    from nev.eval.validation.vectors import vectors_file, vectors_to_bytes

    assert job.validation
    embedded, texts = embed(config, checkpoint, job.validation, config.workers.most * config.workers.gpus)
    metrics = score(job.validation, embedded, texts)
    result = Result(metrics, embedded, texts)
    vectors = join(checkpoint, vectors_file(job.validation))
    with storage_errors_as(vectors, "written"):
        write_atomic(vectors, vectors_to_bytes(job.validation, result))
    return metrics


@contextmanager
def async_validation(job: Job) -> Iterator[Validator | None]:
    """What scores the checkpoints of a run beside its training, where that is asked for."""
    if not (job.config.eval.asynchronous and job.validation):
        yield None
        return
    with Validator(job, partial(validate_checkpoint, job.config, job)) as validator:
        yield validator


def wait_for_validation(validator: Validator, ledger: MetricsLogger) -> None:
    """Wait for the checkpoints that are not validated yet. Raises Stopped where a SIGTERM ends that."""
    told, finished = threading.Event(), False
    with set_by_sigterm(told):
        while not finished:
            if told.is_set():
                raise Stopped
            finished = validator.finished(0.5)
            for step, metrics, problem in validator.done():
                ledger.take(step, metrics)
                if problem:
                    ledger.note(problem)
