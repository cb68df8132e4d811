"""Steps of the quickstart's model over drawn pictures, with checkpoints or without, in this process and without Ray."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from nev.config import Experiment
from nev.config_file import load
from nev.data.block import Block
from nev.models.text import load_text
from nev.train.learner import Rank, build, learner_of
from nev.train.loop import train
from nev.train.setup import absolute, prepare_job, train_reader
from nev.train.step import choose_precision

REPOSITORY = Path(__file__).parents[2]
STEPS = 150


def seconds_of_steps(pictures: Path, every: int | None) -> float:
    """Seconds of 150 steps of 64 pictures, the last checkpoint's write with them; `every` None: no other checkpoint than that."""
    with tempfile.TemporaryDirectory(prefix="nev-bench-") as folder:
        config = quickstart(pictures, folder, every)
        text = load_text(config.text)
        job, reader = prepare_job(config, text), train_reader(config, text)
        me = Rank(0, 1, torch.device("cpu"), choose_precision("fp32", torch.device("cpu")))
        learner, start = learner_of(build(job), job, me)
        block = reader.read(job.plan.segments(0), 0)

        def blocks() -> Iterator[Block]:
            for number in range(STEPS * job.plan.blocks_per_step):
                yield {**block, "block": np.full(job.plan.block_rows, number)}

        begin = time.perf_counter()
        train(job, me, learner, start, blocks(), lambda step, metrics, notes=(): None)
        return time.perf_counter() - begin


def quickstart(pictures: Path, folder: str, every: int | None) -> Experiment:
    """The quickstart's config over these pictures, without validation."""
    return absolute(
        load(
            REPOSITORY / "configs" / "quickstart.yaml",
            [
                f"output={folder}",
                f"data.train={pictures / 'train'}",
                "data.val=null",
                "eval={}",
                "data.block_rows=64",
                "train.global_batch=64",
                "train.epochs=null",
                f"train.steps={STEPS}",
                f"train.checkpoint_every={every or 10 * STEPS}",
                "train.eval_every=null",
                "workers.count=1",
            ],
        )
    )
