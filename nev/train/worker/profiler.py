"""Traces of chosen steps by PyTorch's profiler, on rank 0. Without `train.profile` nothing is imported and nothing is done."""

from __future__ import annotations

import tempfile
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch

from nev.storage.files import StorageError, join, storage_errors_as, write_atomic
from nev.train.job import Job
from nev.train.messages import Note, ProfileSaved, Report
from nev.train.worker.state import RankContext

FOLDER = "profile"


class StepProfiler:
    """Profiles the steps of `train.profile`. Consecutive steps share a trace, which lies in the run's folder.

    The loop waits for the device before `begin` and before `end`, so that a trace has all work of its steps and no other, and so
    that the work of a step counts as the step's.
    """

    def __init__(self, job: Job, ctx: RankContext, report: Report) -> None:
        profile = job.config.train.profile
        self._steps = frozenset(profile.steps) if profile and ctx.rank == 0 else frozenset[int]()
        self._run, self._device, self._report = job.run, ctx.device, report
        self._first = 0
        self._profiler: Any = None
        self._step = ExitStack()

    def profiles(self, step: int) -> bool:
        """Whether this rank profiles a step. step: its number, 1 for the first."""
        return step in self._steps

    def synchronize(self) -> None:
        """Wait for the device."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def begin(self, step: int) -> None:
        """Start the profiler, unless it runs since the step before, and mark the step in the trace."""
        from torch.profiler import ProfilerActivity, profile, record_function

        if self._profiler is None:
            cuda = [ProfilerActivity.CUDA] if self._device.type == "cuda" else []
            self._profiler, self._first = profile(activities=[ProfilerActivity.CPU, *cuda]), step
            self._profiler.start()
        self._step.enter_context(record_function(f"step {step}"))

    def end(self, step: int, last: bool) -> None:
        """Stop the profiler and write the trace, unless the next step is profiled, too. last: there is no next step."""
        self._step.close()
        if step + 1 in self._steps and not last:
            return
        profiler, self._profiler = self._profiler, None
        profiler.stop()
        location = join(self._run, FOLDER, f"step-{self._first:08d}.json.gz")
        try:
            with storage_errors_as(location, "written"), tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / "trace.json.gz"
                profiler.export_chrome_trace(str(path))
                write_atomic(location, path.read_bytes())
        except StorageError as error:  # training does not end for a trace
            self._report(Note(f"step {step}: the trace of the profiler is lost: {error}"))
        else:
            self._report(ProfileSaved(self._first, location))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._step.close()
        if self._profiler is not None:  # an error inside a profiled step
            self._profiler.stop()
