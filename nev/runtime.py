"""Connecting to Ray quietly: the cluster that `RAY_ADDRESS` names, or one on this machine."""

from __future__ import annotations

import logging
import os
import warnings

import ray


def connect() -> None:
    """Join the cluster of `RAY_ADDRESS` (set inside a submitted job), or start one here. Ray's chatter stays in its logs."""
    if ray.is_initialized():
        return
    quiet()
    address = os.environ.get("RAY_ADDRESS")
    ray.init(
        address=address,
        num_cpus=None if address else os.cpu_count(),
        include_dashboard=None if address else False,
        log_to_driver=False,
        logging_level=logging.ERROR,
        runtime_env=process_env(),
    )


def cluster_gpus() -> int:
    """GPUs of the connected cluster, as it stands now."""
    resources: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
    return int(resources.get("GPU", 0))


def process_env() -> dict[str, dict[str, str]]:
    """The runtime environment of nev's processes: Ray Train's working-folder change off, no usage warnings."""
    return {"env_vars": {"RAY_CHDIR_TO_TRIAL_DIR": "0", "RAY_TRAIN_V2_ENABLED": "1", "TQDM_DISABLE": "1"}}


def quiet() -> None:
    """Keep Ray's, MLflow's and the hub's loggers off the console of this process."""
    os.environ.setdefault("RAY_CHDIR_TO_TRIAL_DIR", "0")
    os.environ.setdefault("RAY_TRAIN_V2_ENABLED", "1")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    for name in ("ray", "ray.data", "ray.train", "ray.tune", "mlflow", "alembic", "httpx", "transformers"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(ray|mlflow|timm|transformers)")
