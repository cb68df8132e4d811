"""Training without Ray, over a small set."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from nev.data.block import Block, BlockReader
from nev.data.plan import Plan
from nev.runs import checkpoint
from nev.train.core.step import choose_precision
from nev.train.job import Job
from nev.train.worker.loop import train
from nev.train.worker.state import RankContext, load_model, make_train_state

CPU = torch.device("cpu")


def blocks(reader: BlockReader, plan: Plan, first: int, last: int, rank: int = 0, world: int = 1) -> Iterator[Block]:
    """The stream of a rank from step `first` up to `last`, without Ray."""
    for number in (block for step in range(first, last) for block in plan.rank_blocks(step, rank, world, since=first)):
        block = reader.read(plan.segments(number), plan.epoch_of(number))
        block["block"] = np.full(len(block["valid"]), number)
        yield block


def run_bare(job: Job, reader: BlockReader, stream: Iterator[Block] | None = None) -> dict[int, dict[str, float]]:
    """Train in this process from where the job stands; returns the reported metrics by step."""
    ctx = RankContext(0, 1, CPU, choose_precision(job.config.train.precision, CPU))
    learner, start = make_train_state(load_model(job), job, ctx)
    reported: dict[int, dict[str, float]] = {}

    def report(step: int, metrics: dict[str, float], notes: Sequence[str] = ()) -> None:
        reported.setdefault(step, {}).update(metrics)

    train(job, ctx, learner, start, stream or blocks(reader, job.plan, start.step, job.stop_step), report)
    return reported


def weights(run: str, step: int) -> dict[str, Tensor]:
    return checkpoint.load_model(f"{run}/checkpoints/step-{step:08d}")[1]
