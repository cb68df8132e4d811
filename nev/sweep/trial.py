"""One trial of a sweep, in its own process: an experiment from start to end as a child run, with every metric."""

from __future__ import annotations

import math
import time
from typing import Any

from rich.console import Console

from nev.config.base import ConfigError
from nev.sweep.config import Sweep
from nev.sweep.mlflow_runs import make_tags
from nev.sweep.results import SAMPLES, TrialResult, save_result
from nev.sweep.suite_data import SuiteData
from nev.sweep.trials import Trial, compute_steps
from nev.train.experiment import run_experiment


def run_trial(config: dict[str, Any], shared: dict[str, Any]) -> None:
    """The Tune function: train, score, save the result in the run's folder, and report it.

    config: `number`, the position of the trial in `shared["trials"]`.
    shared: the sweep, its trials, the suite's data, and the id of the parent run.

    With ASHA every validation but the last is reported too. Tune may end this process at such a report.
    """
    from ray import tune

    from nev.common.quiet import quiet

    quiet()
    sweep: Sweep = shared["sweep"]
    suite: SuiteData = shared["suite"]
    trial: Trial = shared["trials"][config["number"]]
    experiment, start = trial.experiment, time.monotonic()

    def report_validation(step: int, metrics: dict[str, float]) -> None:
        seen = step * experiment.train.global_batch
        if sweep.metrics[0] in metrics and seen < sweep.samples:
            tune.report({**metrics, SAMPLES: seen})  # raises SystemExit where Tune ends this process

    summary = run_experiment(
        experiment,
        Console(quiet=True),
        tags=make_tags(trial, shared["parent"]),
        on_metrics=report_validation if sweep.asha else None,
    )
    measured = summary.metrics | score_suite(summary.checkpoint, sweep, suite.root)
    metrics = {name: value for name, value in measured.items() if math.isfinite(value)}
    if missing := [name for name in sweep.metrics if name not in metrics]:
        values = [f"{name} ({measured.get(name, 'not measured')})" for name in missing]
        raise ConfigError(f"metrics: {', '.join(values)}. This trial has {', '.join(sorted(metrics))}")
    result = TrialResult(
        name=trial.name,
        arm=trial.arm,
        seed=trial.seed,
        metrics=metrics,
        samples=compute_steps(experiment) * experiment.train.global_batch,
        suite=suite.digest,
        run_id=summary.mlflow_run_id,
        seconds=time.monotonic() - start,
    )
    save_result(trial, result)
    tune.report({**{name: metrics[name] for name in sweep.metrics}, SAMPLES: sweep.samples})


def score_suite(checkpoint: str, sweep: Sweep, suite_root: str) -> dict[str, float]:
    """The metrics of a checkpoint on the sweep's suite, with data at `suite_root`, by `TASK/METRIC`; none without a suite."""
    from nev.eval.evaluate_suite import evaluate_suite

    if not sweep.suite:
        return {}
    result, _ = evaluate_suite(checkpoint, sweep.suite, Console(quiet=True), data=suite_root)
    return {f"{task.name}/{name}": value for task in result.tasks for name, value in task.metrics.items()}
