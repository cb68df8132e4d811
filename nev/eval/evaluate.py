"""Evaluate a checkpoint on its experiment's validation set, or on tasks of mteb."""

from __future__ import annotations

import importlib.util
import json
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from rich.console import Console

from nev.config.base import ConfigError
from nev.embed.embedder import Embedder
from nev.storage.files import join, output_folder, storage_errors_as

if TYPE_CHECKING:
    from nev.eval.mteb_model import MtebModel
    from nev.eval.suite.results import SuiteResult
    from nev.eval.validation.task import Validation


class ValidationReport(NamedTuple):
    """The results of a validation, and the files that show them.

    metrics: every number by its name in MLflow.
    files: the page and the JSON.
    pictures: the PNGs in the page, by names such as `retrieval-search`.
    """

    result: SuiteResult
    metrics: dict[str, float]
    files: list[Path]
    pictures: dict[str, Path]


def evaluate_checkpoint(
    location: str, overrides: list[str], console: Console, output: str | None = None
) -> tuple[SuiteResult, dict[str, float], list[str]]:
    """Score a checkpoint on its experiment's validation set; write validation-STEP.html and .json.

    overrides: `section.key=value`, over the checkpoint's config, such as data.val; they are part of the files' names. Without
    overrides the vectors that the training has saved in the checkpoint are scored, if there are any; else Ray embeds the set.
    output: folder or S3 prefix; by default evaluation/ in the run's folder.
    Returns the result, the metrics by their names in MLflow, and the locations of the files. Raises as
    `Embedder.from_checkpoint`, and ConfigError where there is nothing to score.
    """
    from nev.eval.validation.task import make_validation

    embedder = Embedder.from_checkpoint(location, overrides)
    config = embedder.config
    if not config.data.val or not (config.eval.zero_shot or config.eval.retrieval):
        raise ConfigError("nothing to score: give data.val, and eval.zero_shot or eval.retrieval, with --set")
    task = make_validation(config, embedder.base_text)
    output = output or join(embedder.location.rsplit("/", 2)[0], "evaluation")
    with storage_errors_as(output, "written"), output_folder(output) as folder:
        report = report_validation(task, embedder, folder, console, overrides)
    return report.result, report.metrics, [join(output, path.name) for path in report.files]


def report_validation(
    task: Validation, embedder: Embedder, folder: Path, console: Console, overrides: Sequence[str] = ()
) -> ValidationReport:
    """Score a validation set as a suite, and write its page and its JSON to `folder`, pictures to NAME-STEP/ there.

    NAME is `validation`, with a digest of the overrides where there are any: the page of the run's own set stays.
    overrides: of the embedder. Without overrides the vectors in the checkpoint are scored, if there are any; else Ray embeds.
    Raises ConfigError where no task can be scored.
    """
    from nev.cluster.session import connect
    from nev.embed.cache import hash_values
    from nev.eval.evaluate_suite import read_curve, refuse_nothing, score_task
    from nev.eval.report.page import write_report
    from nev.eval.suite.collection import Collection, Fact
    from nev.eval.suite.results import SuiteResult
    from nev.eval.suite.schema import VALIDATION
    from nev.eval.suite.tasks import Context
    from nev.eval.validation.on_cluster import embed, pictures
    from nev.eval.validation.scoring import name_metrics
    from nev.eval.validation.task import make_suite
    from nev.eval.validation.texts import read_captions
    from nev.eval.validation.vectors import load_vectors

    began = time.perf_counter()
    captions = read_captions(task.reader.index) if task.retrieval else []
    vectors, about = None if overrides else load_vectors(embedder.location, task), "the training's vectors"
    if vectors is None:
        connect()
        vectors, about = embed(task, embedder, captions=captions), "embedded anew"
    embedded, texts = vectors
    facts = [Fact(uid=str(row), captions=tuple(of_row)) for row, of_row in enumerate(captions)]
    collection = Collection(embedded, facts, {})
    context = Context(embedder.logit_scale, texts, pictures=partial(pictures, task))
    suite = make_suite(task)
    name = f"{VALIDATION}-{hash_values(*overrides)[:8]}" if overrides else VALIDATION
    drawn = folder / f"{name}-{embedder.step:08d}"
    scored = [score_task(each, collection, context, drawn, console) for each in suite.tasks]
    results = [item.result for item in scored]
    refuse_nothing(name, results)
    result = SuiteResult(
        suite=name,
        about=f"{suite.about}: {about}",
        checkpoint=embedder.location,
        model=embedder.config.name,
        step=embedder.step,
        average=None,
        seconds=time.perf_counter() - began,
        tasks=tuple(results),
    )
    points = read_curve(embedder.location, embedder.step, console)
    files = write_report(result, [item.figures for item in scored], (), points, folder, drawn)
    images = {figure.path.stem: figure.path for item in scored for figure in item.figures}
    return ValidationReport(result, name_metrics(results, embedded), files, images)


def evaluate_mteb(
    location: str, names: list[str], overrides: list[str], output: str | None = None
) -> tuple[dict[str, float], str]:
    """Run mteb's own tasks on a checkpoint, tasks of texts and of images alike; write mteb.json.

    output: folder or S3 prefix; by default evaluation/step-... in the run's folder.
    Returns the main score of each task, and the location of the file. Raises ConfigError without the extra `mteb`, for a task
    that mteb does not know, and for data that cannot be fetched.
    """
    if importlib.util.find_spec("mteb") is None:
        raise ConfigError("--mteb needs mteb: pip install 'nev[mteb]'")
    from nev.eval.mteb_model import run_mteb

    embedder = Embedder.from_checkpoint(location, overrides)
    if output is None:
        run, _, step = embedder.location.rsplit("/", 2)
        output = join(run, "evaluation", step)
    with storage_errors_as(output, "written"), output_folder(output) as folder:
        scores = run_mteb(as_mteb_model(embedder), names)
        (folder / "mteb.json").write_text(json.dumps(scores, indent=1), encoding="utf-8")
    return scores, join(output, "mteb.json")


def as_mteb_model(embedder: Embedder) -> MtebModel:
    """A checkpoint as a model of mteb, on this machine's GPU where there is a GPU."""
    import torch

    from nev.eval.mteb_model import MtebModel

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    embedder.text.model.to(device)
    return MtebModel(
        embedder.config.name,
        embedder.manifest["sha256"]["model.safetensors"][:12],
        embedder.text,
        embedder.make_image_embedder(device),
        embedder.config.data.image_size,
    )
