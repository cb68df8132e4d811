"""What travels from the driver to the workers: plain data, quick to import (no torch)."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nev.config.experiment import Experiment
from nev.data.block_plan import BlockPlan
from nev.eval.validation.task import Validation
from nev.runs.manifest import latest_valid
from nev.train.core.schedule import decay_start


@dataclass(frozen=True)
class Job:
    """Everything that a worker needs beside the stream. Plain data, equal on every rank.

    run: the folder of the run.
    shards: paths of the training sets' shards, each relative to the root of its set.
    set_names: names of the sets of a mixture; none for one set.
    text_width: width D of the text vectors.
    total_steps: length of the learning rate's schedule.
    stop_step: the step at which this start of the run ends; at most `total_steps`.
    validation: None for a run without a validation set.
    features: shape of one picture's features under a locked trunk, (F,) or (T, F); None for a trained trunk.
    statistics: of these features, float32 [2, F]; None where they are not standardised.
    start_from: checkpoint whose model a new run begins from; None without `train.from`.
    head_given: the head behind a locked trunk starts from `vision.weights`, which has a whole tower that fits; else it is random.
    fingerprints: hashes of the data, the plan, the text tower and a locked trunk, by the names data, plan, text, trunk,
    and of the weights that the run began from by `train.from`, start.
    canaries: vectors of `nev.models.lock.CANARIES` from the text tower before training, float32 [8, D]; None for a locked
    text tower.
    flops: of a step for an image; None where they are not known (`nev.train.flops.model_flops`).
    """

    config: Experiment
    run: str
    plan: BlockPlan
    shards: tuple[str, ...]
    text_width: int
    total_steps: int
    stop_step: int
    validation: Validation | None
    fingerprints: dict[str, str]
    features: tuple[int, ...] | None = None
    statistics: NDArray[np.float32] | None = None
    start_from: str | None = None
    head_given: bool = False
    canaries: NDArray[np.float32] | None = None
    flops: float | None = None
    set_names: tuple[str, ...] = ()

    @property
    def decay_start(self) -> int | None:
        """The step whose checkpoint is kept, since a prolonged run continues from it: the beginning of the decay of `wsd`."""
        optim = self.config.optim
        return decay_start(self.total_steps, optim) if optim.schedule == "wsd" else None

    def validates(self, step: int) -> bool:
        """Whether the model is validated after `step` steps."""
        every = self.config.train.eval_every
        return self.validation is not None and (step == self.stop_step or (every is not None and step % every == 0))


@dataclass(frozen=True)
class ResumePoint:
    """The point from which a run continues.

    step: steps done.
    bad_rows: rows left out so far.
    history: the fields of `guards.GuardState`.
    """

    step: int = 0
    bad_rows: int = 0
    history: dict[str, Any] = field(default_factory=dict)


def name_stream(stream: int) -> str:
    """The name by which workers ask Ray Train for a stream."""
    return f"train-{stream}"


def find_resume_point(run: str) -> ResumePoint:
    """The step of the newest valid checkpoint. Raises CheckpointError where every checkpoint is damaged."""
    checkpoint = latest_valid(run)
    return ResumePoint() if checkpoint is None else make_resume_point(checkpoint.manifest)


def make_resume_point(manifest: dict[str, Any]) -> ResumePoint:
    """The resume point of a checkpoint, from its manifest."""
    return ResumePoint(manifest["step"], manifest["bad_rows"], manifest["history"])


def row_bytes(job: Job) -> int:
    """Bytes of one row of a block: its picture or its features, and its vector or tokens."""
    text = 4 * job.config.text.max_tokens if job.config.text_online else 2 * job.text_width
    if job.features and job.config.vision.from_sidecars:
        return 2 * math.prod(job.features) + text
    return job.config.data.image_size**2 * 3 + text
