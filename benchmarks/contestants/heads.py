"""A linear head behind a locked trunk, from sidecars: nev's stream, a bare PyTorch loop, and nev's loop without Ray."""

from __future__ import annotations

import math
import os
import resource
import time
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.contestants.processes import warm_up_steps
from nev.config.experiment import Experiment
from nev.data.block import Block, BlockReader
from nev.train.job import Job
from nev.train.messages import CheckpointSaved, Metrics, Note, Report

MANY = 100_000  # steps: more than a stream gives while it is measured
LARGE_STEPS = 2  # the second is measured: the first touches new memory


class Large(NamedTuple):
    """seconds: of the second step; gib: most resident memory of the process, its libraries included."""

    seconds: float
    gib: float


def prepare_head(config: Experiment, stop_after: int | None = None) -> tuple[Job, BlockReader]:
    """What the driver of a run hands to its training process and to its stream, after the checks of a run."""
    from nev.models.text import load_text
    from nev.train.driver.preflight import check_inputs
    from nev.train.driver.setup import make_job, make_reader

    text = load_text(config.text)
    inputs = check_inputs(config, text)
    return make_job(config, text, inputs, stop_after), make_reader(config, text, inputs.indexes, inputs.trunk)


def train_here(job: Job, reader: BlockReader, report: Report) -> None:
    """nev's training loop in this process, on every core; the blocks are read in the loop. report: gets each message."""
    from nev.models.precision import choose_precision
    from nev.train.job import find_resume_point
    from nev.train.worker.loop import train
    from nev.train.worker.state import RankContext, load_model, make_train_state

    torch.set_num_threads(os.cpu_count() or 1)
    device = torch.device("cpu")
    ctx = RankContext(0, 1, device, choose_precision(job.config.train.precision, device))
    train_state, start = make_train_state(load_model(job, ctx, find_resume_point(job.run).step), job, ctx)
    train(job, ctx, train_state, start, read_blocks(job, reader), report)


def read_blocks(job: Job, reader: BlockReader) -> Iterator[Block]:
    """The stream of a run from its first step on, without Ray."""
    for number in range(job.plan.step_blocks(job.stop_step).start):
        block = next(reader.read_blocks(job.plan.make_window(number)))
        block["block"] = np.full(len(block["valid"]), number)
        yield block


def losses_here(job: Job, reader: BlockReader) -> dict[int, float]:
    """The losses of nev's training loop in this process, by step: of the steps that the job logs."""
    losses: dict[int, float] = {}

    def note_loss(message: Metrics | Note | CheckpointSaved) -> None:
        if isinstance(message, Metrics) and "loss" in message.metrics:
            losses[message.step] = message.metrics["loss"]

    train_here(job, reader, note_loss)
    return losses


def large_step(job: Job, reader: BlockReader) -> Large:
    """The second step of a job that logs each step. To be called in a process of its own."""
    ends: dict[int, float] = {}

    def note_time(message: Metrics | Note | CheckpointSaved) -> None:
        if isinstance(message, Metrics) and "loss" in message.metrics:
            ends[message.step] = time.perf_counter()

    train_here(job, reader, note_time)
    return Large(ends[2] - ends[1], resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)


def stream_rows_per_s(config: Experiment) -> float:
    """Rows a second of nev's stream, features and text vectors, on a Ray of this machine's CPUs into one consumer."""
    import ray

    from benchmarks.contestants.streams import rate
    from nev.cluster.session import connect
    from nev.data.stream import make_stream

    job, reader = prepare_head(config)
    connect()
    stream = make_stream(reader, job.plan, 0, MANY)
    blocks = iter(stream.iter_batches(batch_size=None, batch_format="numpy", prefetch_batches=2))
    found = rate(blocks, job.plan.block_rows)
    blocks.close()  # type: ignore[attr-defined]  # ends the stream, or its tasks would fail noisily when Ray goes
    ray.shutdown()
    return found


def bare_loop(config: Experiment, steps: int, own_loss: bool) -> float:
    """Rows a second of a plain PyTorch loop over arrays in memory, with nev's loss (`own_loss`) or the full matrix of scores."""
    from nev.losses.contrastive import contrastive_loss

    torch.set_num_threads(os.cpu_count() or 1)
    torch.manual_seed(config.seed)
    images, texts = read_vectors(config)
    batch, warm_up, optim = config.train.global_batch, warm_up_steps(steps), config.optim
    head = nn.Linear(images.shape[1], texts.shape[1])
    log_scale = nn.Parameter(torch.tensor(math.log(config.loss.init_scale)))
    parameters = [*head.parameters(), log_scale]
    optimizer = torch.optim.AdamW(
        parameters, lr=optim.lr, betas=optim.betas, eps=optim.eps, weight_decay=optim.weight_decay, fused=True
    )
    pairs = torch.arange(batch)

    def full_loss(vectors: Tensor, text: Tensor) -> Tensor:
        logits = log_scale.exp() * vectors @ text.T
        return (F.cross_entropy(logits, pairs) + F.cross_entropy(logits.T, pairs)) / 2

    begin = 0.0
    for step in range(steps):
        if step == warm_up:
            begin = time.perf_counter()
        rows = torch.randint(len(images), (batch,))
        vectors, text = F.normalize(head(images[rows]), dim=-1), texts[rows]
        loss = contrastive_loss(vectors, text, log_scale).loss if own_loss else full_loss(vectors, text)
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(parameters, optim.clip_norm or math.inf)
        optimizer.step()
    return batch * (steps - warm_up) / (time.perf_counter() - begin)


def read_vectors(config: Experiment) -> tuple[Tensor, Tensor]:
    """All rows of the set, each in memory of its own: features, float32 [n, F], and text vectors, float32 [n, D]."""
    from nev.data.block_plan import sequential_blocks

    _, reader = prepare_head(config)
    rows = reader.index.rows
    blocks = [reader.read(segments) for segments in sequential_blocks(rows, int(rows.max()))]
    images, texts = (torch.cat([torch.from_numpy(block[name]) for block in blocks]) for name in ("image", "text"))
    return images.float(), texts.float()
