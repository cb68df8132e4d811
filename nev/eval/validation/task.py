"""What a run's validation asks of its set: the reader, the classes, the captions, and the metrics that come of them."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

from nev.config.base import ConfigError
from nev.config.data import Data
from nev.config.experiment import Experiment, ZeroShot
from nev.data.block import BlockReader
from nev.data.index import Index, build_index
from nev.data.index_cache import cache_folder
from nev.data.labels import parse_class_names
from nev.data.sidecar import check_sidecars, sidecar_key
from nev.embed.cache import embed_texts_cached
from nev.eval.metrics.zeroshot import class_embeddings
from nev.eval.validation.scoring import Embedded
from nev.eval.validation.texts import Classes, Texts
from nev.storage.reading import DataError, read_bytes, read_column

if TYPE_CHECKING:
    from nev.models.text import TextTower


class Result(NamedTuple):
    """The metrics of a validation, and the vectors that they were computed from."""

    metrics: dict[str, float]
    embedded: Embedded
    texts: Texts


@dataclass(frozen=True)
class Validation:
    """What to score. retrieval uses the captions' sidecars under `text_key`, None where the text tower runs in the loop."""

    reader: BlockReader
    batch: int
    classes: Classes | None
    retrieval: bool
    text_key: str | None
    text_width: int


def metric_names(zero_shot_classes: int, retrieves: bool) -> list[str]:
    """What a validation with so many classes (0: no zero-shot) and with or without retrieval can be judged by."""
    names = [f"zero_shot/top{k}" for k in (1, 5) if k < zero_shot_classes]
    ways = ("text_to_image", "image_to_text") if retrieves else ()
    return names + [f"retrieval/{way}/r{k}" for way in ways for k in (1, 5, 10)]


log = logging.getLogger(__name__)


def text_key(index: Index, text: TextTower) -> str:
    """The key of a shard set's sidecars under this text tower."""
    assert index.columns.caption
    return sidecar_key(text.fingerprint, index.columns.caption)


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
    content = read_bytes(zero_shot.classes)
    if content is None:
        raise ConfigError(f"eval.zero_shot.classes: no such file: {zero_shot.classes}")
    names = [line.strip() for line in parse_class_names(content, where)]
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
    encode = partial(
        embed_texts_cached, encode=text.encode, fingerprint=text.fingerprint, cache=str(cache_folder("texts"))
    )
    try:
        vectors = class_embeddings(encode, names, zero_shot.templates)
    except DataError as error:
        log.warning("%s: the class prompts are embedded, and not kept", error)
        vectors = class_embeddings(text.encode, names, zero_shot.templates)
    return Classes(tuple(names), zero_shot.templates, vectors)
