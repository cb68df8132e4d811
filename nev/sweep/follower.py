"""What the driver does as Tune's trials start and end: a line of how far it is, and records of those ended early."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from ray import tune

from nev.common.errors import NevError
from nev.common.progress import ProgressCallback
from nev.runs.folder import run_folder
from nev.runs.metrics_log import load_mlflow_run_id
from nev.sweep.config import Sweep
from nev.sweep.results import SAMPLES, TrialResult, main_metric, save_result
from nev.sweep.trials import Trial


class SweepProgress(tune.Callback):
    """Of one sweep; count: how many trials are run now. errors: what ended each one that has failed, by its name."""

    def __init__(self, sweep: Sweep, trials: Sequence[Trial], count: int, tell: ProgressCallback) -> None:
        self._sweep, self._trials, self._count, self._tell = sweep, trials, count, tell
        self._running, self._ended, self._best = 0, 0, None
        self.errors: dict[str, str] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Nothing: Tune writes its callbacks down for a restore of its own, which nev does not use."""
        return {}

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """One more runs."""
        self._running += 1
        self._say()

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """One is done, or ASHA has ended it, and then nobody else knows how far it came."""
        found, own, metric = trial.last_result, self._of(trial), self._sweep.metrics[0]
        if found.get(SAMPLES, self._sweep.samples) < self._sweep.samples:
            early = TrialResult(
                name=own.name,
                arm=own.arm,
                seed=own.seed,
                metrics=numbers(found),
                samples=found[SAMPLES],
                ended_early=main_metric(self._sweep),
                run_id=load_mlflow_run_id(run_folder(own.experiment)) or "",
                seconds=found.get("time_total_s", 0.0),
            )
            save_result(own, early)
        if metric in found:
            best = max if self._sweep.mode == "max" else min
            self._best = found[metric] if self._best is None else best(self._best, found[metric])
        self._end()

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """One has failed; the others go on. What ended it is known with the results, if its process began at all."""
        self.errors[self._of(trial).name] = "its process did not come up, or was killed; Ray's logs say more"
        self._end()

    def explain(self, number: int, error: BaseException) -> None:
        """What ended the trial of this number."""
        self.errors[self._trials[number].name] = innermost(error)

    def _of(self, trial: Any) -> Trial:
        return self._trials[int(trial.config["number"])]

    def _end(self) -> None:
        self._running -= 1
        self._ended += 1
        self._say()

    def _say(self) -> None:
        best = "" if self._best is None else f", best {self._sweep.metrics[0]} {self._best:.3f}"
        failed = f", {len(self.errors)} failed" if self.errors else ""
        self._tell("trials", self._ended, self._count, f"{self._running} running{failed}{best}")


def numbers(reported: dict[str, Any]) -> dict[str, float]:
    """The finite metrics of a report (`group/name`), without what Tune adds: a number that is none must not end the sweep."""
    floats = {name: value for name, value in reported.items() if isinstance(value, float) and "/" in name}
    return {name: value for name, value in floats.items() if math.isfinite(value)}


def innermost(error: BaseException) -> str:
    """What ended a trial, in a line: all that nev says, of others the last line."""
    while (deeper := getattr(error, "cause", None) or error.__cause__) is not None:
        error = deeper
    lines = [line.strip() for line in str(error).strip().splitlines()] or [repr(error)]
    return " ".join(lines) if isinstance(error, NevError) else lines[-1]
