"""Connecting to Ray quietly: the cluster that `RAY_ADDRESS` names, or one on this machine."""

from __future__ import annotations

import logging
import os
import warnings

# Ray Train must not change the working folder, and tqdm bars of libraries must not fight with the one live line. After a node is
# lost, its elastic policy counts that node for up to 20 s more, and waits for workers there: not the 60 s of its default. A
# process of Tune that takes one trial after another may be some seconds with the end of the last one.
ENVIRONMENT = {
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_TRAIN_V2_ENABLED": "1",
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "15",
    "TUNE_FUNCTION_THREAD_TIMEOUT_S": "60",
    "TQDM_DISABLE": "1",
    "MLFLOW_LOGGING_LEVEL": "CRITICAL",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}
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
    _quiet_deaths()
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
    _quiet_data()


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


def quiet() -> None:
    """Keep the libraries off this process's console: what they have to say at error level still comes through.

    MLflow's errors are exceptions as well, which are caught and told where they matter.
    """
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    for name in ("ray", "alembic", "httpx", "transformers"):
        logging.getLogger(name).setLevel(logging.ERROR)
    logging.getLogger("mlflow").setLevel(logging.CRITICAL)
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(ray|mlflow|timm|transformers)")


def _quiet_deaths() -> None:
    """Of every process or node that dies, a driver prints pages (Ray 2.60, `log_to_driver` or not). Ray's logs have them, too."""
    import ray._private.worker as driver

    driver.print_to_stdstream = lambda data, ignore_prefix: logging.getLogger("ray").debug("%s", data.get("lines"))


def _quiet_data() -> None:
    """Ray Data's logger writes INFO to the console by a handler of its own; its log file keeps everything."""
    import ray.data  # it gives its logger that handler when it is imported: later, it would speak up again

    # Ray 2.60 has no other way to bound a task's retries (`max_retries`), and says that this one will go.
    warnings.filterwarnings("ignore", message="`ray_remote_args` is deprecated")
    for handler in logging.getLogger(ray.data.__name__).handlers:
        if handler.name == "console":
            handler.setLevel(logging.ERROR)
