"""Connecting to Ray quietly: the cluster that `RAY_ADDRESS` names, or one on this machine."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from nev.cluster.ray_internals import quiet_data_logger, quiet_worker_deaths
from nev.common.quiet import ENVIRONMENT, quiet

# Of Ray's processes on this machine, where the user has not set them. A single machine gets no notice of its preemption, so the
# process that waits for the notice would only cost time at the start. Nobody reads metrics and task events where Ray's dashboard
# is off, and they cost 2 % of two cores. With few workers a health check more often than every 2 s is cheap, and finds a dead
# worker sooner. Ray Train cannot use the processes that Ray starts for a driver's first tasks (`nev.cluster.warm_up`).
LOCAL_ENVIRONMENT = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.25",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_enable_metrics_collection": "0",
    "RAY_task_events_report_interval_ms": "0",
    "RAY_prestart_worker_first_driver": "0",
}
# Set for all processes of a cluster named by RAY_ADDRESS, for `may_grow` in the trials of a sweep: only the driver of a submitted
# job has RAY_ADDRESS.
REMOTE_ENVIRONMENT = {"NEV_CLUSTER": "1"}
RAY_STOP_WAIT_S = 3.0  # Ray's default


def connect() -> None:
    """Join the cluster of `RAY_ADDRESS` (set inside a submitted job), or start one here. Ray's messages stay in its logs."""
    quiet()  # before the import of Ray, which asks for ipywidgets in a notebook
    import ray

    if ray.is_initialized():
        return
    quiet_worker_deaths()
    address = os.environ.get("RAY_ADDRESS")
    environment = ENVIRONMENT | (REMOTE_ENVIRONMENT if address else {})
    with set_defaults({} if address else LOCAL_ENVIRONMENT):
        ray.init(
            address=address or "local",  # not another cluster that runs on this machine
            num_cpus=None if address else os.cpu_count(),
            include_dashboard=None if address else False,
            log_to_driver=False,
            logging_level=logging.ERROR,
            runtime_env={"env_vars": choose_variables(environment)},
        )
    quiet_data_logger()


def choose_variables(defaults: Mapping[str, str]) -> dict[str, str]:
    """The variables for Ray's processes: this process's own where it has them, else `defaults`.

    Those that came with the job (`ray job submit --runtime-env-json`) are left out: Ray hands them on, and takes none twice.
    """
    job = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}"))
    given = (job.get("runtime_env") or {}).get("env_vars") or {}
    return {name: os.environ.get(name, value) for name, value in defaults.items() if name not in given}


def seconds_to_stop() -> float | None:
    """Time that `ray job stop` gives this process between SIGTERM and SIGKILL, in seconds; None outside a submitted job."""
    if "RAY_JOB_CONFIG_JSON_ENV_VAR" not in os.environ:
        return None
    return float(os.environ.get("RAY_JOB_STOP_WAIT_TIME_S", RAY_STOP_WAIT_S))


@contextmanager
def set_defaults(variables: Mapping[str, str]) -> Iterator[None]:
    """Set the variables of the environment that are unset, for the body of a `with` and the processes that start in it."""
    added = variables.keys() - os.environ.keys()
    os.environ.update({name: variables[name] for name in added})
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)


def may_grow() -> bool:
    """Whether nodes may join the cluster: always, but for a cluster that `connect` has started on this machine."""
    return bool(os.environ.get("RAY_ADDRESS") or os.environ.get("NEV_CLUSTER"))


def cluster_gpus() -> int:
    """Number of GPUs that the connected cluster has now, or that a cluster started by `connect` would have."""
    return int(_resources().get("GPU", 0))


def cluster_cpus() -> int:
    """Number of CPUs that the connected cluster has now, or that a cluster started by `connect` would have; at least 1."""
    return max(1, count_cpus())


def count_cpus() -> int:
    """Number of CPUs that the connected cluster has now; 0 for a cluster whose nodes are yet to come."""
    return int(_resources().get("CPU", 0))


def cluster_nodes() -> int:
    """Number of nodes of the connected cluster that are alive."""
    import ray

    return sum(bool(node["Alive"]) for node in ray.nodes())  # type: ignore[no-untyped-call]


def _resources() -> dict[str, float]:
    import ray

    if not ray.is_initialized():
        import torch

        return {"CPU": os.cpu_count() or 1, "GPU": torch.cuda.device_count()}
    resources: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
    return resources
