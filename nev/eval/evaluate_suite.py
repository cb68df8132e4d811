"""A checkpoint on a suite of tasks: embed each set once, score, show, log."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from rich.console import Console
from rich.markup import escape

from nev.common.errors import NevError
from nev.config.base import ConfigError
from nev.embed.embedder import Embedder
from nev.runs.metrics_log import MetricPoint, load_mlflow_run_id, read_points
from nev.runs.tracking import Tracker, check_tracking
from nev.storage.files import StorageError, join, output_folder, storage_errors_as

if TYPE_CHECKING:
    from nev.eval.report.figures import Figure
    from nev.eval.suite.reading import Reading
    from nev.eval.suite.results import SuiteResult, TaskResult
    from nev.eval.suite.schema import Suite


def evaluate_suite(
    location: str,
    name: str,
    console: Console,
    overrides: list[str] | None = None,
    data: str | None = None,
    output: str | None = None,
    against: Sequence[str] = (),
) -> tuple[SuiteResult, list[str]]:
    """Score a checkpoint on a suite; write NAME-STEP.json and .html in `output`, by default the run's folder/evaluation.

    data: a folder in the place of the suite's own. against: JSON files of other models, which stand beside this one, and are what
    its robustness is held against. A task whose data is absent, or is not what the task says, is not run, and
    says why; all else is. Embeddings are kept in `output`/embeddings. Returns the result, and where the files lie. Raises as
    `Embedder.from_checkpoint` and `nev.eval.suite.schema.load_suite`.
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
        refuse_nothing(name, [one.result for one in scored])
        results = add_effective_robustness(suite, [one.result for one in scored], others)
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
        made = write_report(result, [one.exhibits for one in scored], others, points, folder, pictures)
    shown = [join(output, path.name) for path in made]
    track(result, embedder, shown, console)
    return result, shown


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
    """Raise ConfigError where no task was run: a page of nothing would take the place of an earlier one of the same name."""
    if any(result.value is not None for result in results):
        return
    reasons = list(dict.fromkeys(str(result.reason) for result in results))
    raise ConfigError(f"suite {name}: no task could be run, so nothing is written:\n  " + "\n  ".join(reasons))


class Scored(NamedTuple):
    """A task's record, and its pictures."""

    result: TaskResult
    exhibits: list[Figure]


def run_tasks(suite: Suite, embedder: Embedder, cache: str, folder: Path, console: Console) -> list[Scored]:
    """Every task of a suite, on the connected Ray: a source is embedded once, whatever tasks share it. folder: for pictures."""
    from nev.cluster.session import cluster_cpus
    from nev.common.progress import count_progress
    from nev.embed.cache import embed_texts_cached
    from nev.eval.report.figures import make_figures
    from nev.eval.suite.collection import collect
    from nev.eval.suite.reading import BATCH, make_reading
    from nev.eval.suite.results import not_run
    from nev.eval.suite.tasks import Context, score

    data = embedder.config.data
    readings: dict[str, Reading] = {}
    reasons: dict[str, str] = {}
    for task in suite.tasks:
        try:
            readings[task.name] = make_reading(task, suite.root, data.image_size, data.limits, cluster_cpus())
        except NevError as error:
            reasons[task.name] = str(error)
    block_bytes = BATCH * data.image_size**2 * 3
    with count_progress(console, "pictures embedded") as more:
        found = collect(
            list(readings.values()), embedder.fingerprint, cache, embedder.encoder_spec(), block_bytes, more
        )
    encode = partial(
        embed_texts_cached, encode=embedder.encode_text, fingerprint=embedder.text_fingerprint, cache=cache
    )
    scored = []
    for task in suite.tasks:
        if task.name in reasons:
            scored.append(Scored(not_run(task, reasons[task.name]), []))
            continue
        context = Context(encode, embedder.logit_scale, suite.root, readings[task.name])
        collection = found[context.reading.key]
        try:
            if isinstance(collection, NevError):
                raise collection
            result = score(task, collection, context)
        except (NevError, ValueError) as error:
            scored.append(Scored(not_run(task, str(error)), []))
            continue
        try:
            shown = make_figures(task, collection, context, result, folder)
        except (NevError, ValueError, OSError) as error:  # a page without a picture beats no page
            console.print(
                f"[yellow]{task.name}: no pictures ({escape(str(error))})[/]", highlight=False, soft_wrap=True
            )
            shown = []
        scored.append(Scored(result, shown))
    return scored


def track(result: SuiteResult, embedder: Embedder, files: list[str], console: Console) -> None:
    """Log a suite's numbers at the checkpoint's step, and its files, to the MLflow run of the training, where that is known.

    Only where the person who asks has named the server (MLFLOW_TRACKING_URI), or where it is the file beside the run and keeps
    its files there, too: a checkpoint of somebody else's must not say where data goes. A server that does not answer is told.
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
        own = f"sqlite:///{home}/mlflow.db"
        uri = embedder.config.tracking.uri or own
        named = uri == os.environ.get("MLFLOW_TRACKING_URI")
        if not named and (uri != own or "://" in home):
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
            f"[yellow]not logged to MLflow ({escape(str(error).splitlines()[0])}); the results lie in {files[0]}[/]",
            highlight=False,
            soft_wrap=True,
        )
