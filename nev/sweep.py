"""Ablations on Ray Tune: a grid of experiments at the same number of samples seen; each trial starts its own TorchTrainer."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from nev.config import Experiment
from nev.config_base import ConfigError
from nev.config_file import parse, read_yaml
from nev.sweep_config import Sweep
from nev.tracking import Tracker, open_run, tracking_uri
from nev.train.setup import absolute


@dataclass(frozen=True)
class Trial:
    """One point of the grid with one seed, and the experiment that it is."""

    point: dict[str, Any]
    seed: int
    experiment: Experiment


@dataclass(frozen=True)
class Outcome:
    """What a sweep came to: `values[i]` is the metric of trials[i], None where the trial failed (`errors[i]` says why)."""

    trials: list[Trial]
    values: list[float | None]
    errors: list[str | None]
    figure: Path
    tracking_uri: str


def plan_trials(sweep: Sweep, overrides: list[str]) -> list[Trial]:
    """The grid times the seeds, every experiment validated before the first one runs. Raises ConfigError."""
    raw = read_yaml(sweep.base)
    fixed = [f"{key}={_yaml(value)}" for key, value in sweep.overrides.items()] + overrides
    base = parse(Experiment, raw, fixed, where=sweep.base)
    trials = []
    for values in itertools.product(*sweep.axes.values()):
        point = dict(zip(sweep.axes, values, strict=True))
        for seed in sweep.seeds:
            label = "-".join(f"{key.rpartition('.')[2]}={value}" for key, value in point.items())
            length = {"epochs": None, "steps": None, "samples": sweep.samples}
            settings = {
                "name": f"{sweep.name}-{label}-samples={sweep.samples}-seed={seed}".replace("=", "_"),
                "seed": seed,
                **point,
            }
            settings |= {f"train.{key}": value for key, value in length.items()}
            batch = int(point.get("train.global_batch", base.train.global_batch))
            settings |= _scaled(base, batch, sweep, point)
            chosen = fixed + [f"{key}={_yaml(value)}" for key, value in settings.items()]
            trials.append(Trial(point, seed, parse(Experiment, raw, chosen, where=f"{sweep.base} at {point}")))
    return trials


def _scaled(base: Experiment, batch: int, sweep: Sweep, point: dict[str, Any]) -> dict[str, Any]:
    """Learning rate and warm-up at another batch size; an axis that sets them itself is left alone."""
    ratio = batch / base.train.global_batch
    factor = {"constant": 1.0, "sqrt": math.sqrt(ratio), "linear": ratio}[sweep.lr_rule]
    scaled = {"optim.lr": base.optim.lr * factor, "optim.warmup_steps": round(base.optim.warmup_steps / ratio)}
    return {key: value for key, value in scaled.items() if key not in point}


def run_sweep(sweep: Sweep, overrides: list[str]) -> Outcome:
    """Run every trial on Ray Tune, log a parent run with its children, draw the figure. A failed trial ends only itself."""
    from ray import tune

    from nev.runtime import connect

    trials = [Trial(t.point, t.seed, absolute(t.experiment)) for t in plan_trials(sweep, overrides)]
    first = trials[0].experiment
    if "://" in first.output:
        raise ConfigError(
            f"output = {first.output!r}: Ray Tune's record of a sweep and its figure want a folder. Give one that every "
            "node sees with --set output=/shared/runs; data.train and data.val may be s3://."
        )
    connect()
    output = Path(first.output) / sweep.name
    uri = tracking_uri(first.tracking, first.output)
    parent = open_run(uri, first.tracking.experiment, sweep.name, sweep, {"nev.kind": "sweep"}, first.output)
    setting = {"experiments": [trial.experiment for trial in trials], "parent": parent.run_id, "metric": sweep.metric}
    ok = False
    try:
        tuner = tune.Tuner(
            # The trial itself waits for its TorchTrainer, which reserves what it needs: it must not hold a CPU meanwhile.
            tune.with_resources(tune.with_parameters(run_trial, setting=setting), {"CPU": 0, "memory": 2**20}),
            param_space={"number": tune.grid_search(list(range(len(trials))))},
            tune_config=tune.TuneConfig(
                metric=sweep.metric, mode="max", max_concurrent_trials=sweep.concurrent, num_samples=1
            ),
            run_config=tune.RunConfig(
                name="tune",
                storage_path=str(output),
                verbose=0,
            ),
        )
        grid = tuner.fit()
        found = [grid[place] for place in range(len(grid))]
        results = {result.config["number"]: result for result in found if result.config}
        values = [_value(results.get(number), sweep.metric) for number in range(len(trials))]
        errors = [_error(results.get(number)) for number in range(len(trials))]
        figure = output / f"{sweep.name}.png"
        outcome = Outcome(trials, values, errors, figure, uri)
        if any(value is not None for value in values):
            draw(sweep, outcome)
            parent.artifact(figure)
        log_table(parent, sweep, outcome)
        ok = all(value is not None for value in values)
    finally:
        parent.finish("FINISHED" if ok else "FAILED")
    return outcome


def run_trial(config: dict[str, Any], setting: dict[str, Any]) -> None:
    """The Tune function: one experiment, whole, as a child run; reports its metrics once, at the end."""
    from ray import tune

    from nev.experiment import run_experiment
    from nev.runtime import quiet

    quiet()
    experiment: Experiment = setting["experiments"][config["number"]]
    summary = run_experiment(experiment, Console(quiet=True), parent=setting["parent"])
    if setting["metric"] not in summary.metrics:
        raise ConfigError(f"metric {setting['metric']!r} is not among {sorted(summary.metrics)}")
    tune.report(summary.metrics)


def draw(sweep: Sweep, outcome: Outcome) -> None:
    """The metric along the first axis (the best over the other axes at each value), a line through the mean of the seeds."""
    from nev.eval.plots import sweep as plot

    axis, values = next(iter(sweep.axes.items()))
    numeric = all(isinstance(value, int | float) for value in values)
    x = [float(value) for value in values] if numeric else [float(place) for place in range(len(values))]
    by_seed = {
        seed: [
            max((score for score in _at(outcome, axis, value, seed) if score is not None), default=math.nan)
            for value in values
        ]
        for seed in sweep.seeds
    }
    title = f"{sweep.name}: {sweep.samples:,} samples seen"
    plot(outcome.figure, x, by_seed, axis, sweep.metric, title, logx=numeric and min(x) > 0)


def _at(outcome: Outcome, axis: str, value: Any, seed: int) -> list[float | None]:
    return [
        score
        for trial, score in zip(outcome.trials, outcome.values, strict=True)
        if trial.point[axis] == value and trial.seed == seed
    ]


def outcome_table(sweep: Sweep, outcome: Outcome) -> Table:
    """One line a trial."""
    table = Table(title=f"{sweep.name} ({sweep.samples:,} samples seen)", title_justify="left")
    for column in (*sweep.axes, "seed", sweep.metric):
        table.add_column(column, justify="right")
    for trial, value, error in zip(outcome.trials, outcome.values, outcome.errors, strict=True):
        shown = f"{value:.1%}" if value is not None else f"failed: {error}"
        table.add_row(*(str(setting) for setting in trial.point.values()), str(trial.seed), shown)
    return table


def log_table(parent: Tracker, sweep: Sweep, outcome: Outcome) -> None:
    """The best value as a metric, the whole table as JSON."""
    import json

    rows = [
        {**trial.point, "seed": trial.seed, sweep.metric: value, "error": error}
        for trial, value, error in zip(outcome.trials, outcome.values, outcome.errors, strict=True)
    ]
    path = outcome.figure.with_suffix(".json")
    path.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    parent.artifact(path)
    found = [value for value in outcome.values if value is not None]
    if found:
        parent.log(0, {f"best/{sweep.metric}": max(found)})


def _value(result: Any, metric: str) -> float | None:
    found = (result.metrics or {}).get(metric) if result is not None else None
    return None if found is None else float(found)


def _error(result: Any) -> str | None:
    if result is None:
        return "it did not run"
    return None if result.error is None else str(result.error).strip().splitlines()[-1]


def _yaml(value: Any) -> str:
    import json

    return json.dumps(value)  # JSON is YAML, and keeps None, lists and numbers as they are
