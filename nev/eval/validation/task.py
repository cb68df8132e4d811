"""A run's validation set: its reader, its classes, its checks, and the suite of tasks that it is scored by."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from nev.config.base import ConfigError
from nev.config.data import Columns, Data
from nev.config.eval import IMAGENET, ZeroShot
from nev.config.experiment import Experiment
from nev.data.block import BlockReader
from nev.data.image_sidecar import Features, TrunkFacts, check_image_sidecars, image_recipe
from nev.data.index import Index, build_index
from nev.data.index_cache import cache_folder
from nev.data.labels import parse_class_names
from nev.data.shard_labels import read_shard_labels
from nev.data.text_sidecar import check_sidecars, sidecar_key
from nev.embed.cache import embed_texts_cached
from nev.eval.metrics.zeroshot import class_embeddings
from nev.eval.suite import imagenet
from nev.eval.suite.schema import DataSource, Suite, Task
from nev.eval.suite.vectors import Embedded, Texts
from nev.eval.validation.texts import Classes
from nev.storage.reading import DataError, read_bytes

if TYPE_CHECKING:
    from nev.models.text import TextTower

log = logging.getLogger(__name__)
NO_COLUMNS = Columns()


class Result(NamedTuple):
    """The metrics of a validation, and the vectors that they were computed from."""

    metrics: dict[str, float]
    embedded: Embedded
    texts: Texts


@dataclass(frozen=True)
class Validation:
    """What a run scores on `data.val`.

    reader: reads the blocks of the set.
    batch: pictures embedded at a time.
    classes: of zero-shot; None for a run that does not score zero-shot.
    retrieval: captions are scored, too.
    text_key: key of the captions' sidecars; None where the text tower runs in the training loop.
    text_width: width D of the vectors.
    """

    reader: BlockReader
    batch: int
    classes: Classes | None
    retrieval: bool
    text_key: str | None
    text_width: int


def make_tasks(root: str, classes: Classes | None, retrieval: bool, columns: Columns = NO_COLUMNS) -> tuple[Task, ...]:
    """The tasks of a validation over the shards in `root`: `zero_shot`, `retrieval`, and the `space` of captioned pictures."""
    source = DataSource(format="hf-parquet", input=root, columns=columns)
    tasks = []
    if classes:
        names, templates = classes.names, classes.templates
        tasks.append(Task(name="zero_shot", kind="zero_shot", source=source, classes=names, templates=templates))
    if retrieval:
        tasks.append(Task(name="retrieval", kind="retrieval", source=source))
        tasks.append(Task(name="space", kind="alignment", source=source))
    return tuple(tasks)


def make_suite(task: Validation) -> Suite:
    """The validation as a suite. Raises ValueError for a validation that scores neither classes nor captions."""
    index = task.reader.index
    tasks = make_tasks(index.root, task.classes, task.retrieval, index.columns)
    return Suite(about="Validation", root=index.root, tasks=tasks)


def metric_names(zero_shot_classes: int, retrieves: bool) -> list[str]:
    """The metrics that a checkpoint can be chosen by.

    zero_shot_classes: 0 for no zero-shot.
    retrieves: captions are scored, too.
    """
    names = [f"zero_shot/top{k}" for k in (1, 5) if k < zero_shot_classes]
    names += ["zero_shot/mean_per_class", "zero_shot/macro_f1"] if zero_shot_classes else []
    ways = ("text_to_image", "image_to_text") if retrieves else ()
    names += [f"retrieval/{way}/r{k}" for way in ways for k in (1, 5, 10)]
    return names + (["retrieval/mean_recall_1"] if retrieves else [])


def text_key(index: Index, text: TextTower) -> str:
    """The key of a shard set's sidecars under this text tower."""
    assert index.columns.caption
    return sidecar_key(text.fingerprint, index.columns.caption)


def make_validation(config: Experiment, text: TextTower, trunk: TrunkFacts | None = None) -> Validation:
    """Read and check `data.val` for what `config.eval` scores, and embed the class prompts.

    text: the text tower before training.
    trunk: the locked trunk whose image sidecars are read, if the experiment reads sidecars. None: pictures are read.
    Raises DataError for labels or sidecars that are missing or do not fit.
    """
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
    features = None
    if trunk and config.vision.from_sidecars:
        features = Features(
            image_recipe(trunk.fingerprint, index.columns.image, config.data, config.seed, False), trunk.shape, 1
        )
        check_image_sidecars(index, features, every_row=True)
    return Validation(
        reader=val_reader(config.data, index, features),
        batch=config.eval.batch,
        classes=classes,
        retrieval=config.eval.retrieval,
        text_key=key,
        text_width=text.width,
    )


def refuse_unknown_metric(name: str, where: str, validation: Validation | None) -> None:
    """Raise ConfigError unless a checkpoint can be chosen by this metric. where: the setting that names the metric."""
    if validation is None:
        raise ConfigError(f"{where} = {name!r} needs a validation set: give data.val")
    classes = len(validation.classes.names) if validation.classes else 0
    names = metric_names(classes, validation.retrieval)
    if name not in names:
        raise ConfigError(
            f"{where} = {name!r} is not measured; this experiment measures {', '.join(names) or 'nothing'}"
        )


def check_labels(index: Index, classes: int) -> None:
    """Raise DataError unless every label is null, negative (unknown) or a class, and at least one row has a class."""
    known = 0
    for shard in range(len(index.paths)):
        labels = read_shard_labels(index, shard, needed=True)
        if len(labels) and labels.max() >= classes:
            raise DataError(
                f"{index.location(shard)}: label {labels.max()}, but eval.zero_shot.classes names {classes} classes "
                "(labels count from 0). Give the classes of this data set, in the order of its labels."
            )
        known += int((labels >= 0).sum())
    if not known:
        raise DataError(f"{index.root}: no row has a label, so zero-shot has nothing to score")


def read_labels(index: Index) -> NDArray[np.int64]:
    """The label of every row, int64 [n]; -1 where a label is null, or the set has no label column."""
    return np.concatenate([read_shard_labels(index, shard) for shard in range(len(index.paths))])


def val_reader(data: Data, index: Index, features: Features | None = None) -> BlockReader:
    """The reader of a validation set: the centre view, labels where the set has a label column, no text vectors.

    features: what is read of image sidecars in the place of pictures.
    """
    return BlockReader(index, data.image_size, data.limits, seed=0, augment=None, with_labels=True, features=features)


def class_names(zero_shot: ZeroShot) -> list[str]:
    """The class names in the order of the labels.

    Raises ConfigError for a file that is absent, empty or no list of names, and for ImageNet's where open_clip is not installed.
    """
    if zero_shot.classes == IMAGENET:
        return list(imagenet.read_names())
    if not isinstance(zero_shot.classes, str):
        return list(zero_shot.classes)
    where = f"eval.zero_shot.classes: {zero_shot.classes}"
    content = read_bytes(zero_shot.classes)
    if content is None:
        raise ConfigError(f"eval.zero_shot.classes: no such file: {zero_shot.classes}")
    names = [line.strip() for line in parse_class_names(content, where)]
    if not names:
        raise ConfigError(f"eval.zero_shot.classes: {zero_shot.classes} is empty; it needs one class name a line")
    return names


def class_sentences(zero_shot: ZeroShot | None, text: TextTower | None) -> Classes | None:
    """The classes to score. Their prompts are embedded once on this machine and cached, for all runs with the same prompts.

    text: None where the text tower runs in the training loop; the classes then have no vectors.
    """
    if not zero_shot:
        return None
    names = class_names(zero_shot)
    templates = imagenet.read_templates() if zero_shot.templates == IMAGENET else tuple(zero_shot.templates)
    if text is None:
        return Classes(tuple(names), templates, None)
    encode = partial(
        embed_texts_cached, encode=text.encode, fingerprint=text.fingerprint, cache=str(cache_folder("texts"))
    )
    try:
        vectors = class_embeddings(encode, names, templates)
    except DataError as error:
        log.warning("%s: the class prompts are embedded, but not cached", error)
        vectors = class_embeddings(text.encode, names, templates)
    return Classes(tuple(names), templates, vectors)
