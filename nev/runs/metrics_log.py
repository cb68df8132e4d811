"""A run's own record of its numbers: what MLflow did not get before a process died is sent from here when the run goes on.

<run>/metrics/step-00000500.jsonl   the points since the checkpoint before, written just before that of step 500
<run>/metrics/validation-00000500.jsonl   what the checkpoint of step 500 scored, where it was validated afterwards
<run>/mlflow.json                   which MLflow run shows them
"""

from __future__ import annotations

import json
import re
import time
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from nev.storage.files import PARALLEL_REQUESTS, filesystem, join, list_files, storage_errors_as, write_atomic


class MetricPoint(NamedTuple):
    """Metrics of a step. time: UNIX, milliseconds, as MLflow has them."""

    step: int
    time: int
    metrics: dict[str, float]


def make_point(step: int, metrics: dict[str, float]) -> MetricPoint:
    """A point of now."""
    return MetricPoint(step, int(time.time() * 1000), metrics)


def write_points(run: str, done: int, points: list[MetricPoint]) -> None:
    """Keep the points up to the checkpoint of step `done`; those of an attempt that reached it before are replaced."""
    location = join(run, "metrics", f"step-{done:08d}.jsonl")
    with storage_errors_as(location, "written"):
        write_atomic(location, "".join(json.dumps(one) + "\n" for one in points).encode())


def write_validation(run: str, scored: MetricPoint) -> None:
    """Keep what a checkpoint scored after it was written."""
    write_atomic(join(run, "metrics", f"validation-{scored.step:08d}.jsonl"), (json.dumps(scored) + "\n").encode())


def read_points(run: str, last: int) -> list[MetricPoint]:
    """All points of a run up to the checkpoint of step `last`. Raises StorageError.

    A step that was repeated may be there twice.
    """
    folder = join(run, "metrics")
    with storage_errors_as(folder, "listed"):
        files = [re.fullmatch(r"(?:step|validation)-(\d+)\.jsonl", name) for name in list_files(folder)]
    names = [file[0] for file in files if file and int(file[1]) <= last]
    with storage_errors_as(folder, "read"), ThreadPoolExecutor(PARALLEL_REQUESTS) as pool:
        fs, path = filesystem(folder)
        contents = list(pool.map(lambda name: fs.cat_file(f"{path}/{name}"), names))
    return [MetricPoint(*json.loads(line)) for content in contents for line in content.splitlines()]


def load_mlflow_run_id(run: str) -> str | None:
    """The MLflow run that shows this run, or None for one that has not begun."""
    fs, path = filesystem(join(run, "mlflow.json"))
    with storage_errors_as(join(run, "mlflow.json"), "read"):
        return str(json.loads(fs.cat_file(path))["run_id"]) if fs.exists(path) else None


def save_mlflow_run_id(run: str, run_id: str) -> None:
    """Remember it, before the first step: a run that dies before its first checkpoint is the same one in MLflow, too."""
    with storage_errors_as(join(run, "mlflow.json"), "written"):
        write_atomic(join(run, "mlflow.json"), json.dumps({"run_id": run_id}).encode())
