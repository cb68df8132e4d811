"""A sweep on Ray Tune: what trials share is done once, those that are finished are kept, and one that fails ends only itself."""

from __future__ import annotations

import functools
import logging
import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

from rich.console import Console
from rich.markup import escape

from nev.cluster.session import cluster_cpus, cluster_gpus, connect, may_grow
from nev.common.errors import NevError
from nev.common.progress import progress
from nev.common.signals import handle_sigterm
from nev.config.base import ConfigError
from nev.config.experiment import Experiment, Text
from nev.config.paths import with_absolute_paths
from nev.data.index import build_index
from nev.embed.cache import hash_values
from nev.embed.captions import embed_captions
from nev.eval.suite.schema import METRICS, load_suite
from nev.eval.validation.scoring import list_metric_names
from nev.eval.validation.task import Validation, class_names, refuse_unknown_metric
from nev.eval.validation.texts import most_captions
from nev.models.text import TextTower, load_text
from nev.runs.tracking import check_tracking, tracking_uri
from nev.storage.files import join
from nev.sweep.config import Sweep
from nev.sweep.mlflow_runs import close_children, open_parent, publish
from nev.sweep.results import SAMPLES, Outcome, TrialResult, load_result
from nev.sweep.suite_data import SuiteData, read_suite
from nev.sweep.trials import DIGITS, Trial, hash_definition, load_base, name_trials, plan_trials
from nev.train.driver.preflight import check_inputs

# Tune's own files and tables of each trial say nothing that nev's do not; its SIGINT handler would end the driver with status 0.
TUNE_ENVIRONMENT = {
    "RAY_AIR_NEW_OUTPUT": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
}

LoadText = Callable[[Text], TextTower]


class SweepSummary(NamedTuple):
    """A sweep's outcome, where its files lie, and where MLflow is."""

    outcome: Outcome
    files: list[str]
    tracking_uri: str


def run_sweep(sweep: Sweep, overrides: list[str], console: Console) -> SweepSummary:
    """Run the trials that are not finished, log a parent run with its children, write the figure, the table and the findings.

    overrides: `section.key=value` for the base. Raises ConfigError, DataError and the like before the first trial, where an
    arm cannot run.
    """
    from nev.sweep.report import write_report

    planned = [
        replace(trial, experiment=with_absolute_paths(trial.experiment)) for trial in plan_trials(sweep, overrides)
    ]
    first = planned[0].experiment
    uri = tracking_uri(first.tracking, first.output)
    check_tracking(uri)
    connect()
    suite = read_suite(sweep, first)
    load = functools.cache(load_text)  # arms share a text encoder, and loading takes seconds
    at_once = count_concurrent(sweep, planned)
    if may_grow() and not sweep.concurrent:
        console.print(
            f"{at_once} trials at a time, the room that there is now; `concurrent` asks for more", highlight=False
        )
    ready = [replace(trial, experiment=with_threads(trial.experiment, at_once)) for trial in planned]
    trials = name_trials(sweep, ready, share_work(ready, console, load))
    results = [load_result(trial, sweep, suite.digest) for trial in trials]
    check_trials(sweep, [trial for trial, result in zip(trials, results, strict=True) if result is None], load)
    definition = hash_definition(sweep, trials)
    parent = open_parent(sweep, definition, first, uri)
    status = "KILLED"
    try:
        errors = tune_trials(sweep, trials, results, suite, parent.run_id, at_once, console)
        found = [result for result in (load_result(trial, sweep, suite.digest) for trial in trials) if result]
        outcome = Outcome(sweep, found, errors)
        base = load_base(sweep, overrides)
        files = write_report(outcome, base, join(first.output, f"{sweep.name}-{definition[:DIGITS]}"))
        if lacking := publish(outcome, parent, files):
            said = f"MLflow lacks some of the sweep ({lacking}). The files below have it; the same command sends it"
            console.print(f"[yellow]{escape(said)}[/]", highlight=False, soft_wrap=True)
        status = "FINISHED" if outcome.whole else "FAILED"
    finally:
        parent.finish(status)
        close_children(trials, uri)
    return SweepSummary(outcome, files, uri)


def count_concurrent(sweep: Sweep, trials: Sequence[Trial]) -> int:
    """How many trials run at a time: all that there is room for beside one CPU that decodes, or as many as the sweep says.

    A trial's workers are reserved together (one placement group), so two trials never wait for each other's halves; and the one
    CPU is what their streams need to go on. Raises ConfigError for more than there is room for, unless the cluster may grow.
    """
    room = min(_room(trial.experiment) for trial in trials)
    if sweep.concurrent and sweep.concurrent > max(1, room) and not may_grow():
        raise ConfigError(
            f"concurrent = {sweep.concurrent}: there is room for {room} trials at a time ({cluster_cpus()} CPUs of which one "
            f"decodes, {cluster_gpus()} GPUs). Lower it, or workers.count, workers.cpus or workers.gpus."
        )
    return max(1, min(sweep.concurrent or room, len(trials)))


def _room(experiment: Experiment) -> int:
    workers = experiment.workers
    rooms = []
    if workers.gpus:
        rooms.append(cluster_gpus() / (workers.least * workers.gpus))
    if workers.cpus:
        rooms.append((cluster_cpus() - 1) / (workers.least * workers.cpus))
    if not rooms:  # workers and decoding share the CPUs
        rooms.append(cluster_cpus() / workers.least)
    return int(min(rooms))


def with_threads(experiment: Experiment, at_once: int) -> Experiment:
    """The experiment with a share of the cores for each worker, where several train on CPUs at a time."""
    workers = experiment.workers
    if at_once == 1 or workers.threads or workers.gpus or may_grow():
        return experiment
    threads = max(1, cluster_cpus() // (at_once * workers.most))
    return experiment.model_copy(update={"workers": workers.model_copy(update={"threads": threads})})


def share_work(trials: Sequence[Trial], console: Console, load: LoadText) -> list[str]:
    """Do once what every trial needs: the index of each set, and the captions' vectors beside it. Returns what tells the data of
    each trial from others: its sets, its classes, its text tower.
    """
    known: dict[str, str] = {}
    found = []
    for experiment in (trial.experiment for trial in trials):
        data, key = experiment.data, experiment.model_dump_json(include={"data", "text", "lock", "eval"})
        if key not in known:
            sets = [data.train, *([data.val] if data.val else [])]
            if not experiment.text_online:
                embed_captions(sets, data.columns, experiment.text, console)
            classes = class_names(experiment.eval.zero_shot) if experiment.eval.zero_shot else []
            content = (build_index(one, data.columns).fingerprint for one in sets)
            known[key] = hash_values(*content, *classes, load(experiment.text).fingerprint)
        found.append(known[key])
    return found


def check_trials(sweep: Sweep, trials: Sequence[Trial], load: LoadText) -> None:
    """Raise what would end a trial before its first step, or leave it without a metric, for a seed of each arm. Names the arm."""
    for trial in {trial.arm: trial for trial in trials}.values():
        try:
            inputs = check_inputs(trial.experiment, load(trial.experiment.text))
            refuse_unmeasured(sweep, inputs.validation)
        except NevError as error:
            where = ", ".join(f"{axis} = {value}" for axis, value in trial.arm)
            raise type(error)(f"the arm {where} cannot run: {error}") from error


def refuse_unmeasured(sweep: Sweep, validation: Validation | None) -> None:
    """Raise ConfigError for a metric that trials with this validation would not have, or not have when ASHA asks."""
    classes = len(validation.classes.names) if validation and validation.classes else 0
    captions = most_captions(validation.reader.index) if validation and validation.retrieval else 0
    known = list_metric_names(classes, captions) if validation else set[str]()
    of_suite = load_suite(sweep.suite).tasks if sweep.suite else ()
    known |= {
        f"{task.name}/{metric}"
        for task in of_suite
        for metric in METRICS[task.kind]
        if task.group or not metric.startswith("worst_group")
    }
    if unknown := [name for name in sweep.metrics if name not in known]:
        raise ConfigError(
            f"metrics: {', '.join(unknown)} not measured; there is {', '.join(sorted(known)) or 'nothing'}"
        )
    if sweep.asha and validation:
        refuse_unknown_metric(sweep.metrics[0], "asha: metrics[0]", validation)


def tune_trials(
    sweep: Sweep,
    trials: Sequence[Trial],
    results: Sequence[TrialResult | None],
    suite: SuiteData,
    parent: str,
    at_once: int,
    console: Console,
) -> dict[str, str]:
    """Run the trials without a result. Returns what ended each one that has failed, by its name."""
    from ray import tune
    from ray.tune.schedulers import ASHAScheduler

    from nev.sweep.follower import SweepProgress
    from nev.sweep.trial import run_trial

    lacking = {trial.name: number for number, trial in enumerate(trials) if results[number] is None}
    left = list(lacking.values())
    if not left:
        return {}
    os.environ |= TUNE_ENVIRONMENT
    # A trial that fails is told in a line, not with Ray's frames.
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)
    halving = None
    if sweep.asha:
        halving = ASHAScheduler(
            time_attr=SAMPLES, max_t=sweep.samples, grace_period=sweep.asha.grace, reduction_factor=sweep.asha.reduction
        )
    setting = {"sweep": sweep, "trials": trials, "parent": parent, "suite": suite}
    with tempfile.TemporaryDirectory(prefix="nev-tune-") as storage, progress(console) as tell, handle_sigterm():
        follower = SweepProgress(sweep, trials, len(left), tell)
        tuner = tune.Tuner(
            # A trial waits for its TorchTrainer, which reserves what it needs: it must not hold a CPU meanwhile.
            tune.with_resources(tune.with_parameters(run_trial, setting=setting), {"CPU": 0, "memory": 2**20}),
            param_space={"number": tune.grid_search(left)},
            tune_config=tune.TuneConfig(
                metric=sweep.metrics[0],
                mode=sweep.mode,
                scheduler=halving,
                max_concurrent_trials=at_once,
                reuse_actors=not halving,  # a process is started and its libraries are read once for many trials
            ),
            run_config=tune.RunConfig(name="tune", storage_path=storage, verbose=0, callbacks=[follower]),
        )
        grid = tuner.fit()
        for one in (grid[place] for place in range(len(grid))):
            if one.config and one.error is not None:
                follower.explain(one.config["number"], one.error)
    return follower.errors
