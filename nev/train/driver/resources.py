"""Whether the machine, or the cluster, has what a run takes: workers, disk, and memory for windows and steps."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from nev.cluster.session import cluster_cpus, cluster_gpus, may_grow
from nev.common.location import S3
from nev.config.base import ConfigError
from nev.config.experiment import Experiment
from nev.config.train import Workers
from nev.data.block_plan import BlockPlan
from nev.data.index import Index
from nev.data.mixture import MixturePlan
from nev.data.windows import count_rows_read, task_blocks
from nev.runs.folder import check_space, run_folder
from nev.runs.metrics_log import load_mlflow_run_id
from nev.runs.tracking import local_artifacts, tracking_uri
from nev.train.driver.validator import MAX_WAITING
from nev.train.job import Job, row_bytes

if TYPE_CHECKING:
    from nev.models.text import TextTower

WINDOW_SHARE = 0.5  # of the memory of a machine, for the windows that its CPUs read at a time
NOTED_SHARE = 0.05  # of rows that are read twice
STORE_SHARE = 0.6  # of the object store, for the blocks of a window: the workers fetch ahead in the rest


def machine_memory() -> int:
    """Bytes of memory of this machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def window_bytes(indexes: Sequence[Index], plan: BlockPlan) -> int:
    """Bytes of the pictures and texts of the largest window, as they are stored: what a task reads before its first block.

    From S3 the row groups are read at the same time, and each takes its bytes twice while it is decoded from parquet.
    """
    used = plan.total_rows / sum(index.total_rows for index in indexes)
    largest = zip(indexes, plan.groups_per_window, strict=True)
    nbytes = sum(
        np.sort(index.nbytes)[-groups:].sum() * (2 if index.root.startswith(S3) else 1) for index, groups in largest
    )
    return int(nbytes * used)


def note_read_twice(indexes: Sequence[Index], plan: BlockPlan, streams: int) -> str | None:
    """A note about rows that are read twice from S3; or None. On a disk a second reading costs little.

    Row groups are no whole number of blocks, or windows are cut where the part of a stream ends.
    """
    if not any(index.root.startswith(S3) for index in indexes):
        return None
    is_uneven = plan.rows % plan.block_rows > 0
    by_row_groups = count_rows_read(plan) / plan.block_rows - 1 if is_uneven.any() else 0.0
    by_streams = count_rows_read(plan, streams) / plan.block_rows - 1 - by_row_groups if streams > 1 else 0.0
    notes = []
    if by_row_groups >= NOTED_SHARE:
        size = int(np.bincount(plan.rows[is_uneven]).argmax())
        notes.append(
            f"row groups such as those of {size:,} rows are no whole number of blocks of {plan.block_rows} rows, so about "
            f"{by_row_groups:.0%} of the rows are read twice. A data.block_rows that divides the row groups avoids that, or "
            "nev prepare."
        )
    if by_streams >= NOTED_SHARE:
        notes.append(
            f"each of {streams} streams hands out {plan.blocks_per_step // streams} blocks of a step, and windows of some "
            f"{plan.blocks_per_window} blocks are cut there, so about {by_streams:.0%} of the rows are read "
            f"{'once more' if notes else 'twice'}. A smaller data.window or data.streams avoids that."
        )
    return " ".join(notes) or None


def note_rare_sets(plan: BlockPlan, names: Sequence[str]) -> str | None:
    """A note about sets of a mixture that a step rarely has, since they come in whole row groups; or None."""
    if not isinstance(plan, MixturePlan):
        return None
    sizes = {
        name: float(rows.mean()) * sum(plan.shares) / share
        for name, rows, share in zip(names, plan.group_rows, plan.shares, strict=True)
    }
    if not (rare := {name: size for name, size in sizes.items() if size > 2 * plan.global_batch}):
        return None
    name, size = max(rare.items(), key=lambda item: item[1])
    return (
        f"{', '.join(rare)}: a set comes in whole row groups, one of {name} in some {size:,.0f} rows, and a step has "
        f"{plan.global_batch:,}, so most steps have none of it. Smaller row groups (nev prepare --row-group-rows) spread a set."
    )


def check_window_memory(indexes: Sequence[Index], plan: BlockPlan) -> None:
    """Raise ConfigError where the windows that all CPUs read at a time are more than `WINDOW_SHARE` of this machine's memory.

    A cluster that may grow passes: its nodes are not known.
    """
    if may_grow():
        return
    nbytes, cpus, memory = window_bytes(indexes, plan), cluster_cpus(), machine_memory()
    if nbytes * cpus > WINDOW_SHARE * memory:
        raise ConfigError(
            f"a window takes up to {nbytes / 2**30:.1f} GiB. Each of the {cpus} CPUs reads one at a time, and this machine has "
            f"{memory / 2**30:.1f} GiB of memory: {_smaller_windows(plan)}"
        )


def _smaller_windows(plan: BlockPlan) -> str:
    """What makes windows smaller."""
    lower = f"lower data.window (here {plan.window} row groups), or " if plan.window > 1 else ""
    return f"{lower}write the shards again with smaller row groups (nev prepare)"


def check_workers(workers: Workers) -> None:
    """Raise ConfigError for workers that never start, or whose stream never does: Ray would wait for room without a word.

    Ray need not run yet. A cluster that may grow passes.
    """
    if may_grow():
        return
    gpus, cpus = cluster_gpus(), cluster_cpus()
    setting = f"workers.{'min' if workers.min else 'count'} = {workers.least}"
    if workers.least * workers.gpus > gpus:
        raise ConfigError(
            f"{setting} times workers.gpus = {workers.gpus:g} are more than this machine's {gpus} GPUs: "
            "lower one of them, or submit the run to a cluster"
        )
    if workers.cpus and workers.most * workers.cpus > cpus - 1:  # elastic workers take what is there
        setting = f"workers.{'max' if workers.max else 'count'} = {workers.most}"
        raise ConfigError(
            f"{setting} times workers.cpus = {workers.cpus:g} leave none of this machine's {cpus} CPUs to decode: "
            "lower one of them; with workers.cpus = 0, training and decoding share them"
        )


def check_disk(config: Experiment, text: TextTower, reachable: bool) -> None:
    """Raise ConfigError where the run's disk has no room for its checkpoints, and for MLflow's copy if that lies there too.

    reachable: MLflow answers. Artifacts of an MLflow that does not answer are not counted.
    """
    from nev.train.capacity import checkpoint_bytes, weight_bytes

    run, train = run_folder(config), config.train
    # The best one, and the one at the beginning of the decay.
    chosen = bool(config.eval.best) + (config.optim.schedule == "wsd")
    saved = train.keep_last + chosen + (MAX_WAITING + 1) * config.eval.asynchronous
    artifacts = None
    if reachable:
        uri = tracking_uri(config.tracking, config.output)
        artifacts = local_artifacts(uri, config.tracking.experiment, config.output, load_mlflow_run_id(run))
    check_space(run, saved, checkpoint_bytes(config, text), artifacts, weight_bytes(config, text))


def check_object_store(job: Job) -> None:
    """Raise ConfigError where the blocks of a step, or of a window, do not fit the cluster's object store. Needs Ray."""
    import ray

    store = ray.cluster_resources().get("object_store_memory", 0.0)  # type: ignore[no-untyped-call]
    step = job.config.train.global_batch * row_bytes(job)
    if may_grow():
        return
    if step > store:
        raise ConfigError(
            f"the pictures of a step take {step / 2**30:.1f} GiB, and Ray's object store has {store / 2**30:.1f} GiB here: lower "
            "train.global_batch or data.image_size, or submit the run to a cluster"
        )
    streams = job.config.data.streams  # each of them may run a task
    window = streams * task_blocks(job.plan, streams) * job.plan.block_rows * row_bytes(job)
    if window > STORE_SHARE * store:
        windows = "a window" if streams == 1 else f"{streams} windows"
        raise ConfigError(
            f"the decoded pictures of {windows} take {window / 2**30:.1f} GiB, too much for Ray's object store, which has "
            f"{store / 2**30:.1f} GiB here: {_smaller_windows(job.plan)}, lower data.image_size, or submit the run to a cluster"
        )
