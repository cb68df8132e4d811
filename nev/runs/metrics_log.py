"""A run's own record of its metrics. What MLflow had not got when a process died is sent from here when the run continues.

<run>/metrics/step-00000500.jsonl         metrics since the checkpoint before, written just before the checkpoint of step 500
<run>/metrics/validation-00000500.jsonl   metrics of the checkpoint of step 500, where it was validated beside training
<run>/mlflow.json                         id of the MLflow run
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import NamedTuple

from nev.storage.files import (
    PARALLEL_REQUESTS,
    StorageError,
    filesystem,
    join,
    list_files,
    storage_errors_as,
    write_atomic,
)


class MetricPoint(NamedTuple):
    """Metrics of a step, by name. time: UNIX, in milliseconds, as in MLflow."""

    step: int
    time: int
    metrics: dict[str, float]


def make_point(step: int, metrics: dict[str, float]) -> MetricPoint:
    """Metrics with the present time."""
    return MetricPoint(step, int(time.time() * 1000), metrics)


def write_points(run: str, done: int, points: list[MetricPoint]) -> None:
    """Write the metrics since the checkpoint before, for the checkpoint of step `done`. Replaces those of an earlier attempt."""
    location = join(run, "metrics", f"step-{done:08d}.jsonl")
    with storage_errors_as(location, "written"):
        write_atomic(location, "".join(json.dumps(point) + "\n" for point in points).encode())


def write_validation(run: str, point: MetricPoint) -> None:
    """Write the metrics of a checkpoint that was validated beside training. Raises what storage raises."""
    write_atomic(join(run, "metrics", f"validation-{point.step:08d}.jsonl"), (json.dumps(point) + "\n").encode())


def read_points(run: str, last: int) -> list[MetricPoint]:
    """All metrics of a run up to the checkpoint of step `last`. A step that was repeated may be there twice.

    Raises StorageError for a file that cannot be read or is damaged.
    """
    folder = join(run, "metrics")
    with storage_errors_as(folder, "listed"):
        matches = [re.fullmatch(r"(?:step|validation)-(\d+)\.jsonl", name) for name in list_files(folder)]
    names = [match[0] for match in matches if match and int(match[1]) <= last]
    with storage_errors_as(folder, "read"), ThreadPoolExecutor(PARALLEL_REQUESTS) as pool:
        fs, path = filesystem(folder)
        contents = list(pool.map(lambda name: fs.cat_file(f"{path}/{name}"), names))
    points = []
    for name, content in zip(names, contents, strict=True):
        with damage_as_error(
            join(folder, name), "the metrics of its steps are then missing from curves and from MLflow"
        ):
            points += [_parse_point(line) for line in content.splitlines()]
    return points


def _parse_point(line: bytes) -> MetricPoint:
    step, time_ms, metrics = json.loads(line)
    return MetricPoint(int(step), int(time_ms), {str(name): float(value) for name, value in metrics.items()})


def load_mlflow_run_id(run: str) -> str | None:
    """The id of the MLflow run; None before the run's first start. Raises StorageError for a damaged file."""
    location = join(run, "mlflow.json")
    fs, path = filesystem(location)
    with storage_errors_as(location, "read"):
        content = fs.cat_file(path) if fs.exists(path) else None
    if content is None:
        return None
    with damage_as_error(location, "the next start of the run then begins a new MLflow run"):
        return str(json.loads(content)["run_id"])


def save_mlflow_run_id(run: str, run_id: str) -> None:
    """Write the id of the MLflow run, before the first step: a restart before the first checkpoint keeps to that MLflow run."""
    with storage_errors_as(join(run, "mlflow.json"), "written"):
        write_atomic(join(run, "mlflow.json"), json.dumps({"run_id": run_id}).encode())


@contextmanager
def damage_as_error(location: str, loss: str) -> Iterator[None]:
    """Raise StorageError where the body cannot parse the file at `location`. loss: the consequence of removing the file."""
    try:
        yield
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise StorageError(
            f"{location} is damaged ({type(error).__name__}: {error}). Put it back from a copy, or remove it: {loss}."
        ) from error
