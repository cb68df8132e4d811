"""The blocks of a rank, fetched from the stream ahead of the steps that take them."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import ray
import ray.train

from nev.cluster.ray_internals import current_loop_config
from nev.data.block import Block
from nev.data.block_plan import BlockPlan
from nev.train.job import Job, name_stream, row_bytes

_started: list[tuple[Future[Block | None], Iterator[Block]]] = []


def start_fetching() -> None:
    """Fetch this rank's first block in a thread, while the process imports torch, meets the other ranks and builds the model."""
    blocks = iterate_blocks(current_loop_config()["job"])
    _started.append((ThreadPoolExecutor(1).submit(next, blocks, None), blocks))


def started_blocks() -> Iterator[Block]:
    """This rank's blocks, in order. The first one is what `start_fetching` fetches."""
    first, blocks = _started.pop()
    block = first.result()
    if block is not None:
        yield block
    yield from blocks


def iterate_blocks(job: Job) -> Iterator[Block]:
    """This rank's blocks of the stream, in order. The blocks of the next steps are fetched while a step computes."""
    store_bytes = ray.cluster_resources().get("object_store_memory", 0.0)  # type: ignore[no-untyped-call]
    context, streams = ray.train.get_context(), job.config.data.streams
    world, rank = context.get_world_size(), context.get_world_rank()
    ahead = fetch_ahead(job.plan, world, job.plan.block_rows * row_bytes(job), store_bytes)
    stream = rank * streams // world
    # Ray makes a stream when rank 0 asks for it, and the other ranks wait for that.
    shares = {
        number: ray.train.get_dataset_shard(name_stream(number))
        for number in (range(streams) if rank == 0 else [stream])
    }
    yield from shares[stream].iter_batches(batch_size=None, batch_format="numpy", prefetch_batches=ahead)


def fetch_ahead(plan: BlockPlan, world: int, block_bytes: int, store_bytes: float) -> int:
    """The number of blocks that a rank fetches ahead: those of two steps, at most its part of a quarter of the object store.

    block_bytes: of one block.
    store_bytes: of the cluster's object store.
    The blocks that wait to be fetched take up to half of the store (`nev.cluster.backpressure`). A fuller store spills to disk.
    """
    return max(1, min(2 * plan.blocks_per_step // world, int(store_bytes / 4 / world // block_bytes)))
