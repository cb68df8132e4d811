"""Checkpoints on their way to storage while the steps go on: the loop waits for a copy in memory, not for a disk.

One is written at a time. Storage that refuses (a full disk, S3 that is away) is local_stop again, more and more seldom, until it
takes the checkpoint or a newer one is there to be written.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as Late
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
LAST_S = 600.0  # how long storage that refuses the last checkpoint is local_stop again


class CheckpointNotSaved(NevError, RuntimeError):
    """The last checkpoint of a run, or of workers that leave, could not be written. step: whose it is."""

    def __init__(self, message: str, step: int) -> None:
        super().__init__(message)
        self.step = step


class Snapshot(NamedTuple):
    """What a checkpoint is written from: `nev.runs.checkpoint.save`'s, and the points since the one before."""

    state: CheckpointState
    tensors: Tensors
    rng: dict[str, Tensor]
    beside: dict[str, bytes]
    points: list[MetricPoint]


class AsyncCheckpointWriter:
    """Rank 0's. report: called from the writing thread. awaited: see `prune_checkpoints`."""

    def __init__(
        self,
        run: str,
        keep_last: int,
        keep_best: str | None,
        report: Callable[[CheckpointSaved | Note], None],
        awaited: Callable[[int], bool] = lambda step: False,
    ) -> None:
        self._run, self._keep_last, self._keep_best, self._report = run, keep_last, keep_best, report
        self._awaited = awaited
        self._pool = ThreadPoolExecutor(1, "nev-checkpoint")
        self._pending: Future[None] | None = None
        self._enough = threading.Event()
        self._points: list[MetricPoint] = []
        self._step = 0

    def wait(self) -> None:
        """Wait for the write before, whose memory the next snapshot takes. One that storage refuses is given up for it."""
        if self._pending is None:
            return
        self._enough.set()
        with suppress(*REFUSALS):  # told when they were met
            self._pending.result()
        self._pending = None
        self._enough.clear()

    def write(self, snapshot: Snapshot) -> None:
        """Begin to write, after `ready`; nothing of the snapshot may change until `ready` or `close` came back."""
        self._points += snapshot.points
        self._step = snapshot.state.step
        self._pending = self._pool.submit(self._write, snapshot)

    def close(self) -> None:
        """Wait for the last write. Raises NotKept where storage has refused it for ten minutes."""
        if self._pending is None:
            return
        try:
            self._pending.result(LAST_S)
        except Late:
            self._enough.set()
            try:
                self._pending.result()
            except REFUSALS as error:
                raise CheckpointNotSaved(
                    f"the last checkpoint could not be kept: {error} The same command goes on from the one before.",
                    self._step,
                ) from error
        finally:
            self._pool.shutdown()

    def _write(self, snapshot: Snapshot) -> None:
        step = snapshot.state.step

        def told(attempt: RetryCallState) -> None:
            if attempt.attempt_number == 1 and attempt.outcome:
                why = attempt.outcome.exception()
                self._report(Note(f"step {step}: {why} It is tried again until the next one is due; training goes on."))

        begin = time.perf_counter()
        for attempt in Retrying(
            retry=retry_if_exception_type(REFUSALS),
            wait=wait_exponential(max=60),
            stop=stop_when_event_set(self._enough),
            sleep=sleep_using_event(self._enough),
            after=told,
            reraise=True,
        ):
            with attempt:
                if self._points:
                    write_points(self._run, step, self._points)
                    self._points = []
                checkpoint.save(self._run, snapshot.state, snapshot.tensors, snapshot.rng, snapshot.beside)
        try:
            prune_checkpoints(self._run, self._keep_last, self._keep_best, self._awaited)
        except REFUSALS as error:  # the new one is whole: the next one will try again
            self._report(Note(f"step {step}: older checkpoints could not be removed: {error}"))
        self._report(CheckpointSaved(step, time.perf_counter() - begin))


class Checkpointer:
    """A rank's part in it. Rank 0 tells and writes; the others give what they alone have.

    start_step: the step that this attempt goes on from. Left without an error, it waits for the last checkpoint; with one, no
    longer than for the write that is under way.
    """

    def __init__(self, job: Job, ctx: RankContext, start_step: int, report: Report) -> None:
        self._job, self._me, self._report = job, ctx, report
        self._points: list[MetricPoint] = []
        self._tensors: Tensors | None = None
        train = job.config.train
        self._writer = None
        if ctx.rank == 0:
            remove_checkpoints_after(job.run, start_step)
            awaited = job.validates if job.config.eval.asynchronous else lambda step: False
            self._writer = AsyncCheckpointWriter(
                job.run, train.keep_last, job.config.eval.best, self._report_write, awaited
            )

    def log(self, step: int, metrics: dict[str, float], notes: Sequence[str] = ()) -> None:
        """Report metrics of a step, and lines for the console. The next checkpoint's metrics log gets the metrics, too.

        Ranks other than 0 report nothing.
        """
        if self._me.rank:
            return
        for note in notes:
            self._report(Note(note))
        if metrics:
            self._points.append(make_point(step, metrics))
            self._report(Metrics(step, metrics))

    def _report_write(self, message: CheckpointSaved | Note) -> None:
        """Report from the writing thread."""
        if isinstance(message, CheckpointSaved):
            self._points.append(make_point(message.step, message.metrics))
        self._report(message)

    def save(self, learner: TrainState, step: int, bad_rows: int, history: GuardState, scored: Result | None) -> None:
        """Begin a checkpoint of this step: every rank comes here together. The loop waits for copies in memory alone.

        Where the checkpoint before is not written yet, for that, too.
        """
        begin = time.perf_counter()
        rng = gather_rng(self._me.device, self._me.world)
        if self._writer:
            self._writer.wait()
        self._tensors = gather_tensors(learner.model, learner.optimizer, bool(self._writer), into=self._tensors)
        if not self._writer:
            return
        job = self._job
        state = CheckpointState(
            step=step,
            config=job.config.model_dump(mode="json"),
            fingerprints=job.fingerprints,
            metrics=scored.metrics if scored else {},
            world_size=self._me.world,
            bad_rows=bad_rows,
            history=asdict(history),
        )
        beside = (
            {vectors_file(job.validation): vectors_to_bytes(job.validation, scored)}
            if scored and job.validation
            else {}
        )
        self.log(step, {"checkpoint_wait_s": time.perf_counter() - begin})
        points, self._points = self._points, []  # before the writer's thread may tell of this one
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
