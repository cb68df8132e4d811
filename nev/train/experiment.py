"""One experiment from its config to its summary: check, train, prove the lock, score, draw."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Mapping
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape

from nev.cluster.metrics import Instruments
from nev.cluster.session import connect, seconds_to_stop
from nev.cluster.warm_up import connecting
from nev.common.signals import handle_sigterm
from nev.config.base import ConfigError
from nev.config.experiment import Experiment
from nev.config.file import to_yaml
from nev.eval.report.tables import metrics_table
from nev.runs.earlier_ends import earlier_end, set_end_aside
from nev.runs.manifest import best_checkpoint, latest_checkpoint, list_steps, read_manifest, read_metrics
from nev.runs.metrics_log import read_points
from nev.runs.tracking import Tracker
from nev.storage.files import join, output_folder
from nev.train.driver.early_stopping import EarlyStopping
from nev.train.driver.launcher import run_workers
from nev.train.driver.metrics import MetricsCallback, MetricsLogger, make_callbacks, open_tracking
from nev.train.driver.monitor import TrainMonitor
from nev.train.driver.preflight import Prepared, prepare, sets_are_there
from nev.train.driver.resources import check_object_store, note_rare_sets, note_read_twice, window_bytes
from nev.train.driver.run_metrics import RunMetrics, checkpoint_time, export_cost
from nev.train.driver.setup import describe_run
from nev.train.driver.step_progress import StepProgress
from nev.train.driver.validator import async_validation
from nev.train.messages import open_mailbox

if TYPE_CHECKING:
    from nev.models.text import TextTower
    from nev.train.job import Job

# Pictures of the report that lie in the run's folder, too, by their names in the report.
GALLERIES = {"retrieval-search": "retrieval.png", "zero_shot-classes": "classes.png"}


LEAST_STOP_S = 60.0  # for the current step and the write of its checkpoint


@dataclass(frozen=True)
class Summary:
    """The result of a run.

    checkpoint: location of the chosen checkpoint.
    metrics: of the chosen checkpoint's validation, the space included, with the ends of their 95 % intervals.
    pictures: locations of PNG files.
    report: location of the page of the checkpoint's validation; None for a run without one.
    """

    name: str
    checkpoint: str
    metrics: dict[str, float]
    pictures: list[str]
    report: str | None
    tracking_uri: str
    mlflow_run_id: str


def run_experiment(
    config: Experiment,
    console: Console,
    stop_after: int | None = None,
    tags: Mapping[str, str] | None = None,
    on_metrics: MetricsCallback | None = None,
) -> Summary:
    """Train `config` (from its newest checkpoint) on the connected or a local Ray, and score the best checkpoint.

    stop_after: a step before the run's end at which this start ends.
    tags: further tags of the MLflow run.
    on_metrics: called with the metrics of each step, in the monitor's thread.
    SIGTERM ends the run with Stopped; a handler of the caller's comes back at the end.
    Raises a NevError for anything that the user can mend; before any training process is started where that is possible.
    """
    from nev.models.lock import check_locked, take_lock
    from nev.models.text import load_text

    with handle_sigterm(), ExitStack() as stack:
        with connecting() if sets_are_there(config) else nullcontext():
            prepared = prepare(config, stop_after)
        connect()
        check_object_store(prepared.job)
        # The mailbox comes before MLflow: another driver may train this run.
        mailbox = stack.enter_context(open_mailbox(prepared.job.run))
        if list_steps(prepared.job.run) != prepared.steps:  # another driver has trained this run in the meantime
            prepared = prepare(config, stop_after)
        job, tags = prepared.job, dict(tags or {})
        prolonged = prepared.former_steps is not None and prepared.resume.step < job.stop_step
        if prolonged and (run_id := set_former_end_aside(prepared, console)):
            tags["nev.continues_run"] = run_id
        print_start(prepared, console)
        lock = take_lock(prepared.text) if config.lock == "text" else None
        tracked = stack.enter_context(open_tracking(job, tags, prepared.resume.step, console))
        train_and_validate(prepared, mailbox, tracked.tracker, console, on_metrics)
        if lock:
            check_locked(load_text(job.config.text), lock)
            check_locked(prepared.text, lock)
        prove_trunk_unmoved(job, console)
        summary, files = summarise_run(job, prepared.text, tracked.tracker, console)
        tracked.unsent = tracked.tracker.artifacts(files, summary.checkpoint)
    return summary


def prove_trunk_unmoved(job: Job, console: Console) -> None:
    """Raise TrunkMoved where the locked trunk of a run, loaded anew, is not the trunk of its start.

    In the loop each rank has compared the trunk's weights before each checkpoint. A trunk that is gone by now costs a warning.
    """
    if not job.features:
        return
    from nev.models.frozen import load_frozen_trunk
    from nev.models.lock import check_trunk_locked

    try:
        trunk = load_frozen_trunk(job.config.vision, job.config.data.image_size)
    except ConfigError as error:
        console.print(f"[yellow]the locked trunk cannot be compared once more: {escape(str(error))}[/]", soft_wrap=True)
        return
    check_trunk_locked(trunk, job.fingerprints["trunk"])


def set_former_end_aside(prepared: Prepared, console: Console) -> str | None:
    """Move what a prolonged run has done beyond its resume point, and say so. Returns the id of its MLflow run so far."""
    former, job, step = prepared.former_steps, prepared.job, prepared.resume.step
    assert former is not None
    console.print(
        f"prolonged from {former:,} to {job.total_steps:,} steps: the run continues from step {step:,}, where the learning rates "
        f"part; what it has of later steps moves to {earlier_end(job.run, former)}",
        highlight=False,
        soft_wrap=True,
    )
    return set_end_aside(job.run, former, step)


def print_start(prepared: Prepared, console: Console) -> None:
    """Print which checkpoints are damaged, whether a stop of this job is too short, and what is trained."""
    for damage in prepared.damaged:
        console.print(f"[yellow]{escape(damage)}; the checkpoint before it is used[/]", highlight=False, soft_wrap=True)
    if (seconds := seconds_to_stop()) is not None and seconds < LEAST_STOP_S:
        console.print(
            f"[yellow]`ray job stop` kills this job {seconds:g} s after its SIGTERM, perhaps before a checkpoint is saved: start "
            "the head with RAY_JOB_STOP_WAIT_TIME_S=300, or submit with it in env_vars of --runtime-env-json[/]",
            highlight=False,
            soft_wrap=True,
        )
    indexes, plan = prepared.indexes, prepared.job.plan
    console.print(describe_run(prepared.job, prepared.resume.step, window_bytes(indexes, plan)))
    notes = (
        note_read_twice(indexes, plan, prepared.job.config.data.streams),
        note_rare_sets(plan, prepared.job.set_names),
    )
    for note in filter(None, notes):
        console.print(f"[yellow]{escape(note)}[/]", highlight=False)


def train_and_validate(
    prepared: Prepared, mailbox: Any, tracker: Tracker, console: Console, on_metrics: MetricsCallback | None
) -> None:
    """Train until the last step or an early stop, and wait for the validations beside training."""
    job, start_step = prepared.job, prepared.resume.step
    logger, early_stopping = MetricsLogger(tracker, console), EarlyStopping(job.config.eval)
    points = read_points(job.run, start_step)
    early_stopping.restore(points)
    instruments = Instruments({"run": job.config.name})
    exported = RunMetrics(instruments, start_step, checkpoint_time(points, start_step))
    callbacks = make_callbacks(job.config, logger, early_stopping) + ([on_metrics] if on_metrics else [])
    progress = StepProgress(console, job.total_steps, start_step)
    with (
        export_cost(instruments, prepared.prices, logger.warn),
        async_validation(job, prepared.text) as validator,
    ):
        observers = [exported.observe]
        monitor = TrainMonitor(mailbox, logger, callbacks, early_stopping, progress, validator, observers)
        if start_step < job.stop_step and early_stopping.should_stop:
            logger.warn(f"{early_stopping}: the run has ended early (--set eval.patience=null trains on)")
        elif start_step < job.stop_step:
            run_workers(job, prepared.reader, mailbox, monitor, start_step)
        monitor.wait_for_validation()


def summarise_run(job: Job, text: TextTower, tracker: Tracker, console: Console) -> tuple[Summary, list[str]]:
    """Choose the checkpoint, and write its pictures and its page. Returns the summary, and the locations of the files for MLflow.

    text: the text tower before training.
    """
    from nev.embed.embedder import Embedder
    from nev.eval.evaluate import report_validation
    from nev.eval.report.figures import run_curves

    config = job.config
    chosen = (best_checkpoint(job.run, config.eval.best) if config.eval.best else None) or latest_checkpoint(job.run)
    assert chosen, "a finished run has a checkpoint"
    metrics, reports = read_metrics(chosen), list[str]()
    with output_folder(job.run) as folder:
        pictures = [folder / "loss.png"]
        run_curves(pictures[0], read_points(job.run, job.stop_step), config.name)
        if job.validation and (job.validation.classes or job.validation.retrieval):
            embedder = Embedder(chosen, read_manifest(chosen), config, text)
            (folder / "evaluation").mkdir(exist_ok=True)
            report = report_validation(job.validation, embedder, folder / "evaluation", console)
            metrics |= report.metrics
            reports = [join(job.run, "evaluation", path.name) for path in report.files]
            for name, file in GALLERIES.items():
                if name in report.pictures:
                    pictures.append(folder / file)
                    shutil.copyfile(report.pictures[name], pictures[-1])
        settings = folder / "config.yaml"
        settings.write_text(to_yaml(config), encoding="utf-8")
    locations = [join(job.run, path.name) for path in pictures]
    summary = Summary(
        name=config.name,
        checkpoint=chosen,
        metrics=metrics,
        pictures=locations,
        report=reports[0] if reports else None,
        tracking_uri=tracker.uri,
        mlflow_run_id=tracker.run_id,
    )
    return summary, [*locations, *reports, join(job.run, settings.name)]


def show_summary(summary: Summary, console: Console) -> None:
    """Print the metrics, and where the checkpoint, the pictures and MLflow are."""
    if summary.metrics:
        console.print(metrics_table(summary.metrics, summary.name))
    console.print(f"checkpoint  {summary.checkpoint}", highlight=False, soft_wrap=True)
    for picture in summary.pictures:
        console.print(f"{PurePosixPath(picture).stem:<11} {picture}", highlight=False, soft_wrap=True)
    if summary.report:
        console.print(f"report      {summary.report}", highlight=False, soft_wrap=True)
    console.print(f"MLflow      {mlflow_hint(summary.tracking_uri)}", highlight=False, soft_wrap=True)


def mlflow_hint(uri: str) -> str:
    """How to see the runs of a tracking store: a server's address, or the command that starts one."""
    if uri.startswith("http"):
        return uri
    mlflow = "mlflow" if shutil.which("mlflow") else str(Path(sys.executable).with_name("mlflow"))
    return f"{mlflow} ui --backend-store-uri {uri}"
