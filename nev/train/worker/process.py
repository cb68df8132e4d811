"""A training process, as Ray Train starts it: build the model, train, and report how training ended."""

from __future__ import annotations

import os
import re
from typing import Any

from nev.cluster.ray_internals import current_worker_group, preemption_pending
from nev.common.errors import NevError, first_line
from nev.config.base import ConfigError
from nev.runs.manifest import CheckpointError, Damaged
from nev.train.job import Job
from nev.train.messages import Event, Failed, Left, Started
from nev.train.worker.quarantine import TooManyBadRows


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
    from nev.train.worker.blocks import started_blocks
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

    try:
        loaded = load_model(job, ctx, ray.get(setting["mailbox"].start_step.remote()))
        train_state, start = make_train_state(loaded, job, ctx)
        del loaded
        if ctx.rank == 0:
            ray.get(setting["mailbox"].post.remote(Started(start.step, current_worker_group())))
        done = train(job, ctx, train_state, start, started_blocks(), report, local_stop, make_export(job, ctx))
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
