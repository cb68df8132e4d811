"""One experiment from its config to its summary: set up, train, check the lock, score, show."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from nev.config import Experiment
from nev.config_base import ConfigError
from nev.config_file import parse, to_yaml
from nev.data.storage import folder_to_fill, join
from nev.preflight import Findings
from nev.tracking import Tracker, check_tracking, open_run, tracking_uri
from nev.train.journal import keep_run_id, kept_run_id, read_points
from nev.train.manifest import CheckpointError, best, latest, newest_whole, read_manifest, verified
from nev.train.output import check_output, check_space, run_folder
from nev.train.setup import absolute, make_validation, prepare_job, train_reader
from nev.train.trainer import Stopped, check_room, check_store, fit, posting

if TYPE_CHECKING:
    from nev.eval.scoring import Embedded
    from nev.eval.texts import Texts
    from nev.eval.validation import Validation
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
    config: Experiment, console: Console, stop_after: int | None = None, parent: str | None = None
) -> Summary:
    """Train `config` (from where it stands) on the connected or a local Ray, and score its best checkpoint.

    Raises a NevError for anything that the user can mend; before any process is started where that is possible.
    """
    from nev.capacity import checkpoint_bytes
    from nev.models.text import check_locked, load_text, lock_of
    from nev.runtime import connect

    config = absolute(config)
    found = Findings()
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
        kept = config.train.keep_last + bool(config.eval.best)
        check_space(run_folder(config), kept, checkpoint_bytes(config, text))
    lock = lock_of(text) if config.lock == "text" else None
    job = prepare_job(config, text, stop_after, found)
    connect()
    check_store(job)
    begun = begin(job, console)
    with posting(job.run) as board:  # before MLflow hears of it: another job may train this run
        tracker = track(job, parent, begun)
        status, sent = "FAILED", False
        try:
            if begun < job.stop_step:
                fit(job, begun, train_reader(config, text), board, tracker, console)
            if lock:
                check_locked(load_text(config.text), lock)
                check_locked(text, lock)
            summary, files = summarise(job, tracker)
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


def begin(job: Job, console: Console) -> int:
    """Tell what lies before a run, and what of it is damaged. Returns the step that it goes on from, 0 for a new one."""
    found = newest_whole(job.run, verified)
    for damage in found.damaged if found else []:
        console.print(f"[yellow]{escape(damage)}; the one before it is used[/]", highlight=False, soft_wrap=True)
    begun: int = found.read["step"] if found else 0
    console.print(extent(job, begun))
    return begun


def extent(job: Job, begun: int) -> str:
    """What lies before a run, in a line."""
    plan = job.plan
    steps = f"steps {begun:,} to {job.stop_step:,}" if begun else f"{job.stop_step:,} steps"
    left = f", {plan.tail_rows:,} rows left over" if plan.tail_rows else ""
    trained = {"text": "", "image": ", the text tower alone is trained", "none": ", both towers are trained"}[
        job.config.lock
    ]
    return (
        f"{job.config.name}: {plan.total_rows:,} rows, {plan.steps_per_epoch:,} steps an epoch{left}; {steps}{trained}"
    )


def track(job: Job, parent: str | None, begun: int) -> Tracker:
    """The MLflow run of this job, with the config and the fingerprints; it gets what it has missed up to step `begun`."""
    config = job.config
    tags = {f"nev.{name}_fingerprint": value for name, value in job.fingerprints.items()}
    tags["nev.tail_rows"] = str(job.plan.tail_rows)
    tracker = open_run(
        tracking_uri(config.tracking, config.output),
        config.tracking.experiment,
        config.name,
        config,
        tags,
        config.output,
        run_id=kept_run_id(job.run),
        parent=parent,
    )
    keep_run_id(job.run, tracker.run_id)
    for point in read_points(job.run, begun):
        tracker.log(point.step, point.metrics, point.time)
    return tracker


def summarise(job: Job, tracker: Tracker) -> tuple[Summary, list[str]]:
    """Choose the checkpoint and draw the pictures. Returns them, and where the files lie that MLflow should have, too."""
    from nev.eval.showcase import run_curves
    from nev.eval.validation import load_kept

    config = job.config
    chosen = (best(job.run, config.eval.best) if config.eval.best else None) or latest(job.run)
    assert chosen, "a finished run has a checkpoint"
    manifest = read_manifest(chosen)
    with folder_to_fill(job.run) as folder:
        pictures = [folder / "loss.png"]
        run_curves(pictures[0], read_points(job.run, job.stop_step), config.name)
        if job.validation:
            kept = load_kept(chosen, job.validation) or embed(config, chosen, job.validation)
            pictures += galleries(config, job.validation, *kept, folder)
        settings = folder / "config.yaml"
        settings.write_text(to_yaml(config), encoding="utf-8")
    shown = [join(job.run, path.name) for path in pictures]
    summary = Summary(config.name, chosen, manifest["metrics"], shown, tracker.uri, tracker.run_id)
    return summary, [*shown, join(job.run, settings.name)]


def evaluate_checkpoint(
    location: str, overrides: list[str], output: str | None = None
) -> tuple[dict[str, float], list[str]]:
    """Score a checkpoint on its experiment's validation set, with overrides; write metrics.json and galleries in `output`.

    `output` is a folder or an S3 prefix; by default the run's folder/evaluation. Returns the metrics (shares with the ends of
    their 95 % intervals, `..._low` and `..._high`; where there are captions, also `space/` and `mixed/`), and where the files
    lie. Raises CheckpointError where the text tower is not the one that it was trained
    against, ConfigError where there is nothing to score.
    """
    from nev.eval.scoring import intervals, pairs_of, rank, shares, space
    from nev.models.text import load_text
    from nev.runtime import connect

    location = location.rstrip("/")
    if "://" not in location:
        location = str(Path(location).absolute())  # Ray's processes have other working folders
    manifest = read_manifest(location)
    # Whoever made the checkpoint may say what is evaluated, but not that code from the hub runs here.
    own_text = {**manifest["config"].get("text", {}), "trust_remote_code": False}
    config = absolute(parse(Experiment, {**manifest["config"], "text": own_text}, overrides, where=location))
    if config.lock != (own := manifest["config"].get("lock", "text")):
        raise ConfigError(f"lock: {location} was trained with lock: {own}, which says whose weights it holds: leave it")
    if not config.data.val or not (config.eval.zero_shot or config.eval.retrieval):
        raise ConfigError("nothing to score: give data.val, and eval.zero_shot or eval.retrieval, with --set")
    text = load_text(config.text)
    if text.fingerprint != manifest["fingerprints"]["text"]:
        raise CheckpointError(f"{location} was trained against another text tower than {config.text.encoder} is here")
    task = make_validation(config, text)
    connect()
    embedded, texts = embed(config, location, task)
    ranked = rank(task.reader.index.root, embedded, texts)
    metrics = shares(ranked)
    for name, sure in intervals(ranked).items():
        metrics |= {f"{name}_low": sure.low, f"{name}_high": sure.high}
    if pairs := pairs_of(task.reader.index.root, embedded, texts):
        metrics |= space(pairs)
    output = output or join(location.rsplit("/", 2)[0], "evaluation")
    with folder_to_fill(output) as folder:
        numbers = folder / "metrics.json"
        numbers.write_text(json.dumps(metrics, indent=1), encoding="utf-8")
        made = [numbers, *galleries(config, task, embedded, texts, folder)]
    return metrics, [join(output, path.name) for path in made]


def embed(config: Experiment, checkpoint: str, task: Validation) -> tuple[Embedded, Texts]:
    """The validation set under a checkpoint's towers: the pictures on the connected Ray, texts without sidecars here."""
    from nev.eval.engine import Tower, embed_set
    from nev.eval.validation import texts_of
    from nev.train.checkpoint import load_tower, load_vision

    load = partial(load_vision, checkpoint, config, task.text_width)
    encode = load_tower(checkpoint, config).encode if config.text_online else None
    return embed_set(task, Tower(load, config.data.mean, config.data.std)), texts_of(task, encode)


def galleries(config: Experiment, task: Validation, embedded: Embedded, texts: Texts, folder: Path) -> list[Path]:
    """The retrieval gallery and the gallery of classes, whichever the experiment evaluates."""
    from nev.eval.showcase import class_gallery, retrieval_gallery

    made = []
    if task.retrieval:
        made.append(folder / "retrieval.png")
        retrieval_gallery(made[-1], task, embedded, texts, config.seed)
    if config.eval.zero_shot:
        made.append(folder / "classes.png")
        class_gallery(made[-1], task, embedded, texts)
    return made


def show_summary(summary: Summary, console: Console) -> None:
    """Print the numbers and where to look."""
    if summary.metrics:
        console.print(metrics_table(summary.metrics, summary.name))
    console.print(f"checkpoint  {summary.checkpoint}", highlight=False, soft_wrap=True)
    for picture in summary.pictures:
        console.print(f"{PurePosixPath(picture).stem:<11} {picture}", highlight=False, soft_wrap=True)
    console.print(f"MLflow      {how_to_look(summary.tracking_uri)}", highlight=False, soft_wrap=True)


def how_to_look(uri: str) -> str:
    """What opens the runs of a tracking store: a server's address, or the command that starts one."""
    return uri if uri.startswith("http") else f"mlflow ui --backend-store-uri {uri}"


def metrics_table(metrics: dict[str, float], title: str) -> Table:
    """Shares as percentages, beside their 95 % intervals, where those are known, and what chance would score."""
    table = Table(title=title, title_justify="left")
    sure = any(key.endswith("_low") for key in metrics)
    for column in ("metric", "value", *(["95 % interval"] if sure else []), "chance"):
        table.add_column(column, justify="left" if column == "metric" else "right")
    for key, value in metrics.items():
        if key.endswith(("chance", "_low", "_high")):
            continue
        chance = metrics.get(
            f"{key}_chance", metrics.get(f"{key.rpartition('/')[0]}/chance") if "top1" in key else None
        )
        shown = {"val": f"{value:,.0f}", "space": f"{value:.3f}"}.get(key.partition("/")[0], f"{value:.1%}")
        ends = [f"{metrics[f'{key}_{end}']:.1%}" for end in ("low", "high") if f"{key}_{end}" in metrics]
        interval = [" to ".join(ends)] if sure else []
        table.add_row(key, shown, *interval, "" if chance is None else f"{chance:.1%}")
    return table
