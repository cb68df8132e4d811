"""What is checked before any process starts, so that an error costs seconds."""

from __future__ import annotations

from nev.cluster.session import cluster_cpus, cluster_gpus, may_grow
from nev.config.base import ConfigError
from nev.config.experiment import Workers
from nev.train.job import Job, row_bytes


def check_room(workers: Workers) -> None:
    """Raise ConfigError for workers that never start, or whose stream never does: Ray would wait for room without a word.

    Asked before Ray starts here. A cluster that may grow is given the benefit of the doubt.
    """
    if may_grow():
        return
    gpus, cpus = cluster_gpus(), cluster_cpus()
    asked = f"workers.{'min' if workers.min else 'count'} = {workers.least}"
    if workers.least * workers.gpus > gpus:
        raise ConfigError(
            f"{asked} times workers.gpus = {workers.gpus:g} are more than this machine's {gpus} GPUs: "
            "lower one of them, or submit the run to a cluster"
        )
    if workers.cpus and workers.least * workers.cpus > cpus - 1:
        raise ConfigError(
            f"{asked} times workers.cpus = {workers.cpus:g} leave none of this machine's {cpus} CPUs "
            "to decode: lower one of them; with workers.cpus = 0, training and decoding share them"
        )


def check_store(job: Job) -> None:
    """Raise ConfigError where the blocks of a step are more than the cluster's object store. Needs a connected Ray."""
    import ray

    store = ray.cluster_resources().get("object_store_memory", 0.0)  # type: ignore[no-untyped-call]
    step = job.config.train.global_batch * row_bytes(job)
    if step > store and not may_grow():
        raise ConfigError(
            f"the pictures of a step take {step / 2**30:.1f} GiB, and Ray's object store has {store / 2**30:.1f} GiB here: lower "
            "train.global_batch or data.image_size, or submit the run to a cluster"
        )
