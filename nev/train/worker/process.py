"""A training process, as Ray Train starts it: build the model, train, and report how training ended."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from nev.cluster.ray_internals import current_worker_group, preemption_pending
from nev.common.errors import NevError, first_line
from nev.config.base import ConfigError
from nev.data.block import Block
from nev.runs.manifest import CheckpointError, Damaged
from nev.train.job import Job, row_bytes
from nev.train.messages import Event, Failed, Left, Started
from nev.train.worker.quarantine import TooManyBadRows

if TYPE_CHECKING:
    from nev.data.plan import Plan
    from nev.train.worker.state import RankContext


class Stalled(NevError, RuntimeError):
    """A rank has waited for another rank longer than `workers.timeout_s`."""


# gloo raises a plain RuntimeError; the store and NCCL raise a torch.distributed.DistError.
GLOO_TIMEOUT = re.compile(r"gloo.*\bTimed out waiting \d+ms for", re.DOTALL)


def is_collective_timeout(error: RuntimeError) -> bool:
    """Whether the error is a timeout of a collective of torch.distributed, not a timeout of storage."""
    from torch.distributed import DistError

    if isinstance(error, DistError):
        return "timed out" in str(error).lower() or "timeout" in str(error).lower()
    return type(error) is RuntimeError and bool(GLOO_TIMEOUT.search(str(error)))


def train_worker(setting: dict[str, Any]) -> None:
    """The function of a training process. setting: `job`, a Job, and `mailbox`, the handle of the run's Mailbox."""
    import ray
    import ray.train
    import ray.train.torch
    import torch

    from nev.losses.kernel_check import KernelMismatch
    from nev.models.precision import choose_precision
    from nev.train.worker.checkpointer import CheckpointNotSaved
    from nev.train.worker.guards import Diverged
    from nev.train.worker.loop import TowerMoved, train
    from nev.train.worker.rank_metrics import make_export
    from nev.train.worker.state import RankContext, load_model, make_train_state

    job: Job = setting["job"]
    context = ray.train.get_context()
    threads = job.config.workers.threads or max(1, (os.cpu_count() or 1) // context.get_local_world_size())
    torch.set_num_threads(threads)
    device = ray.train.torch.get_device()
    precision = choose_precision(job.config.train.precision, device)
    ctx = RankContext(context.get_world_rank(), context.get_world_size(), device, precision)

    def report(message: Event) -> None:
        setting["mailbox"].post.remote(message)

    def give_up(error: str) -> None:
        # All ranks return together. Ray would start the workers again after a raised error, to the same end.
        if ctx.rank == 0:
            ray.get(setting["mailbox"].post.remote(Failed(error)))

    stop = StopSignal(setting["mailbox"]) if ctx.rank == 0 else None

    def local_stop() -> bool:
        return preemption_pending() or (stop is not None and stop.is_set())

    # The tasks make the first block while this process imports torch and builds the model.
    blocks = iterate_blocks(job, ctx)
    first = ThreadPoolExecutor(1).submit(next, blocks, None)
    try:
        loaded = load_model(job, ctx, ray.get(setting["mailbox"].start_step.remote()))
        train_state, start = make_train_state(loaded, job, ctx)
        del loaded
        if ctx.rank == 0:
            ray.get(setting["mailbox"].post.remote(Started(start.step, current_worker_group())))
        done = train(job, ctx, train_state, start, prepend(first, blocks), report, local_stop, make_export(job, ctx))
        if done < job.stop_step and ctx.rank == 0:
            ray.get(setting["mailbox"].post.remote(Left(done)))
    except Damaged:  # after the verification: the workers that Ray starts next look for the newest valid checkpoint
        raise
    # Every rank raises these at the same step.
    except (ConfigError, CheckpointError, TooManyBadRows, Diverged, TowerMoved, KernelMismatch) as error:
        give_up(str(error))
    except CheckpointNotSaved as error:  # on rank 0; the other ranks have returned
        if error.step < job.stop_step:
            raise
        give_up(str(error))
    except RuntimeError as error:
        if not is_collective_timeout(error):
            raise
        raise Stalled(
            f"rank {ctx.rank} has waited {job.config.workers.timeout_s} s (workers.timeout_s) for another rank, which hangs or "
            f"is cut off; all workers are started again. Torch's error: {first_line(error)}"
        ) from error


class StopSignal:
    """The driver's stop request, read without waiting: the mailbox answers one call when the driver requests a stop."""

    def __init__(self, mailbox: Any) -> None:
        self._answer = mailbox.wait_for_stop.remote()

    def is_set(self) -> bool:
        """Whether the driver has requested a stop."""
        import ray

        if not ray.wait([self._answer], timeout=0)[0]:
            return False
        try:
            ray.get(self._answer)
        except ray.exceptions.RayActorError:  # the driver has died, and Ray will end this process
            return False
        return True


def prepend(first: Future[Block | None], blocks: Iterator[Block]) -> Iterator[Block]:
    """The blocks, before them the block of `first`."""
    block = first.result()
    if block is not None:
        yield block
    yield from blocks


def iterate_blocks(job: Job, ctx: RankContext) -> Iterator[Block]:
    """This rank's blocks of the stream, in order. The blocks of the next steps are fetched while a step computes."""
    import ray
    import ray.train

    store_bytes = ray.cluster_resources().get("object_store_memory", 0.0)  # type: ignore[no-untyped-call]
    ahead = fetch_ahead(job.plan, ctx.world, job.plan.block_rows * row_bytes(job), store_bytes)
    shard = ray.train.get_dataset_shard("train")
    return iter(shard.iter_batches(batch_size=None, batch_format="numpy", prefetch_batches=ahead))


def fetch_ahead(plan: Plan, world: int, block_bytes: int, store_bytes: float) -> int:
    """The number of blocks that a rank fetches ahead: those of two steps, at most its part of a quarter of the object store.

    block_bytes: of one block.
    store_bytes: of the cluster's object store.
    The blocks that wait to be fetched take up to half of the store (`nev.cluster.backpressure`). A fuller store spills to disk.
    """
    return max(1, min(2 * plan.blocks_per_step // world, int(store_bytes / 4 / world // block_bytes)))
