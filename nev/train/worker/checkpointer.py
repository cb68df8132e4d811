"""Checkpoints are written while the steps continue: the loop waits for a copy in memory, not for a disk.

One checkpoint is written at a time. Where storage refuses it (a full disk, S3 that is away), the write is tried again at growing
intervals, until it succeeds or the next checkpoint is due.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeout
from contextlib import suppress
from dataclasses import asdict
from types import TracebackType
from typing import NamedTuple, Self

from tenacity import RetryCallState, Retrying, retry_if_exception_type, sleep_using_event, stop_when_event_set
from tenacity.wait import wait_exponential
from torch import Tensor

from nev.common.errors import NevError
from nev.eval.validation.task import Result
from nev.eval.validation.vectors import vectors_file, vectors_to_bytes
from nev.runs import checkpoint
from nev.runs.manifest import CheckpointError, CheckpointState, prune_checkpoints, remove_checkpoints_after
from nev.runs.metrics_log import MetricPoint, make_point, write_points
from nev.storage.files import StorageError
from nev.train.core.rng import gather_rng
from nev.train.core.state_dict import Tensors, gather_tensors
from nev.train.job import Job
from nev.train.messages import CheckpointSaved, Metrics, Note, Report
from nev.train.worker.guards import GuardState
from nev.train.worker.state import RankContext, TrainState

REFUSALS = (StorageError, CheckpointError)
LAST_S = 600.0  # for how long the write of the last checkpoint is tried again


class CheckpointNotSaved(NevError, RuntimeError):
    """The last checkpoint of a run, or of workers that exit early, could not be written. step: the checkpoint's step."""

    def __init__(self, message: str, step: int) -> None:
        super().__init__(message)
        self.step = step


class Snapshot(NamedTuple):
    """What a checkpoint is written from.

    state, tensors, rng, beside: as `nev.runs.checkpoint.save` takes them.
    points: the metrics since the checkpoint before.
    """

    state: CheckpointState
    tensors: Tensors
    rng: dict[str, Tensor]
    beside: dict[str, bytes]
    points: list[MetricPoint]


class AsyncCheckpointWriter:
    """Writes the checkpoints of a run in a thread, on rank 0, and removes older checkpoints.

    keep_last, keep_best, keep_step: as `prune_checkpoints` takes them.
    report: called in the writing thread.
    validated: whether the checkpoint of a step will be validated beside training, and stays until then.
    """

    def __init__(
        self,
        run: str,
        keep_last: int,
        keep_best: str | None,
        report: Callable[[CheckpointSaved | Note], None],
        validated: Callable[[int], bool] = lambda step: False,
        keep_step: int | None = None,
    ) -> None:
        self._run, self._keep_last, self._keep_best, self._report = run, keep_last, keep_best, report
        self._validated, self._keep_step = validated, keep_step
        self._pool = ThreadPoolExecutor(1, "nev-checkpoint")
        self._pending: Future[None] | None = None
        self._no_more_tries = threading.Event()
        self._points: list[MetricPoint] = []
        self._step = 0

    def wait(self) -> None:
        """Wait for the write of the checkpoint before, since the next snapshot uses its memory. No further try is made."""
        if self._pending is None:
            return
        self._no_more_tries.set()
        with suppress(*REFUSALS):  # the first try has reported the refusal
            self._pending.result()
        self._pending = None
        self._no_more_tries.clear()

    def write(self, snapshot: Snapshot) -> None:
        """Start to write, after `wait`. The snapshot may not change until the next `wait` or `close` has returned."""
        self._points += snapshot.points
        self._step = snapshot.state.step
        self._pending = self._pool.submit(self._write, snapshot)

    def close(self) -> None:
        """Wait for the last write. Raises CheckpointNotSaved where storage has refused it for ten minutes."""
        if self._pending is None:
            return
        try:
            self._pending.result(LAST_S)
        except FutureTimeout:
            self._no_more_tries.set()
            try:
                self._pending.result()
            except REFUSALS as error:
                raise CheckpointNotSaved(
                    f"the last checkpoint could not be written: {error} The same command continues from the checkpoint before.",
                    self._step,
                ) from error
        finally:
            self._pool.shutdown()

    def _write(self, snapshot: Snapshot) -> None:
        step = snapshot.state.step

        def report_refusal(attempt: RetryCallState) -> None:
            if attempt.attempt_number == 1 and attempt.outcome:
                why = attempt.outcome.exception()
                self._report(
                    Note(
                        f"step {step}: {why} The write is tried again until the next checkpoint is due; training continues."
                    )
                )

        begin = time.perf_counter()
        for attempt in Retrying(
            retry=retry_if_exception_type(REFUSALS),
            wait=wait_exponential(max=60),
            stop=stop_when_event_set(self._no_more_tries),
            sleep=sleep_using_event(self._no_more_tries),
            after=report_refusal,
            reraise=True,
        ):
            with attempt:
                if self._points:
                    write_points(self._run, step, self._points)
                    self._points = []
                checkpoint.save(self._run, snapshot.state, snapshot.tensors, snapshot.rng, snapshot.beside)
        try:
            prune_checkpoints(self._run, self._keep_last, self._keep_best, self._validated, self._keep_step)
        except REFUSALS as error:  # the new checkpoint is complete, and the next checkpoint removes them
            self._report(Note(f"step {step}: older checkpoints could not be removed: {error}"))
        self._report(CheckpointSaved(step, time.perf_counter() - begin))


class Checkpointer:
    """Reports the metrics of a rank, and saves checkpoints. Rank 0 reports and writes; the other ranks give their parts.

    start_step: the step from which this start trains. Checkpoints of later steps, which are damaged, are removed.
    The end of the `with` waits for the last checkpoint; after an error, only for the write that is under way.
    """

    def __init__(self, job: Job, ctx: RankContext, start_step: int, report: Report) -> None:
        self._job, self._ctx, self._report = job, ctx, report
        self._points: list[MetricPoint] = []
        self._tensors: Tensors | None = None
        train = job.config.train
        self._writer = None
        if ctx.rank == 0:
            remove_checkpoints_after(job.run, start_step)
            validated = job.validates if job.config.eval.asynchronous else lambda step: False
            self._writer = AsyncCheckpointWriter(
                job.run, train.keep_last, job.config.eval.best, self._report_write, validated, job.decay_start
            )

    def log(self, step: int, metrics: dict[str, float], notes: Sequence[str] = ()) -> None:
        """Report metrics of a step, and lines for the console. The metrics log of the next checkpoint has them, too.

        Ranks other than 0 report nothing.
        """
        if self._ctx.rank:
            return
        for note in notes:
            self._report(Note(note))
        if metrics:
            self._points.append(make_point(step, metrics))
            self._report(Metrics(step, metrics))

    def _report_write(self, message: CheckpointSaved | Note) -> None:
        """Report a message of the writing thread."""
        if isinstance(message, CheckpointSaved):
            self._points.append(make_point(message.step, message.metrics))
        self._report(message)

    def save(
        self, train_state: TrainState, step: int, bad_rows: int, history: GuardState, scored: Result | None
    ) -> None:
        """Start to save a checkpoint of this step. Every rank calls this.

        Returns once the tensors are copied. Before that, it waits for the write of the checkpoint before.
        bad_rows: since the run's first step.
        scored: the validation of this step; None where there was none.
        """
        begin = time.perf_counter()
        rng = gather_rng(self._ctx.device, self._ctx.world)
        if self._writer:
            self._writer.wait()
        self._tensors = gather_tensors(train_state.model, train_state.optimizer, bool(self._writer), into=self._tensors)
        if not self._writer:
            return
        job = self._job
        state = CheckpointState(
            step=step,
            config=job.config.model_dump(mode="json"),
            fingerprints=job.fingerprints,
            metrics=scored.metrics if scored else {},
            world_size=self._ctx.world,
            bad_rows=bad_rows,
            history=asdict(history),
        )
        beside = dict(train_state.beside)
        if scored and job.validation:
            beside[vectors_file(job.validation)] = vectors_to_bytes(job.validation, scored)
        self.log(step, {"checkpoint_wait_s": time.perf_counter() - begin})
        points, self._points = self._points, []  # before the writing thread may report this checkpoint
        self._writer.write(Snapshot(state, self._tensors, rng, beside, points))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._writer and error is None:
            self._writer.close()
        elif self._writer:
            self._writer.wait()
