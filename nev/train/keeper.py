"""What is kept of a run while it goes on: its numbers are told and noted, its checkpoints written behind the steps."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict
from types import TracebackType
from typing import Protocol, Self

from nev.eval.validation.task import Result
from nev.eval.validation.vectors import kept_bytes, kept_file
from nev.runs.manifest import State, drop_beyond
from nev.runs.metrics_log import Point, point
from nev.train.core.state_dict import Tensors, gather_tensors
from nev.train.guards import History
from nev.train.job import Job
from nev.train.learner import Learner, Rank
from nev.train.rng import gather_rng
from nev.train.writer import Snapshot, Writer


class Report(Protocol):
    """Takes metrics of a step, and lines for the person who watches."""

    def __call__(self, step: int, metrics: dict[str, float], notes: Sequence[str] = ()) -> None: ...  # noqa: D102


class Keeper:
    """A rank's part in it. Rank 0 tells and writes; the others give what they alone have.

    begun: the step that this attempt goes on from. Left without an error, it waits for the last checkpoint; with one, no
    longer than for the write that is under way.
    """

    def __init__(self, job: Job, me: Rank, begun: int, report: Report) -> None:
        self._job, self._me, self._report = job, me, report
        self._points: list[Point] = []
        self._tensors: Tensors | None = None
        train = job.config.train
        self._writer = None
        if me.rank == 0:
            drop_beyond(job.run, begun)
            awaited = job.validates if job.config.eval.asynchronous else lambda step: False
            self._writer = Writer(job.run, train.keep_last, job.config.eval.best, self.say, awaited)

    def say(self, step: int, metrics: dict[str, float], notes: Sequence[str] = ()) -> None:
        """Report metrics of a step, and note them for the next checkpoint's journal. Nothing on other ranks than 0."""
        if self._me.rank == 0:
            if metrics:
                self._points.append(point(step, metrics))
            self._report(step, metrics, notes)

    def keep(self, learner: Learner, step: int, bad_rows: int, history: History, scored: Result | None) -> None:
        """Begin a checkpoint of this step: every rank comes here together. The loop waits for copies in memory alone.

        Where the checkpoint before is not written yet, for that, too.
        """
        begin = time.perf_counter()
        rng = gather_rng(self._me.device, self._me.world)
        if self._writer:
            self._writer.ready()
        self._tensors = gather_tensors(learner.model, learner.optimizer, bool(self._writer), into=self._tensors)
        if not self._writer:
            return
        job = self._job
        state = State(
            step=step,
            config=job.config.model_dump(mode="json"),
            fingerprints=job.fingerprints,
            metrics=scored.metrics if scored else {},
            world_size=self._me.world,
            bad_rows=bad_rows,
            history=asdict(history),
        )
        beside = {kept_file(job.validation): kept_bytes(job.validation, scored)} if scored and job.validation else {}
        self.say(step, {"checkpoint_wait_s": time.perf_counter() - begin})
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
            self._writer.ready()
