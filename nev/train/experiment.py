"""One experiment from its config to its summary: set up, train, check the lock, score, show."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import TYPE_CHECKING

from rich.console import Console

from nev.common.errors import ErrorCollector
from nev.common.signals import Stopped
from nev.config.experiment import Experiment
from nev.config.file import to_yaml
from nev.config.paths import with_absolute_paths
from nev.eval.report.tables import metrics_table
from nev.runs.folder import check_output, check_space, run_folder
from nev.runs.manifest import best_checkpoint, latest_checkpoint, read_metrics
from nev.runs.metrics_log import read_points
from nev.runs.tracking import Tracker, check_tracking, tracking_uri
from nev.storage.files import join, output_folder
from nev.train.driver.launcher import run_workers
from nev.train.driver.metrics import MetricsCallback, MetricsLogger, start_tracking
from nev.train.driver.preflight import check_room, check_store
from nev.train.driver.setup import prepare_job, report_resume, train_reader
from nev.train.driver.validator import BEHIND, async_validation, wait_for_validation
from nev.train.messages import open_mailbox

if TYPE_CHECKING:
    from nev.train.job import Job


@dataclass(frozen=True)
class Summary:
    """What a run came to. `metrics` are those of the checkpoint that was chosen; pictures are locations of PNG files."""

    name: str
    checkpoint: str
    metrics: dict[str, float]
    pictures: list[str]
    tracking_uri: str
    mlflow_run_id: str


def run_experiment(
    config: Experiment,
    console: Console,
    stop_after: int | None = None,
    tags: Mapping[str, str] | None = None,
    heard: MetricsCallback | None = None,
) -> Summary:
    """Train `config` (from where it stands) on the connected or a local Ray, and score its best checkpoint.

    tags: of the MLflow run that this begins, more than its own. heard: told of a step's metrics as they come.
    Raises a NevError for anything that the user can mend; before any process is started where that is possible.
    """
    from nev.cluster.session import connect
    from nev.models.lock import check_locked, take_lock
    from nev.models.text import load_text
    from nev.train.capacity import checkpoint_bytes

    config = with_absolute_paths(config)
    found = ErrorCollector()
    with found:
        check_output(config)
    with found:
        check_tracking(tracking_uri(config.tracking, config.output))
    text = None
    with found:
        text = load_text(config.text)
    with found:
        check_room(config.workers)
    if text is None:
        found.refuse()
    assert text
    with found:
        kept = config.train.keep_last + bool(config.eval.best) + (BEHIND + 1) * config.eval.asynchronous
        check_space(run_folder(config), kept, checkpoint_bytes(config, text))
    lock = take_lock(text) if config.lock == "text" else None
    job = prepare_job(config, text, stop_after, found)
    connect()
    check_store(job)
    begun = report_resume(job, console)
    with open_mailbox(job.run) as board:  # before MLflow hears of it: another job may train this run
        tracker = start_tracking(job, tags or {}, begun)
        status, sent = "FAILED", False
        try:
            ledger = MetricsLogger(config, tracker, console, heard)
            ledger.patience.restore(read_points(job.run, begun))
            if begun < job.stop_step and ledger.patience.should_stop:
                ledger.note(f"{ledger.patience}: the run has ended early (--set eval.patience=null trains on)")
            with async_validation(job) as validator:
                if begun < job.stop_step and not ledger.patience.should_stop:
                    run_workers(job, begun, train_reader(config, text), board, ledger, console, validator)
                if validator:
                    wait_for_validation(validator, ledger)
            if lock:
                check_locked(load_text(config.text), lock)
                check_locked(text, lock)
            summary, files = summarise_run(job, tracker)
            sent = tracker.artifacts(files, summary.checkpoint)
            status = "FINISHED"
        except (Stopped, KeyboardInterrupt):
            status = "KILLED"
            raise
        finally:
            if not tracker.finish(status) or (status == "FINISHED" and not sent):
                console.print(
                    f"[yellow]MLflow at {tracker.uri} does not answer. All that it would show is in {job.run}; the same command "
                    "sends it[/]",
                    highlight=False,
                    soft_wrap=True,
                )
    return summary


def summarise_run(job: Job, tracker: Tracker) -> tuple[Summary, list[str]]:
    """Choose the checkpoint and draw the pictures. Returns them, and where the files lie that MLflow should have, too."""
    from nev.eval.evaluate import galleries
    from nev.eval.report.galleries import run_curves
    from nev.eval.validation.on_cluster import embed
    from nev.eval.validation.vectors import load_vectors

    config = job.config
    chosen = (best_checkpoint(job.run, config.eval.best) if config.eval.best else None) or latest_checkpoint(job.run)
    assert chosen, "a finished run has a checkpoint"
    with output_folder(job.run) as folder:
        pictures = [folder / "loss.png"]
        run_curves(pictures[0], read_points(job.run, job.stop_step), config.name)
        if job.validation:
            kept = load_vectors(chosen, job.validation) or embed(config, chosen, job.validation)
            pictures += galleries(config, job.validation, *kept, folder)
        settings = folder / "config.yaml"
        settings.write_text(to_yaml(config), encoding="utf-8")
    shown = [join(job.run, path.name) for path in pictures]
    summary = Summary(config.name, chosen, read_metrics(chosen), shown, tracker.uri, tracker.run_id)
    return summary, [*shown, join(job.run, settings.name)]


def show_summary(summary: Summary, console: Console) -> None:
    """Print the numbers and where to look."""
    if summary.metrics:
        console.print(metrics_table(summary.metrics, summary.name))
    console.print(f"checkpoint  {summary.checkpoint}", highlight=False, soft_wrap=True)
    for picture in summary.pictures:
        console.print(f"{PurePosixPath(picture).stem:<11} {picture}", highlight=False, soft_wrap=True)
    console.print(f"MLflow      {mlflow_hint(summary.tracking_uri)}", highlight=False, soft_wrap=True)


def mlflow_hint(uri: str) -> str:
    """What opens the runs of a tracking store: a server's address, or the command that starts one."""
    return uri if uri.startswith("http") else f"mlflow ui --backend-store-uri {uri}"
