"""Training without Ray, over a small set."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from nev.config.experiment import Experiment
from nev.data.block import Block, BlockReader
from nev.data.index import build_index
from nev.data.plan import Plan
from nev.models.precision import choose_precision
from nev.models.text import TextTower
from nev.runs import checkpoint
from nev.train.driver.preflight import check_inputs
from nev.train.driver.setup import make_job, make_reader
from nev.train.job import Job, ResumePoint, find_resume_point
from nev.train.messages import Event, Note, ProfileSaved
from nev.train.worker.loop import train
from nev.train.worker.state import RankContext, TrainState, load_model, make_train_state

CPU = torch.device("cpu")


class Reports:
    """What a training has reported: metrics by step, notes, and locations of traces by step."""

    def __init__(self) -> None:
        self.metrics: dict[int, dict[str, float]] = {}
        self.notes: list[str] = []
        self.traces: dict[int, str] = {}

    def __call__(self, message: Event) -> None:
        if isinstance(message, Note):
            self.notes.append(message.text)
        elif isinstance(message, ProfileSaved):
            self.traces[message.step] = message.location
        else:
            self.metrics.setdefault(message.step, {}).update(message.metrics)


def prepare_job(config: Experiment, text: TextTower, stop_after: int | None = None) -> Job:
    """The job of an experiment with absolute paths, after the checks of its inputs."""
    return make_job(config, text, check_inputs(config, text), stop_after)


def train_reader(config: Experiment, text: TextTower) -> BlockReader:
    """The reader of an experiment's training set."""
    return make_reader(config, text, [build_index(*own) for own in config.data.train_sets])


def blocks(reader: BlockReader, plan: Plan, first: int, last: int, rank: int = 0, world: int = 1) -> Iterator[Block]:
    """The stream of a rank from step `first` up to `last`, without Ray."""
    for number in (
        block for step in range(first, last) for block in plan.rank_blocks(step, rank, world, first_step=first)
    ):
        block = next(reader.read_blocks(plan.make_window(number)))
        block["block"] = np.full(len(block["valid"]), number)
        yield block


def load_train_state(job: Job, ctx: RankContext) -> tuple[TrainState, ResumePoint]:
    """What a rank trains, from where the run of the job stands. Every rank calls this."""
    return make_train_state(load_model(job, ctx, find_resume_point(job.run).step), job, ctx)


def run_bare(
    job: Job, reader: BlockReader, stream: Iterator[Block] | None = None, rank: int = 0, world: int = 1
) -> dict[int, dict[str, float]]:
    """Train one rank in this process from where the job stands; returns the reported metrics by step."""
    ctx = RankContext(rank, world, CPU, choose_precision(job.config.train.precision, CPU))
    train_state, start = load_train_state(job, ctx)
    reports = Reports()
    own = stream or blocks(reader, job.plan, start.step, job.stop_step, rank, world)
    train(job, ctx, train_state, start, own, reports)
    return reports.metrics


def run_straight_and_stopped(
    whole: Experiment, halves: Experiment, text: TextTower, step: int
) -> tuple[dict[int, dict[str, float]], dict[int, dict[str, float]]]:
    """The metrics by step of a run, and of one that stops at `step` and continues. Both end with the same weights."""
    reader = train_reader(whole, text)
    straight = run_bare(prepare_job(whole, text), reader)
    stopped = run_bare(prepare_job(halves, text, stop_after=step), reader)
    job = prepare_job(halves, text)
    assert find_resume_point(job.run).step == step
    stopped |= run_bare(job, reader)
    left, right = (weights(prepare_job(config, text).run, job.stop_step) for config in (whole, halves))
    assert all(torch.equal(left[name], right[name]) for name in left)
    return straight, stopped


def weights(run: str, step: int) -> dict[str, Tensor]:
    return checkpoint.load_model(f"{run}/checkpoints/step-{step:08d}")[1]
