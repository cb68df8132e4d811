"""nev as a user runs it: `pipelines/train.py` on a Ray of its own, without validation, rates read from its MLflow run."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import NamedTuple

from benchmarks.contestants.processes import BenchmarkFailed, run_script, warm_up_steps
from nev.config.experiment import Experiment
from nev.config.file import to_yaml


class JobRates(NamedTuple):
    """What a job logged of itself.

    images_per_s: after the warm-up, waiting for data included; images_per_s_from_start: from the moment when the training
    processes ask for their first block; data_wait_share: of the time after the warm-up, on rank 0.
    """

    images_per_s: float
    images_per_s_from_start: float
    data_wait_share: float


def ray_job(config: Experiment, steps: int) -> JobRates:
    """Train `steps` steps of `config` (paths absolute, no validation) and read the rates. Raises BenchmarkFailed."""
    from nev.runs.folder import run_folder
    from nev.runs.metrics_log import load_mlflow_run_id
    from nev.runs.tracking import Tracker, tracking_uri

    with tempfile.TemporaryDirectory(prefix="nev-bench-") as folder:
        train = config.train.model_copy(update={"log_every": max(1, steps // 20)})
        config = config.model_copy(update={"output": folder, "train": train})
        Path(folder, "config.yaml").write_text(to_yaml(config), encoding="utf-8")
        run_script("pipelines/train.py", "--config", f"{folder}/config.yaml", "--stop-after", str(steps))
        run_id = load_mlflow_run_id(run_folder(config))
        if run_id is None:
            raise BenchmarkFailed("pipelines/train.py has begun no run")
        tracker = Tracker(tracking_uri(config.tracking, folder), run_id)
        ends, rates = tracker.history("images_per_s")
        _, waits = tracker.history("data_wait_share")
    return summed(ends, rates, waits, config.train.global_batch, warm_up_steps(steps))


def summed(ends: list[int], rates: list[float], waits: list[float], batch: int, warm_up: int) -> JobRates:
    """One rate from those of the logged windows: window i ends after step `ends[i]` and begins where the one before ended."""
    begins = [0, *ends[:-1]]
    rows = [batch * (end - begin) for begin, end in zip(begins, ends, strict=True)]
    seconds = [count / rate for count, rate in zip(rows, rates, strict=True)]
    steady = [i for i, begin in enumerate(begins) if begin >= warm_up]
    if not steady:
        raise BenchmarkFailed(f"no window was logged after the {warm_up} steps of warm-up: give more --steps")
    time = sum(seconds[i] for i in steady)
    return JobRates(
        images_per_s=sum(rows[i] for i in steady) / time,
        images_per_s_from_start=sum(rows) / sum(seconds),
        data_wait_share=sum(waits[i] * seconds[i] for i in steady) / time,
    )
