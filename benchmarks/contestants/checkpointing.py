"""What checkpoints cost the steps of the quickstart's model, without Ray, and what a run costs that is not ready."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from nev.config.experiment import Experiment
from nev.config.file import load
from nev.config.paths import with_absolute_paths
from nev.data.block import Block
from nev.models.precision import choose_precision
from nev.models.text import load_text
from nev.train.driver.preflight import check_inputs
from nev.train.driver.setup import make_job, make_reader
from nev.train.messages import CheckpointSaved, Metrics, Note
from nev.train.worker.loop import train
from nev.train.worker.state import RankContext, load_model, make_train_state

REPOSITORY = Path(__file__).parents[2]
STEPS = 150


class Spent(NamedTuple):
    """Seconds: of all steps with the last checkpoint's write, of those that the loop waited for a checkpoint, of all writes."""

    total: float
    waited: float
    written: float


def steps_with_checkpoints(pictures: Path, every: int | None) -> Spent:
    """150 steps of 64 pictures with a checkpoint after every so many; `every` None: with the last one alone."""
    with tempfile.TemporaryDirectory(prefix="nev-bench-") as folder:
        config = quickstart(pictures, folder, every)
        text = load_text(config.text)
        inputs = check_inputs(config, text)
        job, reader = make_job(config, text, inputs), make_reader(config, text, inputs.indexes)
        me = RankContext(0, 1, torch.device("cpu"), choose_precision("fp32", torch.device("cpu")))
        train_state, start = make_train_state(load_model(job, me, 0), job, me)
        block = next(reader.read_blocks(job.plan.make_window(0)))

        def blocks() -> Iterator[Block]:
            for number in range(STEPS * job.plan.blocks_per_step):
                yield {**block, "block": np.full(job.plan.block_rows, number)}

        seconds: Counter[str] = Counter()

        def report(message: Metrics | Note | CheckpointSaved) -> None:
            if not isinstance(message, Note):
                seconds.update({key: value for key, value in message.metrics.items() if key.startswith("checkpoint_")})

        begin = time.perf_counter()
        train(job, me, train_state, start, blocks(), report)
        total = time.perf_counter() - begin
        return Spent(total, seconds["checkpoint_wait_s"], seconds["checkpoint_write_s"])


def seconds_to_findings(pictures: Path) -> float:
    """Seconds until `pipelines/train.py` has said all that is in the way of a run: no MLflow, too few GPUs, no labels."""
    with tempfile.TemporaryDirectory(prefix="nev-bench-") as folder:
        settings = (f"output={folder}", f"data.train={pictures / 'train'}", f"data.val={pictures / 'val'}")
        wrong = ("tracking.uri=http://127.0.0.1:9", "workers.gpus=9", "data.columns.label=nothing")
        command = [sys.executable, "pipelines/train.py", "--config", "configs/quickstart.yaml"]
        command += [word for one in settings + wrong for word in ("--set", one)]
        alone = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
        begin = time.perf_counter()
        with subprocess.Popen(command, cwd=REPOSITORY, env=alone, stdout=subprocess.PIPE, text=True) as run:
            assert run.stdout
            said = run.stdout.readline()
            seconds = time.perf_counter() - begin
            said += run.stdout.read()
        if run.returncode != 2 or not all(word in said for word in ("127.0.0.1:9", "workers.gpus", "nothing")):
            raise RuntimeError(f"not the findings that are there:\n{said}")
        return seconds


def quickstart(pictures: Path, folder: str, every: int | None) -> Experiment:
    """The quickstart's config over these pictures, without validation."""
    return with_absolute_paths(
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
