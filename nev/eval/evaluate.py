"""A checkpoint from its folder to its scores: open it, embed what is asked for, score, write down."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import TYPE_CHECKING

from nev.config.base import ConfigError
from nev.config.experiment import Experiment
from nev.embed.embedder import Embedder
from nev.eval.validation.on_cluster import embed
from nev.eval.validation.task import make_validation
from nev.storage.files import join, output_folder, storage_errors_as

if TYPE_CHECKING:
    from nev.eval.mteb_model import MtebModel
    from nev.eval.validation.scoring import Embedded
    from nev.eval.validation.task import Validation
    from nev.eval.validation.texts import Texts


def evaluate_checkpoint(
    location: str, overrides: list[str], output: str | None = None
) -> tuple[dict[str, float], list[str]]:
    """Score a checkpoint on its experiment's validation set, with overrides; write metrics.json and galleries in `output`.

    `output` is a folder or an S3 prefix; by default `evaluation_folder`. Returns the metrics (shares with the ends of
    their 95 % intervals, `..._low` and `..._high`; where there are captions, also `space/` and `mixed/`), and where the files
    lie. Raises as `Embedder.from_checkpoint`, and ConfigError where there is nothing to score.
    """
    from nev.cluster.session import connect
    from nev.eval.validation.scoring import compute_metrics

    embedder = Embedder.from_checkpoint(location, overrides)
    config = embedder.config
    if not config.data.val or not (config.eval.zero_shot or config.eval.retrieval):
        raise ConfigError("nothing to score: give data.val, and eval.zero_shot or eval.retrieval, with --set")
    task = make_validation(config, embedder.base_text)
    connect()
    output = output or evaluation_folder(embedder.location)
    with storage_errors_as(output, "written"), output_folder(output) as folder:
        embedded, texts = embed(task, embedder)
        metrics = compute_metrics(task.reader.index.root, embedded, texts)
        numbers = folder / "metrics.json"
        numbers.write_text(json.dumps(metrics, indent=1), encoding="utf-8")
        made = [numbers, *galleries(config, task, embedded, texts, folder)]
    return metrics, [join(output, path.name) for path in made]


def evaluate_mteb(
    location: str, names: list[str], overrides: list[str], output: str | None = None
) -> tuple[dict[str, float], str]:
    """Run mteb's own tasks on a checkpoint, text and image alike; write mteb.json in `output` (by default `evaluation_folder`).

    Returns the main score of each task, and where the file lies. Raises ConfigError without the extra `mteb`, for a task that
    mteb does not know, and where its data cannot be had.
    """
    if importlib.util.find_spec("mteb") is None:
        raise ConfigError("--mteb needs mteb: pip install 'nev[mteb]'")
    from nev.eval.mteb_model import run_mteb

    embedder = Embedder.from_checkpoint(location, overrides)
    output = output or evaluation_folder(embedder.location)
    with storage_errors_as(output, "written"), output_folder(output) as folder:
        scores = run_mteb(as_mteb_model(embedder), names)
        (folder / "mteb.json").write_text(json.dumps(scores, indent=1), encoding="utf-8")
    return scores, join(output, "mteb.json")


def evaluation_folder(checkpoint: str) -> str:
    """Where what is said of a checkpoint lies: RUN/evaluation/step-..."""
    run, _, step = checkpoint.rsplit("/", 2)
    return join(run, "evaluation", step)


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


def galleries(config: Experiment, task: Validation, embedded: Embedded, texts: Texts, folder: Path) -> list[Path]:
    """The retrieval gallery and the gallery of classes, whichever the experiment evaluates."""
    from nev.eval.report.galleries import class_gallery, retrieval_gallery

    made = []
    if task.retrieval:
        made.append(folder / "retrieval.png")
        retrieval_gallery(made[-1], task, embedded, texts, config.seed)
    if config.eval.zero_shot:
        made.append(folder / "classes.png")
        class_gallery(made[-1], task, embedded, texts)
    return made
