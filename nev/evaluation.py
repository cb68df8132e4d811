"""A checkpoint from its folder to its scores: open it, embed what is asked for, score, write down."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from rich.console import Console
from rich.markup import escape

from nev.config import Experiment
from nev.config_base import ConfigError
from nev.config_file import parse
from nev.data.storage import folder_to_fill, join, naming, write_whole
from nev.errors import NevError
from nev.tracking import Tracker, check_tracking
from nev.train.journal import kept_run_id
from nev.train.manifest import CheckpointError, read_manifest
from nev.train.setup import absolute, make_validation

if TYPE_CHECKING:
    from nev.eval.exhibits import Exhibit
    from nev.eval.reading import Reading
    from nev.eval.results import SuiteResult, TaskResult
    from nev.eval.scoring import Embedded
    from nev.eval.suite import Suite
    from nev.eval.texts import Texts
    from nev.eval.validation import Validation
    from nev.models.text import TextTower


class Opened(NamedTuple):
    """A checkpoint, and what it was trained with: the config (with overrides) and the text tower as the run found it."""

    location: str
    manifest: dict[str, Any]
    config: Experiment
    text: TextTower


def open_checkpoint(location: str, overrides: list[str]) -> Opened:
    """Read a checkpoint's manifest and load its text tower.

    Raises CheckpointError where it is none, or where the text tower here is not the one that it was trained against.
    """
    from nev.models.text import load_text

    location = location.rstrip("/")
    if "://" not in location:
        location = str(Path(location).absolute())  # Ray's processes have other working folders
    manifest = read_manifest(location)
    # Whoever made the checkpoint may say what is evaluated, but not that code from the hub runs here.
    own_text = {**manifest["config"].get("text", {}), "trust_remote_code": False}
    config = absolute(parse(Experiment, {**manifest["config"], "text": own_text}, overrides, where=location))
    if config.lock != (own := manifest["config"].get("lock", "text")):
        raise ConfigError(f"lock: {location} was trained with lock: {own}, which says whose weights it holds: leave it")
    text = load_text(config.text)
    if text.fingerprint != manifest["fingerprints"]["text"]:
        raise CheckpointError(f"{location} was trained against another text tower than {config.text.encoder} is here")
    return Opened(location, manifest, config, text)


def evaluate_checkpoint(
    location: str, overrides: list[str], output: str | None = None
) -> tuple[dict[str, float], list[str]]:
    """Score a checkpoint on its experiment's validation set, with overrides; write metrics.json and galleries in `output`.

    `output` is a folder or an S3 prefix; by default the run's folder/evaluation. Returns the metrics (shares with the ends of
    their 95 % intervals, `..._low` and `..._high`; where there are captions, also `space/` and `mixed/`), and where the files
    lie. Raises as `open_checkpoint`, and ConfigError where there is nothing to score.
    """
    from nev.eval.scoring import intervals, pairs_of, rank, shares, space
    from nev.runtime import connect

    location, _, config, text = open_checkpoint(location, overrides)
    if not config.data.val or not (config.eval.zero_shot or config.eval.retrieval):
        raise ConfigError("nothing to score: give data.val, and eval.zero_shot or eval.retrieval, with --set")
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
    `open_checkpoint` and `nev.eval.suite.load_suite`.
    """
    from nev.eval.effective import with_effective
    from nev.eval.report import write_report
    from nev.eval.results import SuiteResult, average_of, load_result
    from nev.eval.suite import load_suite
    from nev.runtime import connect

    suite = load_suite(name, data)
    others = [load_result(file) for file in against]
    opened = open_checkpoint(location, overrides or [])
    output = output or join(opened.location.rsplit("/", 2)[0], "evaluation")
    connect()
    began = time.perf_counter()
    with naming(output, "written"), folder_to_fill(output) as folder:
        pictures = folder / f"{Path(name).stem}-{opened.manifest['step']:08d}"
        scored = run_tasks(suite, opened, join(output, "embeddings"), pictures, console)
        results = with_effective(suite, [one.result for one in scored], others)
        result = SuiteResult(
            suite=Path(name).stem,
            about=suite.about,
            checkpoint=opened.location,
            model=opened.config.name,
            step=opened.manifest["step"],
            average=average_of(suite, results),
            published=suite.published,
            seconds=time.perf_counter() - began,
            tasks=tuple(results),
        )
        made = write_report(result, [one.exhibits for one in scored], others, opened.location, folder, pictures)
    shown = [join(output, path.name) for path in made]
    track(result, opened, shown, console)
    return result, shown


def evaluate_mteb(
    location: str, names: list[str], overrides: list[str], output: str | None = None
) -> tuple[dict[str, float], str]:
    """Run mteb's own tasks on a checkpoint, text and image alike; write mteb.json in `output`, as `evaluate_suite` has it.

    Returns the main score of each task, and where the file lies. Raises ConfigError without the extra `mteb`, for a task that
    mteb does not know, and where its data cannot be had.
    """
    import torch

    if importlib.util.find_spec("mteb") is None:
        raise ConfigError("--mteb needs mteb: pip install 'nev[mteb]'")
    from nev.eval.mteb_model import MtebModel, scores_of
    from nev.eval.validation import embedder
    from nev.models.vision import normalise
    from nev.train.checkpoint import load_tower, load_vision

    opened = open_checkpoint(location, overrides)
    config, data = opened.config, opened.config.data
    text = opened.text if config.lock == "text" else load_tower(opened.location, config)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    text.model.to(device)
    vision = load_vision(opened.location, config, text.width).to(device).eval()
    embed = embedder(vision, lambda images: normalise(images, data.mean, data.std), device)
    revision = opened.manifest["sha256"]["model.safetensors"][:12]
    scores = scores_of(MtebModel(config.name, revision, text, embed, data.image_size), names)
    output = output or join(opened.location.rsplit("/", 2)[0], "evaluation")
    with naming(output, "written"):
        write_whole(join(output, "mteb.json"), json.dumps(scores, indent=1).encode())
    return scores, join(output, "mteb.json")


def track(result: SuiteResult, opened: Opened, files: list[str], console: Console) -> None:
    """Log a suite's numbers at the checkpoint's step, and its files, to the MLflow run of the training, where that is known.

    Only where the person who asks has named the server (MLFLOW_TRACKING_URI), or where it is the file beside the run and keeps
    its files there, too: a checkpoint of somebody else's must not say where data goes. A server that does not answer is told.
    """
    from mlflow.exceptions import MlflowException

    run, inside, _ = opened.location.rpartition("/checkpoints/")
    if not inside:
        return
    try:
        run_id = kept_run_id(run)
        if run_id is None:
            return
        home = run.rpartition("/")[0]
        own = f"sqlite:///{home}/mlflow.db"
        uri = opened.config.tracking.uri or own
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


class Scored(NamedTuple):
    """A task's record, and its pictures."""

    result: TaskResult
    exhibits: list[Exhibit]


def run_tasks(suite: Suite, opened: Opened, cache: str, folder: Path, console: Console) -> list[Scored]:
    """Every task of a suite, on the connected Ray: a source is embedded once, whatever tasks share it. folder: for pictures."""
    from nev.eval.collection import collect, texts
    from nev.eval.engine import Tower
    from nev.eval.exhibits import exhibits
    from nev.eval.reading import BATCH, reading_of
    from nev.eval.results import not_run
    from nev.eval.tasks import Context, score
    from nev.progress import counting
    from nev.runtime import cluster_cpus
    from nev.train.checkpoint import load_tower, load_vision, logit_scale

    location, manifest, config, text = opened
    readings: dict[str, Reading] = {}
    reasons: dict[str, str] = {}
    for task in suite.tasks:
        try:
            readings[task.name] = reading_of(
                task, suite.root, config.data.image_size, config.data.limits, cluster_cpus()
            )
        except NevError as error:
            reasons[task.name] = str(error)
    weights = manifest["sha256"]["model.safetensors"]
    seen_as = [weights, config.vision.model_dump(mode="json"), config.data.mean, config.data.std]
    model = hashlib.sha256(json.dumps(seen_as).encode()).hexdigest()
    tower = Tower(partial(load_vision, location, config, text.width), config.data.mean, config.data.std)
    block_bytes = BATCH * config.data.image_size**2 * 3
    with counting(console, "pictures embedded") as more:
        found = collect(list(readings.values()), model, cache, tower, block_bytes, more)
    own_text = text if config.lock == "text" else load_tower(location, config)
    fingerprint = text.fingerprint if config.lock == "text" else weights
    encode = partial(texts, encode=own_text.encode, fingerprint=fingerprint, cache=cache)
    scale = logit_scale(location)
    scored = []
    for task in suite.tasks:
        if task.name in reasons:
            scored.append(Scored(not_run(task, reasons[task.name]), []))
            continue
        context = Context(encode, scale, suite.root, readings[task.name])
        collection = found[context.reading.key]
        try:
            if isinstance(collection, NevError):
                raise collection
            result = score(task, collection, context)
        except (NevError, ValueError) as error:
            scored.append(Scored(not_run(task, str(error)), []))
            continue
        try:
            shown = exhibits(task, collection, context, result, folder)
        except (NevError, ValueError, OSError) as error:  # a page without a picture beats no page
            console.print(
                f"[yellow]{task.name}: no pictures ({escape(str(error))})[/]", highlight=False, soft_wrap=True
            )
            shown = []
        scored.append(Scored(result, shown))
    return scored


def embed(config: Experiment, checkpoint: str, task: Validation, taken: float = 0.0) -> tuple[Embedded, Texts]:
    """The validation set under a checkpoint's towers: the pictures on the connected Ray, texts without sidecars here.

    taken: GPUs of the cluster that others hold.
    """
    from nev.eval.engine import Tower, embed_set
    from nev.eval.validation import texts_of
    from nev.train.checkpoint import load_tower, load_vision

    load = partial(load_vision, checkpoint, config, task.text_width)
    encode = load_tower(checkpoint, config).encode if config.text_online else None
    return embed_set(task, Tower(load, config.data.mean, config.data.std), taken), texts_of(task, encode)


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
