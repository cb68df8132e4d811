"""Connecting to Ray quietly: the cluster that `RAY_ADDRESS` names, or one on this machine."""

from __future__ import annotations

import logging
import os

from nev.cluster.ray_internals import quiet_data_logger, quiet_worker_deaths
from nev.common.quiet import ENVIRONMENT, quiet

# One machine gets no notice that it will be taken away, so the process that waits for one would only cost its start. Without
# Ray's dashboard nobody reads its metrics and task events, which every process would gather and send: 2 % of two cores. Its few
# workers can be asked more often than every 2 s how they are, so that their end is seen sooner.
LOCAL_ENVIRONMENT = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.25",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_enable_metrics_collection": "0",
    "RAY_task_events_report_interval_ms": "0",
}
# Where RAY_ADDRESS, which a submitted job's driver alone has, named the cluster: what a sweep's trials ask (`may_grow`).
FAR_ENVIRONMENT = {"NEV_CLUSTER": "1"}


def connect() -> None:
    """Join the cluster of `RAY_ADDRESS` (set inside a submitted job), or start one here. Ray's chatter stays in its logs."""
    import ray

    if ray.is_initialized():
        return
    quiet()
    quiet_worker_deaths()
    address = os.environ.get("RAY_ADDRESS")
    if not address:
        os.environ.update(LOCAL_ENVIRONMENT)
    handed = ENVIRONMENT | (FAR_ENVIRONMENT if address else {})
    ray.init(
        address=address or "local",  # never a cluster that happens to run here
        num_cpus=None if address else os.cpu_count(),
        include_dashboard=None if address else False,
        log_to_driver=False,
        logging_level=logging.ERROR,
        runtime_env={"env_vars": {name: os.environ.get(name, value) for name, value in handed.items()}},
    )
    quiet_data_logger()


def may_grow() -> bool:
    """Whether the cluster is another than the one that `connect` starts here, so that more may come to it."""
    return bool(os.environ.get("RAY_ADDRESS") or os.environ.get("NEV_CLUSTER"))


def cluster_gpus() -> int:
    """GPUs of the connected cluster, as it stands now, or of the one that `connect` would start here."""
    return int(_resources().get("GPU", 0))


def cluster_cpus() -> int:
    """CPUs of the same: one at least."""
    return max(1, int(_resources().get("CPU", 0)))


def cluster_nodes() -> int:
    """Nodes of the connected cluster that are alive."""
    import ray

    return sum(bool(node["Alive"]) for node in ray.nodes())  # type: ignore[no-untyped-call]


def _resources() -> dict[str, float]:
    import ray

    if not ray.is_initialized():
        import torch

        return {"CPU": os.cpu_count() or 1, "GPU": torch.cuda.device_count()}
    resources: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
    return resources
