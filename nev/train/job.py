"""What travels to the training processes: plain data, quick to import (no torch)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nev.config.experiment import Experiment
from nev.data.plan import Plan
from nev.eval.validation.task import Validation
from nev.runs.manifest import latest_valid, verify


@dataclass(frozen=True)
class Job:
    """Everything that a training process needs beside the stream. Plain data, equal on every rank.

    `run` is the run's folder; training goes from the latest checkpoint to `stop_step`, while the schedule spans
    `total_steps`. canaries: what the text tower made of `nev.models.text.CANARIES` before it was trained, float32 [8, D]; None
    where it is locked.
    """

    config: Experiment
    run: str
    plan: Plan
    shards: tuple[str, ...]
    text_width: int
    total_steps: int
    stop_step: int
    validation: Validation | None
    fingerprints: dict[str, str]
    canaries: NDArray[np.float32] | None = None

    def validates(self, step: int) -> bool:
        """Whether the model is scored after so many steps."""
        every = self.config.train.eval_every
        return self.validation is not None and (step == self.stop_step or (every is not None and step % every == 0))


@dataclass(frozen=True)
class ResumePoint:
    """Where a run stands: steps done, rows left out on the way, and what its guards remember (`guards.GuardState`)."""

    step: int = 0
    bad_rows: int = 0
    history: dict[str, Any] = field(default_factory=dict)


def find_resume_point(run: str) -> ResumePoint:
    """Where a run stands, by its newest checkpoint that is whole. Raises CheckpointError where there are but damaged ones."""
    found = latest_valid(run, verify)
    return ResumePoint() if found is None else make_resume_point(found.read)


def make_resume_point(manifest: dict[str, Any]) -> ResumePoint:
    """Where the run of a checkpoint's manifest stood."""
    return ResumePoint(manifest["step"], manifest["bad_rows"], manifest["history"])


def row_bytes(job: Job) -> int:
    """What a row of a block takes: its picture, and its vector or tokens."""
    text = 4 * job.config.text.max_tokens if job.config.text_online else 2 * job.text_width
    return job.config.data.image_size**2 * 3 + text
