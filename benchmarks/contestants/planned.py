"""What a prediction of a run on this machine is made of, each measured without the others: a core's training, a core's
decoding, an all-reduce between processes; and what the coordinator of a stream hands out.
"""

from __future__ import annotations

import tempfile
import threading
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from nev.config.experiment import Experiment

WARM_UP = 3  # all-reduces that no time counts


def decode_core_images_s(config: Experiment, seconds: float) -> float:
    """Rows a second that one core reads, decodes and crops, without Ray."""
    from nev.data.index import build_index
    from nev.data.plan import Plan
    from nev.models.text import load_text
    from nev.train.driver.setup import make_reader

    torch.set_num_threads(1)
    index = build_index(config.data.train, config.data.columns)
    reader = make_reader(config, load_text(config.text), index)
    plan = Plan(index.rows, config.seed, config.train.global_batch, config.data.block_rows)
    reader.read(plan.segments(0), 0)
    begin, rows, number = time.perf_counter(), 0, 0
    while time.perf_counter() - begin < seconds:
        number += 1
        rows += len(reader.read(plan.segments(number), plan.epoch_of(number))["valid"])
    return rows / (time.perf_counter() - begin)


def all_reduce_s(nbytes: int, world: int, repetitions: int = 20) -> float:
    """Seconds of an all-reduce of float32 between processes of this machine, by gloo."""
    if world == 1:
        return 0.0
    with tempfile.TemporaryDirectory() as folder:
        results = mp.get_context("spawn").SimpleQueue()
        mp.spawn(_all_reduce, (world, nbytes, repetitions, f"file://{folder}/store", results), world)
        return float(results.get())


def _all_reduce(rank: int, world: int, nbytes: int, repetitions: int, store: str, results: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world)
    numbers = torch.zeros(nbytes // 4)
    begin = 0.0
    for repetition in range(WARM_UP + repetitions):
        if repetition == WARM_UP:
            begin = time.perf_counter()
        dist.all_reduce(numbers)
    if rank == 0:
        results.put((time.perf_counter() - begin) / repetitions)
    dist.destroy_process_group()


@dataclass
class EmptyReader:
    """Blocks that cost nothing: a row of one byte."""

    row_bytes: int = 8

    def allocate(self, rows: int) -> np.ndarray:
        """No memory to speak of."""
        return np.zeros(rows, np.uint8)

    def read(self, segments: Any, epoch: int, memory: Any = None) -> dict[str, np.ndarray]:
        """One row."""
        return {"valid": np.ones(1, bool)}


@dataclass
class OneRowPlan:
    """Blocks of one row, so many a step."""

    blocks_per_step: int
    block_rows: int = 1

    def step_blocks(self, step: int) -> range:
        """The numbers of the blocks of a step."""
        return range(step * self.blocks_per_step, (step + 1) * self.blocks_per_step)

    def segments(self, number: int) -> list[Any]:
        """Nothing to read."""
        return []

    def epoch_of(self, number: int) -> int:
        """The first epoch."""
        return 0


def coordinator_blocks_s(consumers: int, steps: int, blocks_per_step: int = 256) -> float:
    """Blocks a second that nev's stream gives to its consumers where a block costs nothing, from the first block on."""
    import ray

    from nev.cluster.session import connect
    from nev.data.stream import make_stream

    connect()
    reader: Any = EmptyReader()
    plan: Any = OneRowPlan(blocks_per_step)
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
