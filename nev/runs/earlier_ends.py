"""Earlier ends of a run that was prolonged: what lies beyond the step from which the longer run continues.

<run>/ends/100-steps/checkpoints/   of later steps
<run>/ends/100-steps/metrics/       of later steps
<run>/ends/100-steps/mlflow.json    id of the MLflow run; the longer run begins another, since MLflow cannot remove a point
"""

from __future__ import annotations

import re

from nev.runs.manifest import checkpoint_location, list_steps
from nev.runs.metrics_log import load_mlflow_run_id
from nev.storage.files import join, list_files, move, storage_errors_as


def set_end_aside(run: str, steps: int, after: int) -> str | None:
    """Move all that a run has of later steps than `after` into a folder. Returns the id of its MLflow run, None without one.

    steps: length of the run so far, which names the folder.
    Raises StorageError. A move that was broken off is finished by the next call.
    """
    target = earlier_end(run, steps)
    run_id = load_mlflow_run_id(run)
    if run_id is not None:
        _move(join(run, "mlflow.json"), join(target, "mlflow.json"))
    with storage_errors_as(join(run, "metrics"), "listed"):
        names = list_files(join(run, "metrics"))
    for name in names:
        if (match := re.search(r"-(\d+)\.jsonl$", name)) and int(match[1]) > after:
            _move(join(run, "metrics", name), join(target, "metrics", name))
    for step in reversed(list_steps(run)):
        if step > after:
            _move(checkpoint_location(run, step), checkpoint_location(target, step))
    return run_id or load_mlflow_run_id(target)


def earlier_end(run: str, steps: int) -> str:
    """The folder for the end of a run that was `steps` steps long."""
    return join(run, "ends", f"{steps}-steps")


def _move(source: str, target: str) -> None:
    with storage_errors_as(source, "moved"):
        move(source, target, last="state.json")
