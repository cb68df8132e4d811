"""A run's own record of its numbers: what MLflow did not get before a process died is sent from here when the run goes on.

<run>/metrics/step-00000500.jsonl   the points since the checkpoint before, written just before that of step 500
<run>/mlflow.json                   which MLflow run shows them
"""

from __future__ import annotations

import json
import re
import time
from typing import NamedTuple

from nev.data.storage import files_below, filesystem, join, naming, write_whole


class Point(NamedTuple):
    """Metrics of a step. time: UNIX, milliseconds, as MLflow has them."""

    step: int
    time: int
    metrics: dict[str, float]


def point(step: int, metrics: dict[str, float]) -> Point:
    """A point of now."""
    return Point(step, int(time.time() * 1000), metrics)


def write_points(run: str, done: int, points: list[Point]) -> None:
    """Keep the points up to the checkpoint of step `done`; those of an attempt that reached it before are replaced."""
    location = join(run, "metrics", f"step-{done:08d}.jsonl")
    with naming(location, "written"):
        write_whole(location, "".join(json.dumps(one) + "\n" for one in points).encode())


def read_points(run: str, last: int) -> list[Point]:
    """All points of a run up to the checkpoint of step `last`, in order. Raises StorageError."""
    folder = join(run, "metrics")
    with naming(folder, "listed"):
        names = [
            name
            for name in files_below(folder)
            if (found := re.fullmatch(r"step-(\d+)\.jsonl", name)) and int(found[1]) <= last
        ]
    points = []
    for name in names:
        fs, path = filesystem(join(folder, name))
        with naming(join(folder, name), "read"):
            points += [Point(*json.loads(line)) for line in fs.cat_file(path).splitlines()]
    return points


def kept_run_id(run: str) -> str | None:
    """The MLflow run that shows this run, or None for one that has not begun."""
    fs, path = filesystem(join(run, "mlflow.json"))
    with naming(join(run, "mlflow.json"), "read"):
        return str(json.loads(fs.cat_file(path))["run_id"]) if fs.exists(path) else None


def keep_run_id(run: str, run_id: str) -> None:
    """Remember it, before the first step: a run that dies before its first checkpoint is the same one in MLflow, too."""
    with naming(join(run, "mlflow.json"), "written"):
        write_whole(join(run, "mlflow.json"), json.dumps({"run_id": run_id}).encode())
