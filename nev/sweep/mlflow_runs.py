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

MAX_LISTED = 3  # errors in one message
PER_RUN_ERRORS = ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE")  # codes of errors that concern one run alone
INVALID_IN_TAG = r"[^\w\-. /:]"  # characters that MLflow refuses in the name of a tag


def open_parent(sweep: Sweep, definition: str, first: Experiment, uri: str) -> Tracker:
    """Open the parent run of a sweep: the run that MLflow has for this definition and output, or a new run."""
    from mlflow import MlflowClient

    tags = {"nev.kind": "sweep", "nev.sweep": sweep.name, "nev.definition": definition, "nev.output": first.output}
    client = MlflowClient(tracking_uri=uri)
    known = client.get_experiment_by_name(first.tracking.experiment)
    query = f"tags.`nev.kind` = 'sweep' and tags.`nev.definition` = '{definition}'"
    runs = client.search_runs([known.experiment_id], query) if known else []
    run_id = next((run.info.run_id for run in runs if run.data.tags.get("nev.output") == first.output), None)
    return open_run(uri, first.tracking.experiment, sweep.name, sweep, tags, first.output, run_id=run_id)


def publish(outcome: Outcome, parent: Tracker, files: Sequence[str]) -> str:
    """Log the files to the parent, and to the run of each finished trial its missing tags (parent, arm) and metrics.

    Returns the errors of MLflow in one line. Empty where MLflow has everything.
    """
    from mlflow.exceptions import MlflowException

    errors = []
    try:
        for file in files:
            parent.artifact(file)
        for result in outcome.results:
            try:
                _complete(result, parent)
            except MlflowException as error:
                if error.error_code not in PER_RUN_ERRORS:
                    raise
                errors.append(f"{result.name}: {error}")
    except (MlflowException, OSError) as error:  # MLflow does not answer: the next run would only wait for it too
        errors.append(str(error))
    return "; ".join(errors[:MAX_LISTED] + [f"{len(errors) - MAX_LISTED} more"] * (len(errors) > MAX_LISTED))


def make_tags(trial: Trial | TrialResult, parent: str) -> dict[str, str]:
    """The tags of a trial's run: parent run, seed, and the arm by its axes."""
    arm = {f"nev.arm.{re.sub(INVALID_IN_TAG, '_', axis)}": value for axis, value in trial.arm}
    return {**arm, "mlflow.parentRunId": parent, "nev.seed": str(trial.seed)}


def _complete(result: TrialResult, parent: Tracker) -> None:
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=parent.uri)
    run = client.get_run(result.run_id)
    child = Tracker(parent.uri, result.run_id)
    if missing := {key: value for key, value in result.metrics.items() if key not in run.data.metrics}:
        last = max((point.step for point in client.get_metric_history(result.run_id, "loss")), default=0)
        child.log(last, missing)
    tags = make_tags(result, parent.run_id)
    if not tags.items() <= run.data.tags.items():
        child.tag_later(tags)
    child.flush()


def close_children(trials: Sequence[Trial], uri: str) -> None:
    """Mark the runs of trials that MLflow still lists as running as killed. Call this when no trial runs.

    Where MLflow does not answer, the next start of the sweep marks them.
    """
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    client = MlflowClient(tracking_uri=uri)
    for trial in trials:
        run_id = load_mlflow_run_id(run_folder(trial.experiment))
        with suppress(MlflowException):
            if run_id and client.get_run(run_id).info.status == "RUNNING":
                Tracker(uri, run_id).finish("KILLED")
