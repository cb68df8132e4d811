"""What a prediction of a run on this machine is made of, each measured without the others: the training processes, a core's
decoding, and what the coordinator of a stream hands out.
"""

from __future__ import annotations

import os
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from benchmarks.contestants.processes import warm_up_steps
from benchmarks.contestants.ray_job import summed
from nev.config.experiment import Experiment

TASK_BLOCKS = 4  # as many as a window of nev's own shards has


def decode_core_images_s(config: Experiment, seconds: float) -> float:
    """Rows a second that one core reads, decodes and crops, without Ray."""
    from nev.data.index import build_index
    from nev.models.text import load_text
    from nev.train.driver.setup import make_plan, make_reader

    torch.set_num_threads(1)
    index = build_index(*config.data.only_set("this benchmark"))
    reader = make_reader(config, load_text(config.text), [index])
    plan = make_plan(config, [index])
    next(reader.read_blocks(plan.make_window(0)))
    begin, rows, number = time.perf_counter(), 0, 0
    while time.perf_counter() - begin < seconds:
        number += 1
        rows += len(next(reader.read_blocks(plan.make_window(number)))["valid"])
    return rows / (time.perf_counter() - begin)


def train_images_s(config: Experiment, steps: int) -> float:
    """Images a second of nev's training processes without Ray, each with its blocks in memory; collectives by gloo."""
    world = config.workers.least
    with tempfile.TemporaryDirectory() as folder:
        results = mp.get_context("spawn").SimpleQueue()
        train = config.train.model_copy(update={"log_every": max(1, steps // 20)})
        alone = config.model_copy(update={"output": folder, "train": train})
        mp.spawn(_train_rank, (world, steps, alone, f"file://{folder}/store", results), world)
        return float(results.get())


def _train_rank(rank: int, world: int, steps: int, config: Experiment, store: str, results: Any) -> None:
    from nev.models.precision import choose_precision
    from nev.models.text import load_text
    from nev.train.driver.preflight import check_inputs
    from nev.train.driver.setup import make_job, make_reader
    from nev.train.messages import Metrics
    from nev.train.worker.loop import train
    from nev.train.worker.state import RankContext, load_model, make_train_state

    torch.set_num_threads(max(1, (os.cpu_count() or 1) // world))
    if world > 1:
        dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world)
    text, cpu = load_text(config.text), torch.device("cpu")
    inputs = check_inputs(config, text)
    job, reader = make_job(config, text, inputs, steps), make_reader(config, text, inputs.indexes)
    context = RankContext(rank, world, cpu, choose_precision(config.train.precision, cpu))
    state, start = make_train_state(load_model(job, context, 0), job, context)
    own = [
        _read(reader, job.plan, number) for step in range(steps) for number in job.plan.rank_blocks(step, rank, world)
    ]
    windows: list[Metrics] = []

    def note(event: object) -> None:
        if isinstance(event, Metrics) and "images_per_s" in event.metrics:
            windows.append(event)

    train(job, context, state, start, iter(own), note)
    if rank == 0:
        ends = [window.step for window in windows]
        rates = [window.metrics["images_per_s"] for window in windows]
        waits = [window.metrics["data_wait_share"] for window in windows]
        results.put(summed(ends, rates, waits, config.train.global_batch, warm_up_steps(steps)).images_per_s)
    if world > 1:
        dist.destroy_process_group()


def _read(reader: Any, plan: Any, number: int) -> dict[str, Any]:
    block: dict[str, Any] = next(reader.read_blocks(plan.make_window(number)))
    block["block"] = np.full(len(block["valid"]), number, np.int64)
    return block


@dataclass
class EmptyReader:
    """Blocks that cost nothing: a row of one byte."""

    row_bytes: int = 8

    def allocate(self, rows: int) -> np.ndarray:
        """No memory to speak of."""
        return np.zeros(rows, np.uint8)

    def read_blocks(self, window: Any, memory: Any = None) -> Iterator[dict[str, np.ndarray]]:
        """One row a block."""
        return ({"valid": np.ones(1, bool)} for _ in range(window.blocks))


def coordinator_blocks_s(consumers: int, steps: int, blocks_per_step: int = 256) -> float:
    """Blocks a second that nev's stream gives to its consumers where a block costs nothing, from the first block on."""
    import ray

    from nev.cluster.session import connect
    from nev.data.plan import Plan
    from nev.data.stream import make_stream

    connect()
    reader: Any = EmptyReader()
    plan = Plan(np.ones(40 * blocks_per_step, np.int64), 0, blocks_per_step, 1, window=TASK_BLOCKS)
    shares = make_stream(reader, plan, 0, steps).streaming_split(consumers, equal=False)
    times: list[float] = []

    def consume(share: Any) -> None:
        for _ in share.iter_batches(batch_size=None, prefetch_batches=8):
            times.append(time.perf_counter())

    threads = [threading.Thread(target=consume, args=(share,)) for share in shares]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    ray.shutdown()
    return (len(times) - 1) / (max(times) - min(times))
