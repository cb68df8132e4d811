"""A checkpoint on a suite of tasks: embed each set once, score, write a page, log."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from rich.console import Console
from rich.markup import escape

from nev.common.errors import NevError, first_line
from nev.config.base import ConfigError
from nev.embed.embedder import Embedder
from nev.runs.metrics_log import MetricPoint, load_mlflow_run_id, read_points
from nev.runs.tracking import Tracker
from nev.runs.tracking_check import check_tracking
from nev.storage.files import StorageError, join, output_folder, storage_errors_as

if TYPE_CHECKING:
    from nev.eval.report.figures import Figure
    from nev.eval.suite.collection import Collection
    from nev.eval.suite.reading import Reading
    from nev.eval.suite.results import SuiteResult, TaskResult
    from nev.eval.suite.schema import Suite, Task
    from nev.eval.suite.tasks import Context


def evaluate_suite(
    location: str,
    name: str,
    console: Console,
    overrides: list[str] | None = None,
    data: str | None = None,
    output: str | None = None,
    against: Sequence[str] = (),
) -> tuple[SuiteResult, list[str]]:
    """Score a checkpoint on a suite; write NAME-STEP.html and .json.

    name: a shipped suite, or a file (.yaml).
    overrides: `section.key=value`, over the checkpoint's config.
    data: folder or S3 prefix that takes the place of the suite's `root`.
    output: folder or S3 prefix; by default evaluation/ in the run's folder. Vectors are cached in its embeddings/.
    against: JSON files of other models; the page shows them, and robustness is compared with them.
    A task whose data is absent or does not fit the task is not run, and its result has the reason.
    Returns the result, and the locations of the files. Raises as `Embedder.from_checkpoint` and
    `nev.eval.suite.schema.load_suite`.
    """
    from nev.cluster.session import connect
    from nev.eval.report.page import write_report
    from nev.eval.suite.effective_robustness import add_effective_robustness
    from nev.eval.suite.results import SuiteResult, compute_average, load_result
    from nev.eval.suite.schema import load_suite

    suite = load_suite(name, data)
    others = [load_result(file, Path(name).stem) for file in against]
    embedder = Embedder.from_checkpoint(location, overrides or [])
    output = output or join(embedder.location.rsplit("/", 2)[0], "evaluation")
    connect()
    began = time.perf_counter()
    with storage_errors_as(output, "written"), output_folder(output) as folder:
        pictures = folder / f"{Path(name).stem}-{embedder.step:08d}"
        scored = run_tasks(suite, embedder, join(output, "embeddings"), pictures, console)
        results = [item.result for item in scored]
        refuse_nothing(name, results)
        results = add_effective_robustness(suite, results, others)
        result = SuiteResult(
            suite=Path(name).stem,
            about=suite.about,
            checkpoint=embedder.location,
            model=embedder.config.name,
            step=embedder.step,
            average=compute_average(suite, results),
            published=suite.published,
            seconds=time.perf_counter() - began,
            tasks=tuple(results),
        )
        points = read_curve(embedder.location, result.step, console)
        files = write_report(result, [item.figures for item in scored], others, points, folder, pictures)
    locations = [join(output, path.name) for path in files]
    track(result, embedder, locations, console)
    return result, locations


def read_curve(location: str, step: int, console: Console) -> list[MetricPoint]:
    """The metrics of the checkpoint's run up to a step; none for a checkpoint outside a run's folder.

    Metrics that cannot be read are none, too: the reason is printed, since a page without a curve beats no page.
    """
    run, inside, _ = location.rpartition("/checkpoints/")
    try:
        return read_points(run, step) if inside else []
    except StorageError as error:
        console.print(f"[yellow]no curve: {escape(str(error))}[/]", highlight=False, soft_wrap=True)
        return []


def refuse_nothing(name: str, results: Sequence[TaskResult]) -> None:
    """Raise ConfigError where no task was run, before an empty page replaces an earlier page of the same name."""
    if any(result.value is not None for result in results):
        return
    reasons = list(dict.fromkeys(str(result.reason) for result in results))
    raise ConfigError(f"suite {name}: no task could be run, so nothing is written:\n  " + "\n  ".join(reasons))


class Scored(NamedTuple):
    """The result of a task, and its pictures."""

    result: TaskResult
    figures: list[Figure]


def run_tasks(suite: Suite, embedder: Embedder, cache: str, folder: Path, console: Console) -> list[Scored]:
    """Embed the sets of a suite on the connected Ray, and score its tasks. Tasks with the same source share its vectors.

    cache: folder or S3 prefix for vectors.
    folder: for pictures.
    """
    from nev.cluster.session import cluster_cpus
    from nev.common.progress import count_progress
    from nev.embed.cache import embed_texts_cached
    from nev.eval.suite.collection import collect, read_row_pictures
    from nev.eval.suite.reading import BATCH, make_reading
    from nev.eval.suite.results import not_run
    from nev.eval.suite.tasks import Context

    data = embedder.config.data
    readings: dict[str, Reading] = {}
    reasons: dict[str, str] = {}
    for task in suite.tasks:
        try:
            readings[task.name] = make_reading(task, suite.root, data.image_size, data.limits, cluster_cpus())
        except NevError as error:
            reasons[task.name] = str(error)
    block_bytes = BATCH * data.image_size**2 * 3
    with count_progress(console, "pictures embedded") as on_progress:
        collections = collect(
            list(readings.values()), embedder.fingerprint, cache, embedder.encoder_spec(), block_bytes, on_progress
        )
    encode = partial(
        embed_texts_cached, encode=embedder.encode_text, fingerprint=embedder.text_fingerprint, cache=cache
    )
    scored = []
    for task in suite.tasks:
        if task.name in reasons:
            scored.append(Scored(not_run(task, reasons[task.name]), []))
            continue
        reading = readings[task.name]
        collection = collections[reading.key]
        if isinstance(collection, NevError):
            scored.append(Scored(not_run(task, str(collection)), []))
            continue
        pictures = partial(read_row_pictures, collection, reading)
        context = Context(embedder.logit_scale, encode=encode, root=suite.root, reading=reading, pictures=pictures)
        scored.append(score_task(task, collection, context, folder, console))
    return scored


def score_task(task: Task, collection: Collection, context: Context, folder: Path, console: Console) -> Scored:
    """Score a task and draw its pictures in `folder`. A task that cannot be scored has a result with the reason."""
    from nev.eval.report.figures import make_figures
    from nev.eval.suite.results import not_run
    from nev.eval.suite.tasks import score

    try:
        result = score(task, collection, context)
    except (NevError, ValueError) as error:
        return Scored(not_run(task, str(error)), [])
    try:
        return Scored(result, make_figures(task, collection, context, result, folder))
    except (NevError, ValueError, OSError) as error:  # a page without a picture is better than no page
        console.print(f"[yellow]{task.name}: no pictures ({escape(str(error))})[/]", highlight=False, soft_wrap=True)
        return Scored(result, [])


def track(result: SuiteResult, embedder: Embedder, files: list[str], console: Console) -> None:
    """Log the numbers of a suite, at the checkpoint's step, and its files to the MLflow run of the training.

    A checkpoint must not decide where data goes. So nothing is logged unless MLFLOW_TRACKING_URI names the same server, or the
    store is the file beside the run and its artifacts lie there, too. Where nothing is logged, a line on the console says why.
    """
    from mlflow.exceptions import MlflowException

    run, inside, _ = embedder.location.rpartition("/checkpoints/")
    if not inside:
        return
    try:
        run_id = load_mlflow_run_id(run)
        if run_id is None:
            return
        home = run.rpartition("/")[0]
        beside = f"sqlite:///{home}/mlflow.db"
        uri = embedder.config.tracking.uri or beside
        named = uri == os.environ.get("MLFLOW_TRACKING_URI")
        if not named and (uri != beside or "://" in home):
            raise ConfigError(f"the checkpoint names {uri}: set MLFLOW_TRACKING_URI to the same to allow it")
        check_tracking(uri)
        tracker = Tracker(uri, run_id)
        if not named and not tracker.artifacts_below(home):
            raise ConfigError(f"{uri} keeps files elsewhere: set MLFLOW_TRACKING_URI to the same to allow it")
        tracker.log(result.step, result.flat())
        tracker.flush()
        for file in files:
            tracker.artifact(file, "evaluation")
    except (NevError, MlflowException, OSError) as error:
        console.print(
            f"[yellow]not logged to MLflow ({escape(first_line(error))}); the results lie in {files[0]}[/]",
            highlight=False,
            soft_wrap=True,
        )
