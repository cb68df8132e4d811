"""A sweep on Ray Tune. Shared work is done once, results of finished trials are reused, and a failed trial ends alone."""

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
from nev.config.experiment import Experiment
from nev.config.model import Text
from nev.config.paths import with_absolute_paths
from nev.data.index import build_index
from nev.embed.cache import hash_values
from nev.embed.captions import embed_captions
from nev.embed.features import embed_features
from nev.eval.suite.schema import METRICS, load_suite
from nev.eval.validation.scoring import list_metric_names
from nev.eval.validation.task import Validation, class_names, refuse_unknown_metric
from nev.eval.validation.texts import read_captions
from nev.models.text import TextTower, load_text
from nev.runs.tracking import tracking_uri
from nev.runs.tracking_check import check_tracking
from nev.storage.files import join
from nev.sweep.config import Sweep
from nev.sweep.mlflow_runs import close_children, open_parent, publish
from nev.sweep.results import SAMPLES, Outcome, TrialResult, load_result
from nev.sweep.suite_data import SuiteData, read_suite
from nev.sweep.trials import DIGEST_DIGITS, Trial, hash_definition, load_base, name_trials, plan_trials
from nev.train.driver.preflight import check_inputs

# Tune's files and tables of each trial repeat what nev writes. Its SIGINT handler would end the driver with status 0.
TUNE_ENVIRONMENT = {
    "RAY_AIR_NEW_OUTPUT": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
}

LoadText = Callable[[Text], TextTower]


class SweepSummary(NamedTuple):
    """The outcome of a sweep, the locations of its files, and the URI of MLflow."""

    outcome: Outcome
    files: list[str]
    tracking_uri: str


def run_sweep(sweep: Sweep, overrides: list[str], console: Console) -> SweepSummary:
    """Run the trials that are not finished, log a parent run with its children, write the figure, the table and the findings.

    overrides: `section.key=value` for the base.
    Raises a NevError (ConfigError, DataError, ...) for an arm that cannot run, before the first trial starts.
    """
    from nev.sweep.report import write_report

    planned = [
        replace(trial, experiment=with_absolute_paths(trial.experiment)) for trial in plan_trials(sweep, overrides)
    ]
    first = planned[0].experiment
    uri = tracking_uri(first.tracking, first.output)
    check_tracking(uri, first.tracking.experiment)
    connect()
    suite = read_suite(sweep, first)
    load = functools.cache(load_text)  # arms share a text encoder, and loading takes seconds
    concurrent = count_concurrent(sweep, planned)
    if may_grow() and not sweep.concurrent:
        console.print(
            f"{concurrent} trials at a time, for which there is room now; set `concurrent` for more", highlight=False
        )
    ready = [replace(trial, experiment=with_threads(trial.experiment, concurrent)) for trial in planned]
    trials = name_trials(sweep, ready, prepare_shared(ready, console, load))
    results = [load_result(trial, sweep, suite.digest) for trial in trials]
    check_trials(sweep, [trial for trial, result in zip(trials, results, strict=True) if result is None], load)
    definition = hash_definition(sweep, trials)
    parent = open_parent(sweep, definition, first, uri)
    status = "KILLED"
    try:
        errors = tune_trials(sweep, trials, results, suite, parent.run_id, concurrent, console)
        finished = [result for result in (load_result(trial, sweep, suite.digest) for trial in trials) if result]
        outcome = Outcome(sweep, finished, errors)
        base = load_base(sweep, overrides)
        files = write_report(outcome, base, join(first.output, f"{sweep.name}-{definition[:DIGEST_DIGITS]}"))
        if problems := publish(outcome, parent, files):
            warning = f"MLflow lacks some of the sweep ({problems}). The files below have it; the same command sends it"
            console.print(f"[yellow]{escape(warning)}[/]", highlight=False, soft_wrap=True)
        status = "FINISHED" if outcome.all_finished else "FAILED"
    finally:
        parent.finish(status)
        close_children(trials, uri)
    return SweepSummary(outcome, files, uri)


def count_concurrent(sweep: Sweep, trials: Sequence[Trial]) -> int:
    """How many trials run at a time: `sweep.concurrent`, or as many as the cluster has room for beside one CPU that decodes.

    The workers of a trial are reserved together (one placement group), so two trials never wait for each other's resources. The
    streams of all trials need one free CPU to make progress.
    Raises ConfigError for more trials than there is room for, unless the cluster may grow.
    """
    room = min(_max_concurrent(trial.experiment) for trial in trials)
    if sweep.concurrent and sweep.concurrent > max(1, room) and not may_grow():
        raise ConfigError(
            f"concurrent = {sweep.concurrent}: there is room for {room} trials at a time ({cluster_cpus()} CPUs of which one "
            f"decodes, {cluster_gpus()} GPUs). Lower it, or workers.count, workers.cpus or workers.gpus."
        )
    return max(1, min(sweep.concurrent or room, len(trials)))


def _max_concurrent(experiment: Experiment) -> int:
    workers = experiment.workers
    rooms = []
    if workers.gpus:
        rooms.append(cluster_gpus() / (workers.least * workers.gpus))
    if workers.cpus:
        rooms.append((cluster_cpus() - 1) / (workers.least * workers.cpus))
    if not rooms:  # workers and decoding share the CPUs
        rooms.append(cluster_cpus() / workers.least)
    return int(min(rooms))


def with_threads(experiment: Experiment, concurrent: int) -> Experiment:
    """The experiment with a share of the cores for each worker, if several trials train on CPUs at a time."""
    workers = experiment.workers
    if concurrent == 1 or workers.threads or workers.gpus or may_grow():
        return experiment
    threads = max(1, cluster_cpus() // (concurrent * workers.most))
    return experiment.model_copy(update={"workers": workers.model_copy(update={"threads": threads})})


def prepare_shared(trials: Sequence[Trial], console: Console, load: LoadText) -> list[str]:
    """Do the work that trials share: index each set, embed its captions, and run locked trunks over its pictures.

    Returns a hash of each trial's data: its sets, its classes, its text tower, its locked trunk.
    """
    known: dict[str, str] = {}
    hashes, trunks = [], dict[str, str]()
    for experiment in (trial.experiment for trial in trials):
        data, key = experiment.data, experiment.model_dump_json(include={"data", "text", "lock", "eval"})
        if key not in known:
            if not experiment.text_online:
                embed_captions(data.sets, experiment.text, console)
            classes = class_names(experiment.eval.zero_shot) if experiment.eval.zero_shot else []
            content = [build_index(*data_set).fingerprint for data_set in data.sets]
            if data.set_names:
                content += [f"{data.by_weight} {data.factors} {[columns for _, columns in data.train_sets]}"]
            known[key] = hash_values(*content, *classes, load(experiment.text).fingerprint)
        pictures = experiment.model_dump_json(include={"data", "vision", "seed"})
        if experiment.vision.lock and pictures not in trunks:
            trunks[pictures] = prepare_trunk(experiment, console)
        hashes.append(hash_values(known[key], trunks[pictures]) if experiment.vision.lock else known[key])
    return hashes


def prepare_trunk(experiment: Experiment, console: Console) -> str:
    """Write the image sidecars that a trial needs. Returns the fingerprint of its locked trunk."""
    if experiment.vision.from_sidecars or experiment.vision.standardise:
        return embed_features(experiment, console).trunk
    from nev.models.frozen import load_frozen_trunk

    return load_frozen_trunk(experiment.vision, experiment.data.image_size).fingerprint


def check_trials(sweep: Sweep, trials: Sequence[Trial], load: LoadText) -> None:
    """Check one trial of each arm: raise the error that would end it before its first step or leave a metric unmeasured.

    The message names the arm.
    """
    for trial in {trial.arm: trial for trial in trials}.values():
        try:
            inputs = check_inputs(trial.experiment, load(trial.experiment.text))
            refuse_unmeasured(sweep, inputs.validation)
        except NevError as error:
            where = ", ".join(f"{axis} = {value}" for axis, value in trial.arm)
            raise type(error)(f"the arm {where} cannot run: {error}") from error


def refuse_unmeasured(sweep: Sweep, validation: Validation | None) -> None:
    """Raise ConfigError for a metric that trials with this validation do not measure, or that ASHA cannot read."""
    classes = len(validation.classes.names) if validation and validation.classes else 0
    rows = read_captions(validation.reader.index) if validation and validation.retrieval else []
    known = set(list_metric_names(classes, max(map(len, rows), default=0))) if validation else set[str]()
    tasks = load_suite(sweep.suite).tasks if sweep.suite else ()
    known |= {
        f"{task.name}/{metric}"
        for task in tasks
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
    concurrent: int,
    console: Console,
) -> dict[str, str]:
    """Run the trials without a result. Returns the cause of each failed trial, by its name."""
    from ray import tune
    from ray.tune.schedulers import ASHAScheduler

    from nev.sweep.sweep_progress import SweepProgress
    from nev.sweep.trial import run_trial

    unfinished = {trial.name: number for number, trial in enumerate(trials) if results[number] is None}
    numbers = list(unfinished.values())  # one for each name: two arms with the same settings are one run
    if not numbers:
        return {}
    os.environ |= TUNE_ENVIRONMENT
    # nev prints one line for a failed trial, so Ray's traceback is not logged.
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)
    halving = None
    if sweep.asha:
        halving = ASHAScheduler(
            time_attr=SAMPLES, max_t=sweep.samples, grace_period=sweep.asha.grace, reduction_factor=sweep.asha.reduction
        )
    shared = {"sweep": sweep, "trials": trials, "parent": parent, "suite": suite}
    with tempfile.TemporaryDirectory(prefix="nev-tune-") as storage, progress(console) as show, handle_sigterm():
        callback = SweepProgress(sweep, trials, len(numbers), show)
        tuner = tune.Tuner(
            # A trial only waits for its TorchTrainer, which reserves the resources, so it must not hold a CPU itself.
            tune.with_resources(tune.with_parameters(run_trial, shared=shared), {"CPU": 0, "memory": 2**20}),
            param_space={"number": tune.grid_search(numbers)},
            tune_config=tune.TuneConfig(
                metric=sweep.metrics[0],
                mode=sweep.mode,
                scheduler=halving,
                max_concurrent_trials=concurrent,
                reuse_actors=not halving,  # one process runs many trials, and imports its libraries once
            ),
            run_config=tune.RunConfig(name="tune", storage_path=storage, verbose=0, callbacks=[callback]),
        )
        grid = tuner.fit()
        for result in (grid[number] for number in range(len(grid))):
            if result.config and result.error is not None:
                callback.explain(result.config["number"], result.error)
    return callback.errors
