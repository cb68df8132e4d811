"""What the driver does as Tune's trials start and end: a line of how far it is, and records of those ended early."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from ray import tune

from nev.errors import NevError
from nev.progress import Tell
from nev.sweep.config import Sweep
from nev.sweep.results import SAMPLES, TrialResult, judged_by, keep
from nev.sweep.trials import Trial
from nev.train.journal import kept_run_id
from nev.train.output import run_folder


class Follower(tune.Callback):
    """Of one sweep; count: how many trials are run now."""

    def __init__(self, sweep: Sweep, trials: Sequence[Trial], count: int, tell: Tell) -> None:
        self._sweep, self._trials, self._count, self._tell = sweep, trials, count, tell
        self._ended, self._failed, self._best = 0, 0, None

    def __getstate__(self) -> dict[str, Any]:
        """Nothing: Tune writes its callbacks down for a restore of its own, which nev does not use."""
        return {}

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """One more runs."""
        self._say(trials)

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
                ended_early=judged_by(self._sweep),
                run_id=kept_run_id(run_folder(own.experiment)) or "",
                seconds=found.get("time_total_s", 0.0),
            )
            keep(own, early)
        if metric in found:
            best = max if self._sweep.mode == "max" else min
            self._best = found[metric] if self._best is None else best(self._best, found[metric])
        self._ended += 1
        self._say(trials)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """One has failed; the others go on. What ended it is told with the results, when Tune knows it."""
        self._ended += 1
        self._failed += 1
        self._say(trials)

    def _of(self, trial: Any) -> Trial:
        return self._trials[int(trial.config["number"])]

    def _say(self, started: list[Any]) -> None:
        running = sum(one.status == "RUNNING" for one in started)
        best = "" if self._best is None else f", best {self._sweep.metrics[0]} {self._best:.3f}"
        failed = f", {self._failed} failed" if self._failed else ""
        self._tell("trials", self._ended, self._count, f"{running} running{failed}{best}")


def numbers(reported: dict[str, Any]) -> dict[str, float]:
    """The finite metrics of a report (`group/name`), without what Tune adds: a number that is none must not end the sweep."""
    floats = {name: value for name, value in reported.items() if isinstance(value, float) and "/" in name}
    return {name: value for name, value in floats.items() if math.isfinite(value)}


def innermost_line(error: BaseException) -> str:
    """What ended a trial, in a line."""
    while (deeper := getattr(error, "cause", None) or error.__cause__) is not None:
        error = deeper
    lines = str(error).strip().splitlines() or [repr(error)]
    return lines[0] if isinstance(error, NevError) else lines[-1]
