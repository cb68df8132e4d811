"""From a set in the shared space to a task's score: a function for each kind."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from nev.config.base import ConfigError
from nev.data.decode import Picture
from nev.data.text_sidecar import Encode
from nev.eval.metrics import classification
from nev.eval.metrics.compression import compressions
from nev.eval.metrics.intervals import Interval, interval, interval_from_draws
from nev.eval.metrics.ranks import Floats, Ints
from nev.eval.metrics.retrieval import Ranks, recalls, retrieval_ranks
from nev.eval.metrics.zeroshot import class_embeddings, zero_shot_ranks
from nev.eval.suite.association import jaccard
from nev.eval.suite.collection import Collection
from nev.eval.suite.prompts import load_prompts
from nev.eval.suite.reading import Reading
from nev.eval.suite.results import TaskResult, make_result
from nev.eval.suite.schema import Group, Task
from nev.eval.suite.vectors import Pairs, Texts, make_pairs

RETRIEVAL_KS = (1, 5, 10)


class Context(NamedTuple):
    """What a task is scored with, beside its set.

    scale: 1 / temperature of the model.
    texts: vectors of the class prompts and the captions, where these are known already.
    encode: sentences to unit vectors, float32 [n, D], for the texts that are not known. None: all are known.
    root: folder of the suite.
    reading: how the set was read. None: the set is a run's own.
    pictures: rows of the set to what the model sees of them, uint8 [S, S, 3] each.
    calibration: also measure the calibration of zero-shot, which takes several times as long as its shares.
    """

    scale: float
    texts: Texts = Texts()
    encode: Encode | None = None
    root: str = ""
    reading: Reading | None = None
    pictures: Callable[[Sequence[int]], list[Picture]] | None = None
    calibration: bool = True


class Labelled(NamedTuple):
    """Pictures with a class, and the classes.

    images: float32 [n, D]. labels: int64 [n]. rows: int64 [n], of the set. classes: float32 [C, D]. names: of the classes.
    """

    images: Floats
    labels: Ints
    rows: Ints
    classes: Floats
    names: tuple[str, ...]


def score(task: Task, collection: Collection, context: Context) -> TaskResult:
    """The result of a task. Raises ConfigError or ValueError, with the reason, where this set cannot be scored so."""
    valid = collection.embedded.valid
    if not valid.any():
        reasons = "; ".join(sorted({fact.reason for fact in collection.facts})[:3])
        raise ConfigError(f"no picture of {len(valid)} can be decoded{reasons and f' ({reasons})'}")
    return SCORES[task.kind](task, collection, context)


def _zero_shot(task: Task, collection: Collection, context: Context) -> TaskResult:
    images, labels, rows, classes, names = labelled_images(task, collection, context)
    ranks = zero_shot_ranks(images, labels, classes, names=names)
    answers = classification.rank_answers(ranks, images, labels, classes, names)
    metrics = {
        "mean_per_class": classification.mean_per_class(answers),
        "macro_f1": classification.macro_f1(answers),
    }
    if task.group:
        groups = read_groups(task.group, collection, rows)
        metrics |= {f"worst_group_top{k}": classification.worst_group(answers, groups, k) for k in (1, 5)}
    top = {f"top{k}": ranks < k for k in (1, 5) if k < len(classes)}
    values = {name: float(np.mean(hits)) for name, hits in top.items()}
    values |= {name: metric(np.ones(len(labels))) for name, metric in metrics.items()}
    intervals = {name: interval(hits) for name, hits in top.items()}
    intervals |= {name: interval_from_draws(metric, len(labels)) for name, metric in metrics.items()}
    if context.calibration:
        fitted = classification.fit_scale(images, labels, classes)
        for name, scale in (("", context.scale), ("_fitted", fitted)):
            values[f"calibration_error{name}"] = classification.calibration_error(images, labels, classes, scale)
        values |= {"scale": context.scale, "scale_fitted": fitted}
    table = [
        {"right": names[right], "given": names[wrong], "share": share}
        for right, wrong, share in classification.confusions(answers, 10)
    ]
    chance = compute_chance(task.judged_by, len(classes))
    return make_result(task, values, intervals, chance, table=tuple(table), **_counts(collection, len(rows)))


def _retrieval(task: Task, collection: Collection, context: Context) -> TaskResult:
    pairs = image_text_pairs(collection, context)
    ranks = retrieval_ranks(*pairs)
    metrics = {
        name.removeprefix("retrieval/").replace("/", "_"): value for name, value in recalls(ranks, pairs.owner).items()
    }
    intervals: dict[str, Interval] = {}
    for k in RETRIEVAL_KS:
        intervals[f"text_to_image_r{k}"] = interval(ranks.texts < k, pairs.owner)
        intervals[f"image_to_text_r{k}"] = interval(ranks.images < k)
    metrics["mean_recall_1"] = mean_recall(ranks, pairs.owner)(np.ones(len(pairs.images)))
    intervals["mean_recall_1"] = interval_from_draws(mean_recall(ranks, pairs.owner), len(pairs.images))
    metrics["mean_recall_1_chance"] = (metrics["text_to_image_r1_chance"] + metrics["image_to_text_r1_chance"]) / 2
    chance = metrics[f"{task.judged_by}_chance"]
    return make_result(task, metrics, intervals, chance, **_counts(collection, len(pairs.images)))


def _alignment(task: Task, collection: Collection, context: Context) -> TaskResult:
    from nev.eval.metrics.geometry import FOLDS, geometry  # imports scikit-learn, which takes a second
    from nev.eval.metrics.mixed_retrieval import mixed_retrieval, text_retrieval

    pairs = image_text_pairs(collection, context)
    if min(len(pairs.images), len(pairs.texts)) < FOLDS:
        raise ConfigError(f"{len(pairs.images)} pictures with captions are too few: {FOLDS} are needed")
    numbers = geometry(*pairs) | mixed_retrieval(*pairs) | text_retrieval(pairs.texts, pairs.owner)
    metrics = {name.replace("space/", "").replace("/", "_"): value for name, value in numbers.items()}
    if task.judged_by not in metrics:
        raise ConfigError("the overlap of neighbourhoods needs more than ten pictures with captions")
    table = tuple(histogram(pairs))
    return make_result(task, metrics, {}, None, table=table, **_counts(collection, len(pairs.images)))


def _compression(task: Task, collection: Collection, context: Context) -> TaskResult:
    if task.classes or task.templates or not any(fact.captions for fact in collection.facts):
        labelled = labelled_images(task, collection, context)

        def measure(images: Floats, others: Floats) -> float:
            return float(np.mean(zero_shot_ranks(images, labelled.labels, others, names=labelled.names) < 1))

        table, scored = list(compressions(labelled.images, labelled.classes, measure)), len(labelled.rows)
    else:
        pairs = image_text_pairs(collection, context)

        def measure(images: Floats, others: Floats) -> float:
            ranks = retrieval_ranks(images, others, pairs.owner)
            return mean_recall(ranks, pairs.owner)(np.ones(len(images)))

        table, scored = list(compressions(pairs.images, pairs.texts, measure)), len(pairs.images)
    full, metrics = table[0].score, {f"{row.precision}_{row.width}": row.score for row in table}
    metrics["retained"] = metrics[f"int8_{table[0].width}"] / full if full else 0.0
    rows = tuple(row._asdict() for row in table)
    return make_result(task, metrics, {}, None, table=rows, **_counts(collection, scored))


def _robustness(task: Task, collection: Collection, context: Context) -> TaskResult:
    labelled = labelled_images(task, collection, context)

    def right(images: Floats) -> NDArray[np.bool_]:
        return zero_shot_ranks(images, labelled.labels, labelled.classes, names=labelled.names) < 1

    clean = right(labelled.images)
    hits = {variant: right(vectors[labelled.rows]) for variant, vectors in collection.corrupted.items()}
    shares = {f"{name}_{severity}": float(np.mean(share)) for (name, severity), share in hits.items()}
    each = np.mean(list(hits.values()), axis=0)  # of a picture, over its corruptions

    def retained(weights: NDArray[np.float64]) -> float:
        before = float(weights @ clean)
        return float(weights @ each) / before if before else 0.0

    metrics = {"clean": float(np.mean(clean)), "corrupted": float(np.mean(each)), **shares}
    metrics["retained"] = retained(np.ones(len(clean)))
    intervals = {
        "retained": interval_from_draws(retained, len(clean)),
        "clean": interval(clean),
        "corrupted": interval(each),
    }
    table = [
        {"corruption": name, "severity": severity, "top1": float(np.mean(right))}
        for (name, severity), right in hits.items()
    ]
    return make_result(task, metrics, intervals, None, table=tuple(table), **_counts(collection, len(labelled.rows)))


def _association(task: Task, collection: Collection, context: Context) -> TaskResult:
    assert context.encode
    metrics, intervals = jaccard(task, collection, context.encode, context.root)
    return make_result(task, metrics, intervals, None, **_counts(collection, int(collection.embedded.valid.sum())))


SCORES: dict[str, Callable[[Task, Collection, Context], TaskResult]] = {
    "zero_shot": _zero_shot,
    "retrieval": _retrieval,
    "alignment": _alignment,
    "compression": _compression,
    "robustness": _robustness,
    "association": _association,
}


def labelled_images(task: Task, collection: Collection, context: Context) -> Labelled:
    """The pictures that have a class, and the classes. Raises ConfigError as `load_prompts` does, and for no such picture."""
    images, valid, labels = collection.embedded
    rows = np.flatnonzero(valid & (labels >= 0))
    if not len(rows):
        raise ConfigError("no row has a label and a picture that can be decoded")
    if context.texts.classes is not None:
        assert isinstance(task.classes, tuple)
        return Labelled(images[rows], labels[rows], rows, context.texts.classes, task.classes)
    assert context.encode
    assert context.reading
    prompts = load_prompts(task, context.reading, collection.facts, labels.tolist(), context.root)
    classes = class_embeddings(context.encode, prompts.names, prompts.templates)
    return Labelled(images[rows], labels[rows], rows, classes, prompts.names)


def image_text_pairs(collection: Collection, context: Context) -> Pairs:
    """The pictures that can be decoded and have captions, and all their captions. Raises ConfigError for none."""
    texts = context.texts if context.texts.captions is not None else _encode_captions(collection, context)
    return make_pairs(collection.embedded, texts)


def _encode_captions(collection: Collection, context: Context) -> Texts:
    """The captions of the pictures that can be decoded. Raises ConfigError for none."""
    assert context.encode
    captioned = captioned_rows(collection)
    if not captioned:
        raise ConfigError("no row has a caption and a picture that can be decoded")
    sentences = [caption for row in captioned for caption in collection.facts[row].captions]
    owner = np.repeat(captioned, [len(collection.facts[row].captions) for row in captioned])
    return Texts(None, context.encode(sentences), owner)


def captioned_rows(collection: Collection) -> list[int]:
    """The rows that have captions and a picture that can be decoded."""
    valid = collection.embedded.valid
    return [row for row, fact in enumerate(collection.facts) if fact.captions and valid[row]]


def mean_recall(ranks: Ranks, owner: Ints) -> Callable[[NDArray[np.float64]], float]:
    """DataComp's metric, the mean of recall@1 both ways, as a function of the weights of the pictures, float64 [n]."""
    texts, images = (ranks.texts < 1).astype(np.float64), (ranks.images < 1).astype(np.float64)

    def mean(weights: NDArray[np.float64]) -> float:
        queries = weights[owner]
        return float((queries @ texts / queries.sum() + weights @ images / weights.sum()) / 2)

    return mean


def read_groups(group: Group, collection: Collection, rows: Ints) -> Ints:
    """The group of each of some rows: int64, -1 for no group. Raises ConfigError where no row is in a group."""
    values = []
    for row in rows.tolist():
        value = collection.facts[row].extra.get(group.field)
        value = value[group.place] if isinstance(value, list) and group.place < len(value) else value
        values.append(None if value is None or isinstance(value, list) or str(value) in group.leave_out else str(value))
    names = sorted({name for name in values if name is not None})
    if not names:
        raise ConfigError(f"no row has {group.field!r} ({group.place}), which names its group")
    return np.array([-1 if name is None else names.index(name) for name in values], np.int64)


def histogram(pairs: Pairs, bins: int = 60, seed: int = 0) -> list[dict[str, float]]:
    """Cosines of captions with their own pictures, and with other pictures drawn by `seed`: shares by bins of the cosine."""
    own = np.einsum("td,td->t", pairs.images[pairs.owner], pairs.texts)
    away = np.random.default_rng(seed).integers(1, max(2, len(pairs.images)), len(pairs.owner))
    other = np.einsum("td,td->t", pairs.images[(pairs.owner + away) % len(pairs.images)], pairs.texts)
    edges = np.linspace(min(own.min(), other.min()), max(own.max(), other.max()) + 1e-6, bins + 1)
    counts = [np.histogram(cosines, edges)[0] / len(cosines) for cosines in (own, other)]
    return [
        {"from": float(a), "to": float(b), "own": float(o), "others": float(x)}
        for a, b, o, x in zip(edges, edges[1:], *counts, strict=False)
    ]


def compute_chance(metric: str, classes: int) -> float | None:
    """The score of guessing among C classes; None where no formula gives it."""
    if metric == "macro_f1":
        return None
    return min(1.0, (5 if metric.endswith("top5") else 1) / classes)


def _counts(collection: Collection, scored: int) -> dict[str, int]:
    valid = collection.embedded.valid
    return {"images": scored, "bad": int((~valid).sum()), "unmarked": int(valid.sum()) - scored}
