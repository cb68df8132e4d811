"""The driver's callback of Tune: a line of progress as trials start and end, and results of trials that ASHA ended early."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from ray import tune

from nev.cluster.ray_internals import first_cause
from nev.common.errors import NevError
from nev.common.progress import ProgressCallback
from nev.runs.folder import run_folder
from nev.runs.metrics_log import load_mlflow_run_id
from nev.sweep.config import Sweep
from nev.sweep.results import SAMPLES, TrialResult, early_end_rule, save_result
from nev.sweep.trials import Trial


class SweepProgress(tune.Callback):
    """The progress of a sweep. A storage error here ends neither a trial nor the sweep.

    count: number of trials that this start of the sweep runs.
    errors: cause of each failed trial, by the trial's name.
    """

    def __init__(self, sweep: Sweep, trials: Sequence[Trial], count: int, show: ProgressCallback) -> None:
        self._sweep, self._trials, self._count, self._show = sweep, trials, count, show
        self._running, self._ended, self._best = 0, 0, None
        self.errors: dict[str, str] = {}

    def __getstate__(self) -> dict[str, Any]:
        """An empty state: Tune saves its callbacks for a restore of its own, which nev does not use."""
        return {}

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Count a trial that has started."""
        self._running += 1
        self._show_progress()

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Count a trial that has finished, or that ASHA has ended: then save its result, since its process has exited."""
        reported, metric = trial.last_result, self._sweep.metrics[0]
        if reported.get(SAMPLES, self._sweep.samples) < self._sweep.samples:
            planned = self._planned(trial)
            try:
                self._save_early(planned, reported)
            except (NevError, OSError) as error:  # the same sweep runs this trial again
                self.errors[planned.name] = f"ended early, and its result could not be saved: {cause_in_a_line(error)}"
        if metric in reported:
            best = max if self._sweep.mode == "max" else min
            self._best = reported[metric] if self._best is None else best(self._best, reported[metric])
        self._end()

    def _save_early(self, trial: Trial, reported: dict[str, Any]) -> None:
        result = TrialResult(
            name=trial.name,
            arm=trial.arm,
            seed=trial.seed,
            metrics=finite_metrics(reported),
            samples=reported[SAMPLES],
            ended_early=early_end_rule(self._sweep),
            run_id=load_mlflow_run_id(run_folder(trial.experiment)) or "",
            seconds=reported.get("time_total_s", 0.0),
        )
        save_result(trial, result)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Count a trial that has failed; other trials go on. `explain` adds the cause later, if the trial's process started."""
        self.errors[self._planned(trial).name] = "its process did not start, or was killed; see Ray's logs"
        self._end()

    def explain(self, number: int, error: BaseException) -> None:
        """Record the cause of a failed trial. number: position in `trials`."""
        self.errors[self._trials[number].name] = cause_in_a_line(error)

    def _planned(self, trial: Any) -> Trial:
        return self._trials[int(trial.config["number"])]

    def _end(self) -> None:
        self._running -= 1
        self._ended += 1
        self._show_progress()

    def _show_progress(self) -> None:
        best = "" if self._best is None else f", best {self._sweep.metrics[0]} {self._best:.3f}"
        failed = f", {len(self.errors)} failed" if self.errors else ""
        self._show("trials", self._ended, self._count, f"{self._running} running{failed}{best}")


def finite_metrics(reported: dict[str, Any]) -> dict[str, float]:
    """The metrics of a report (`group/name`) that are finite. Tune's additions to the report are left out."""
    floats = {name: value for name, value in reported.items() if isinstance(value, float) and "/" in name}
    return {name: value for name, value in floats.items() if math.isfinite(value)}


def cause_in_a_line(error: BaseException) -> str:
    """The first cause of an error, in one line."""
    return " ".join(first_cause(error).split())
