"""What the driver settles before any process starts: data, plan, locked text, validation. Every error here costs seconds."""

from __future__ import annotations

import logging
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from nev.common.errors import Findings
from nev.config.base import ConfigError
from nev.config.data import Data
from nev.config.experiment import Experiment, ZeroShot, refuse_widths
from nev.config.file import parse
from nev.data.augment import auto_augment
from nev.data.block import BlockReader
from nev.data.index import Index, build_index
from nev.data.index_cache import cache_folder
from nev.data.labels import lines_of
from nev.data.plan import Plan
from nev.data.sidecar import check_sidecars, mean_vector, sidecar_key
from nev.data.text_view import TextView
from nev.data.tokens import tokens_of
from nev.eval.cache import texts
from nev.eval.texts import Classes
from nev.eval.validation import Validation, metric_names
from nev.eval.zeroshot import class_embeddings
from nev.runs.folder import run_folder
from nev.runs.manifest import CheckpointError, latest, newest_whole, read_manifest
from nev.storage.reading import DataError, content_of, read_column
from nev.train.job import Job

if TYPE_CHECKING:
    from nev.models.text import TextTower

log = logging.getLogger(__name__)

# A run may go on with these changed: they do not touch what is computed.
FREE_TO_CHANGE = (
    *(
        "output",
        "workers",
        "tracking",
        "eval",
        "guards",
        "text.encoder",
        "data.train",
        "data.val",
        "data.max_bad_share",
    ),
    *(
        "train.micro_batch",
        "train.activation_checkpointing",
        "train.compile",
        "train.fsdp",
        "train.log_every",
        "train.checkpoint_every",
        "train.keep_last",
        "train.eval_every",
    ),
)


def prepare_job(
    config: Experiment, text: TextTower, stop_after: int | None = None, findings: Findings | None = None
) -> Job:
    """Index the data, plan it, check sidecars and embed class prompts (online text has neither), check the run to continue.

    `config` has absolute paths. Raises what it finds, with what `findings` holds already: DataError, ConfigError or
    CheckpointError, each saying what to do, or NotReady for several.
    """
    from nev.models.lock import canaries
    from nev.models.vision import check_vision

    found = findings or Findings()
    with found:
        if config.data.augment.auto:  # an unknown name is an error now, not in a worker
            auto_augment(config.data.augment.auto, config.data.image_size)
    with found:
        refuse_widths(config.loss, text.width)
    with found:
        if found or latest(run_folder(config)) is None:  # a run that goes on needs neither hub nor file
            check_vision(config.vision, config.data.image_size, text.width, locked=config.lock == "image")
    with found:
        index = build_index(config.data.train, config.data.columns)
        plan = Plan(
            used_rows(index, config.data.used_rows), config.seed, config.train.global_batch, config.data.block_rows
        )
        if not config.text_online:
            check_sidecars(index, text_key(index, text), text.width)
    with found:
        if config.text_online:
            from nev.models.lock import refuse_other_vectors

            refuse_other_vectors(text, tokens_of(text))
    with found:
        validation = make_validation(config, text) if config.data.val else None
        if config.eval.best:
            refuse_unknown_metric(config.eval.best, "eval.best", validation)
    found.refuse()
    total = total_steps(config, plan)
    job = Job(
        config=config,
        run=run_folder(config),
        plan=plan,
        shards=index.paths,
        text_width=text.width,
        total_steps=total,
        stop_step=min(total, stop_after or total),
        validation=validation,
        fingerprints={"data": index.fingerprint, "plan": plan.fingerprint, "text": text.fingerprint},
        canaries=None if config.lock == "text" else canaries(text),
    )
    refuse_other_run(job)
    return job


def train_reader(config: Experiment, text: TextTower) -> BlockReader:
    """The reader of training blocks (its index costs a listing: this machine may have the footers cached)."""
    index = build_index(config.data.train, config.data.columns)
    mean = mean_vector(index, text_key(index, text), text.width) if config.text.center else None
    return BlockReader(
        index=index,
        image_size=config.data.image_size,
        limits=config.data.limits,
        seed=config.seed,
        augment=config.data.augment,
        text_key=None if config.text_online else text_key(index, text),
        text_width=text.width,
        tokens=tokens_of(text) if config.text_online else None,
        text_view=TextView(config.data.permuted_captions, mean, config.text.noise),
    )


def used_rows(index: Index, share: float) -> NDArray[np.int64]:
    """The rows of each row group that a run uses: int64 [G]."""
    return index.rows if share == 1 else np.floor(index.rows * share).astype(np.int64)


def text_key(index: Index, text: TextTower) -> str:
    """The key of a shard set's sidecars under this text tower."""
    assert index.columns.caption
    return sidecar_key(text.fingerprint, index.columns.caption)


def total_steps(config: Experiment, plan: Plan) -> int:
    """The run's length in steps, from whichever of epochs, steps and samples is given (samples round up)."""
    train = config.train
    if train.epochs is not None:
        return train.epochs * plan.steps_per_epoch
    if train.steps is not None:
        return train.steps
    assert train.samples is not None
    return -(-train.samples // train.global_batch)


def make_validation(config: Experiment, text: TextTower) -> Validation:
    """What `config.eval` asks for on `data.val`, class prompts embedded. Raises DataError for missing labels or sidecars."""
    assert config.data.val
    index = build_index(config.data.val, config.data.columns)
    key = None if config.text_online else text_key(index, text)
    if config.eval.retrieval and key:
        check_sidecars(index, key, text.width, every_row=True)
    if config.eval.zero_shot and not index.columns.label:
        raise DataError(f"{config.data.val}: zero-shot needs an integer label column; name it with data.columns.label")
    classes = class_sentences(config.eval.zero_shot, None if config.text_online else text)
    if classes:
        check_labels(index, len(classes.names))
    return Validation(
        reader=val_reader(config.data, index),
        batch=config.eval.batch,
        classes=classes,
        retrieval=config.eval.retrieval,
        text_key=key,
        text_width=text.width,
    )


def refuse_unknown_metric(name: str, where: str, validation: Validation | None) -> None:
    """Raise ConfigError unless the validation gives a metric of this name."""
    if validation is None:
        raise ConfigError(f"{where} = {name!r} needs a validation set: give data.val")
    classes = len(validation.classes.names) if validation.classes else 0
    names = metric_names(classes, validation.retrieval)
    if name not in names:
        raise ConfigError(
            f"{where} = {name!r} is not measured; this experiment measures {', '.join(names) or 'nothing'}"
        )


def check_labels(index: Index, classes: int) -> None:
    """Raise DataError unless every label is null, negative (unknown) or a class, and one at least is a class."""
    known = 0
    for shard in range(len(index.paths)):
        labels = read_column(index.location(shard), str(index.columns.label)).drop_null().to_numpy()
        if len(labels) and labels.max() >= classes:
            raise DataError(
                f"{index.location(shard)}: label {labels.max()}, but eval.zero_shot.classes names {classes} classes "
                "(labels count from 0). Give the classes of this data set, in the order of its labels."
            )
        known += int((labels >= 0).sum())
    if not known:
        raise DataError(f"{index.root}: no row has a label, so zero-shot has nothing to score")


def val_reader(data: Data, index: Index) -> BlockReader:
    """The reader of evaluation blocks: centre view, labels where there are any, no text vectors."""
    return BlockReader(index, data.image_size, data.limits, seed=0, augment=None, with_labels=True)


def class_names(zero_shot: ZeroShot) -> list[str]:
    """The class names, in label order. Raises ConfigError for a file that is absent, empty or no list of names."""
    if not isinstance(zero_shot.classes, str):
        return list(zero_shot.classes)
    where = f"eval.zero_shot.classes: {zero_shot.classes}"
    content = content_of(zero_shot.classes)
    if content is None:
        raise ConfigError(f"eval.zero_shot.classes: no such file: {zero_shot.classes}")
    names = [line.strip() for line in lines_of(content, where)]
    if not names:
        raise ConfigError(f"eval.zero_shot.classes: {zero_shot.classes} is empty; it needs one class name a line")
    return names


def class_sentences(zero_shot: ZeroShot | None, text: TextTower | None) -> Classes | None:
    """The classes to score, embedded where a tower is given: once on this machine, for all runs with these sentences."""
    if not zero_shot:
        return None
    names = class_names(zero_shot)
    if text is None:
        return Classes(tuple(names), zero_shot.templates, None)
    encode = partial(texts, encode=text.encode, fingerprint=text.fingerprint, cache=str(cache_folder("texts")))
    try:
        vectors = class_embeddings(encode, names, zero_shot.templates)
    except DataError as error:
        log.warning("%s: the class prompts are embedded, and not kept", error)
        vectors = class_embeddings(text.encode, names, zero_shot.templates)
    return Classes(tuple(names), zero_shot.templates, vectors)


def refuse_other_run(job: Job) -> None:
    """A run continues its own checkpoints alone. Raises CheckpointError listing every key that differs."""
    found = newest_whole(job.run, read_manifest)
    if found is None:
        return
    newest, manifest = found.location, found.read
    differing = [
        f"fingerprint of the {name}: {manifest['fingerprints'].get(name, 'none')[:12]} there, {value[:12]} here"
        for name, value in job.fingerprints.items()
        if manifest["fingerprints"].get(name) != value
    ]
    began = parse(
        Experiment, manifest["config"], [], where=newest
    )  # with the defaults of settings that it did not know
    here, there = _leaves(job.config.model_dump(mode="json")), _leaves(began.model_dump(mode="json"))
    differing += [
        f"{key}: {there.get(key)!r} there, {here.get(key)!r} here"
        for key in sorted(here.keys() | there.keys())
        if here.get(key) != there.get(key) and not key.startswith(FREE_TO_CHANGE)
    ]
    if differing:
        listed = "\n  ".join(differing)
        raise CheckpointError(
            f"{newest} belongs to another experiment:\n  {listed}\n"
            "Give this one another name (name=...), or remove that folder to start over."
        )


def _leaves(tree: object, prefix: str = "") -> dict[str, object]:
    if not isinstance(tree, dict):
        return {prefix.rstrip("."): tree}
    return {key: leaf for name, child in tree.items() for key, leaf in _leaves(child, f"{prefix}{name}.").items()}
