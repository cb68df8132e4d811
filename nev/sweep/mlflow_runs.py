"""A sweep in MLflow: a parent run with the definition, the table and the figures, and a child for each trial."""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import suppress

from nev.config.experiment import Experiment
from nev.runs.folder import run_folder
from nev.runs.metrics_log import load_mlflow_run_id
from nev.runs.tracking import Tracker, open_run
from nev.sweep.config import Sweep
from nev.sweep.results import Outcome, TrialResult
from nev.sweep.trials import Trial

TOLD = 3  # of what MLflow lacks
OF_ONE_RUN = ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE")  # codes of what other runs may not have
REFUSED = r"[^\w\-. /:]"  # in the name of a tag


def open_parent(sweep: Sweep, definition: str, first: Experiment, uri: str) -> Tracker:
    """The sweep's own run: the one that MLflow has of this definition and output, or a new one."""
    from mlflow import MlflowClient

    tags = {"nev.kind": "sweep", "nev.sweep": sweep.name, "nev.definition": definition, "nev.output": first.output}
    client = MlflowClient(tracking_uri=uri)
    known = client.get_experiment_by_name(first.tracking.experiment)
    asked = f"tags.`nev.kind` = 'sweep' and tags.`nev.definition` = '{definition}'"
    runs = client.search_runs([known.experiment_id], asked) if known else []
    own = next((run.info.run_id for run in runs if run.data.tags.get("nev.output") == first.output), None)
    return open_run(uri, first.tracking.experiment, sweep.name, sweep, tags, first.output, run_id=own)


def publish(outcome: Outcome, parent: Tracker, files: Sequence[str]) -> str:
    """Give the parent its files, and each finished trial's run what it lacks: its parent, its arm as tags, all that was measured.

    Returns what MLflow did not take, in a line; empty where it has all.
    """
    from mlflow.exceptions import MlflowException

    lacking = []
    try:
        for file in files:
            parent.artifact(file)
        for result in outcome.results:
            try:
                _complete(result, parent)
            except MlflowException as error:
                if error.error_code not in OF_ONE_RUN:
                    raise
                lacking.append(f"{result.name}: {error}")
    except (MlflowException, OSError) as error:  # it is away: the next run would only wait for it, too
        lacking.append(str(error))
    return "; ".join(lacking[:TOLD] + [f"{len(lacking) - TOLD} more"] * (len(lacking) > TOLD))


def make_tags(trial: Trial | TrialResult, parent: str) -> dict[str, str]:
    """What a trial's run says of its place in the sweep."""
    arm = {f"nev.arm.{re.sub(REFUSED, '_', axis)}": value for axis, value in trial.arm}
    return {**arm, "mlflow.parentRunId": parent, "nev.seed": str(trial.seed)}


def _complete(result: TrialResult, parent: Tracker) -> None:
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=parent.uri)
    run = client.get_run(result.run_id)
    child = Tracker(parent.uri, result.run_id)
    if absent := {key: value for key, value in result.metrics.items() if key not in run.data.metrics}:
        last = max((point.step for point in client.get_metric_history(result.run_id, "loss")), default=0)
        child.log(last, absent)
    tags = make_tags(result, parent.run_id)
    if not tags.items() <= run.data.tags.items():
        child.tag_later(tags)
    child.flush()


def close_children(trials: Sequence[Trial], uri: str) -> None:
    """No trial runs any more: those that MLflow takes for running were ended. Where it is away, the next start does this."""
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    client = MlflowClient(tracking_uri=uri)
    for trial in trials:
        run_id = load_mlflow_run_id(run_folder(trial.experiment))
        with suppress(MlflowException):
            if run_id and client.get_run(run_id).info.status == "RUNNING":
                Tracker(uri, run_id).finish("KILLED")
