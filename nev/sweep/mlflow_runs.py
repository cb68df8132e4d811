"""A sweep in MLflow: a parent run with the definition, the table and the figures, and a child for each trial."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress

from nev.config import Experiment
from nev.sweep.config import Sweep
from nev.sweep.results import Outcome
from nev.sweep.trials import Trial
from nev.tracking import Tracker, open_run
from nev.train.journal import kept_run_id
from nev.train.output import run_folder


def open_parent(sweep: Sweep, first: Experiment, uri: str) -> Tracker:
    """The sweep's own run: the one that MLflow has of its name and output, or a new one."""
    from mlflow import MlflowClient

    tags = {"nev.kind": "sweep", "nev.sweep": sweep.name, "nev.output": first.output}
    client = MlflowClient(tracking_uri=uri)
    known = client.get_experiment_by_name(first.tracking.experiment)
    asked = f"tags.`nev.kind` = 'sweep' and tags.`nev.sweep` = '{sweep.name}'"
    runs = client.search_runs([known.experiment_id], asked) if known else []
    own = next((run.info.run_id for run in runs if run.data.tags.get("nev.output") == first.output), None)
    return open_run(uri, first.tracking.experiment, sweep.name, sweep, tags, first.output, run_id=own)


def publish(outcome: Outcome, parent: Tracker, files: Sequence[str]) -> bool:
    """Give the parent its files, and each finished trial's run what it lacks: its parent, its arm as tags, all that was measured.

    False where MLflow does not take it.
    """
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    client = MlflowClient(tracking_uri=parent.uri)
    try:
        for file in files:
            parent.artifact(file)
        for result in outcome.results:
            run = client.get_run(result.run_id)
            if run.data.tags.get("nev.seed") and run.data.tags.get("mlflow.parentRunId") == parent.run_id:
                continue
            child = Tracker(parent.uri, result.run_id)
            last = max((point.step for point in client.get_metric_history(result.run_id, "loss")), default=0)
            child.log(last, {key: value for key, value in result.metrics.items() if key not in run.data.metrics})
            arm = {f"nev.arm.{axis}": value for axis, value in result.arm}
            child.tag_later({**arm, "mlflow.parentRunId": parent.run_id, "nev.seed": str(result.seed)})
            child.flush()
    except (MlflowException, OSError):
        return False
    return True


def close_children(trials: Sequence[Trial], uri: str) -> None:
    """No trial runs any more: those that MLflow takes for running were ended. Where it is away, the next start does this."""
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    client = MlflowClient(tracking_uri=uri)
    for trial in trials:
        run_id = kept_run_id(run_folder(trial.experiment))
        with suppress(MlflowException):
            if run_id and client.get_run(run_id).info.status == "RUNNING":
                Tracker(uri, run_id).finish("KILLED")
