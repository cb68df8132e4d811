"""From a set in the shared space to a task's score: one function a kind."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from nev.config.base import ConfigError
from nev.eval.metrics import classification
from nev.eval.metrics.compression import compressions
from nev.eval.metrics.geometry import FOLDS, geometry
from nev.eval.metrics.intervals import Interval, interval, interval_from_draws
from nev.eval.metrics.mixed_retrieval import mixed_retrieval
from nev.eval.metrics.ranks import Floats, Ints
from nev.eval.metrics.retrieval import Ranks, recalls, retrieval_ranks
from nev.eval.metrics.zeroshot import class_embeddings, zero_shot_ranks
from nev.eval.suite.association import jaccard
from nev.eval.suite.collection import Collection
from nev.eval.suite.prompts import load_prompts
from nev.eval.suite.reading import Reading
from nev.eval.suite.results import TaskResult, make_result
from nev.eval.suite.schema import Group, Task
from nev.eval.validation.scoring import Pairs

RETRIEVAL_KS = (1, 5, 10)


class Context(NamedTuple):
    """What a task is scored with. encode: sentences to vectors; scale: the model's 1 / temperature; root: the suite's."""

    encode: Callable[[Sequence[str]], NDArray[np.float32]]
    scale: float
    root: str
    reading: Reading


class Labelled(NamedTuple):
    """Pictures with a class, [n, D] and int64 [n], the rows that they are of, and the classes, [C, D], with their names."""

    images: Floats
    labels: Ints
    rows: Ints
    classes: Floats
    names: tuple[str, ...]


def score(task: Task, found: Collection, context: Context) -> TaskResult:
    """A task's record. Raises ConfigError or ValueError, saying why, where this data cannot be scored so."""
    if not found.embedded.valid.any():
        reasons = sorted({fact.reason for fact in found.facts})[:3]
        raise ConfigError(f"no picture of {len(found.facts)} can be decoded ({'; '.join(reasons) or 'there are none'})")
    return SCORES[task.kind](task, found, context)


def _zero_shot(task: Task, found: Collection, context: Context) -> TaskResult:
    seen = labelled_images(task, found, context)
    ranks = zero_shot_ranks(seen.images, seen.labels, seen.classes)
    given = classification.rank_answers(ranks, seen.images, seen.labels, seen.classes)
    metrics = {
        "top1": classification.top_k(given, 1),
        "mean_per_class": classification.mean_per_class(given),
        "macro_f1": classification.macro_f1(given),
    }
    if len(seen.classes) > 5:
        metrics["top5"] = classification.top_k(given, 5)
    if task.group:
        groups = read_groups(task.group, found, seen.rows)
        metrics |= {f"worst_group_top{k}": classification.worst_group(given, groups, k) for k in (1, 5)}
    whole = np.ones(len(seen.labels))
    values = {name: metric(whole) for name, metric in metrics.items()}
    sure = {name: interval_from_draws(metric, len(seen.labels)) for name, metric in metrics.items()}
    fitted = classification.fit_scale(seen.images, seen.labels, seen.classes)
    for name, scale in (("", context.scale), ("_fitted", fitted)):
        values[f"calibration_error{name}"] = classification.calibration_error(
            seen.images, seen.labels, seen.classes, scale
        )
    values |= {"scale": context.scale, "scale_fitted": fitted}
    table = [
        {"right": seen.names[right], "given": seen.names[wrong], "share": share}
        for right, wrong, share in classification.confusions(given, 10)
    ]
    chance = compute_chance(task.judged_by, len(seen.classes))
    return make_result(task, values, sure, chance, table=tuple(table), **_counts(found, len(seen.rows)))


def _retrieval(task: Task, found: Collection, context: Context) -> TaskResult:
    pairs = image_text_pairs(found, context)
    ranks = retrieval_ranks(*pairs)
    metrics = {
        name.removeprefix("retrieval/").replace("/", "_"): value for name, value in recalls(ranks, pairs.owner).items()
    }
    sure: dict[str, Interval] = {}
    for k in RETRIEVAL_KS:
        sure[f"text_to_image_r{k}"] = interval(ranks.texts < k, pairs.owner)
        sure[f"image_to_text_r{k}"] = interval(ranks.images < k)
    metrics["mean_recall_1"] = mean_recall(ranks, pairs.owner)(np.ones(len(pairs.images)))
    sure["mean_recall_1"] = interval_from_draws(mean_recall(ranks, pairs.owner), len(pairs.images))
    metrics["mean_recall_1_chance"] = (metrics["text_to_image_r1_chance"] + metrics["image_to_text_r1_chance"]) / 2
    return make_result(task, metrics, sure, metrics[f"{task.judged_by}_chance"], **_counts(found, len(pairs.images)))


def _alignment(task: Task, found: Collection, context: Context) -> TaskResult:
    pairs = image_text_pairs(found, context)
    if min(len(pairs.images), len(pairs.texts)) < FOLDS:
        raise ConfigError(f"{len(pairs.images)} pictures with captions are too few: {FOLDS} are needed")
    numbers = geometry(*pairs) | mixed_retrieval(*pairs)
    metrics = {name.replace("space/", "").replace("/", "_"): value for name, value in numbers.items()}
    if task.judged_by not in metrics:
        raise ConfigError("the overlap of neighbourhoods needs more than ten pictures with captions")
    return make_result(task, metrics, {}, None, table=tuple(histogram(pairs)), **_counts(found, len(pairs.images)))


def _compression(task: Task, found: Collection, context: Context) -> TaskResult:
    if task.classes or task.templates or not any(fact.captions for fact in found.facts):
        seen = labelled_images(task, found, context)

        def right(images: Floats, others: Floats) -> float:
            return float(np.mean(zero_shot_ranks(images, seen.labels, others) < 1))

        table, scored = list(compressions(seen.images, seen.classes, right)), len(seen.rows)
    else:
        pairs = image_text_pairs(found, context)

        def right(images: Floats, others: Floats) -> float:
            ranks = retrieval_ranks(images, others, pairs.owner)
            return mean_recall(ranks, pairs.owner)(np.ones(len(images)))

        table, scored = list(compressions(pairs.images, pairs.texts, right)), len(pairs.images)
    full, metrics = table[0].score, {f"{one.precision}_{one.width}": one.score for one in table}
    metrics["retained"] = metrics[f"int8_{table[0].width}"] / full if full else 0.0
    return make_result(task, metrics, {}, None, table=tuple(one._asdict() for one in table), **_counts(found, scored))


def _robustness(task: Task, found: Collection, context: Context) -> TaskResult:
    seen = labelled_images(task, found, context)
    clean = zero_shot_ranks(seen.images, seen.labels, seen.classes) < 1
    hits = {
        variant: zero_shot_ranks(vectors[seen.rows], seen.labels, seen.classes) < 1
        for variant, vectors in found.corrupted.items()
    }
    shares = {f"{name}_{severity}": float(np.mean(right)) for (name, severity), right in hits.items()}
    each = np.mean(list(hits.values()), axis=0)  # of a picture, over its corruptions

    def retained(weights: NDArray[np.float64]) -> float:
        before = float(weights @ clean)
        return float(weights @ each) / before if before else 0.0

    metrics = {"clean": float(np.mean(clean)), "corrupted": float(np.mean(each)), **shares}
    metrics["retained"] = retained(np.ones(len(clean)))
    sure = {
        "retained": interval_from_draws(retained, len(clean)),
        "clean": interval(clean),
        "corrupted": interval(each),
    }
    table = [
        {"corruption": name, "severity": severity, "top1": float(np.mean(right))}
        for (name, severity), right in hits.items()
    ]
    return make_result(task, metrics, sure, None, table=tuple(table), **_counts(found, len(seen.rows)))


def _association(task: Task, found: Collection, context: Context) -> TaskResult:
    metrics, sure = jaccard(task, found, context.encode, context.root)
    return make_result(task, metrics, sure, None, **_counts(found, int(found.embedded.valid.sum())))


SCORES: dict[str, Callable[[Task, Collection, Context], TaskResult]] = {
    "zero_shot": _zero_shot,
    "retrieval": _retrieval,
    "alignment": _alignment,
    "compression": _compression,
    "robustness": _robustness,
    "association": _association,
}


def labelled_images(task: Task, found: Collection, context: Context) -> Labelled:
    """The pictures that have a class, and the classes as sentences. Raises ConfigError as `load_prompts` does, and for none."""
    rows = np.flatnonzero(found.embedded.valid & (found.embedded.labels >= 0))
    if not len(rows):
        raise ConfigError("no row has a label and a picture that can be decoded")
    prompts = load_prompts(task, context.reading, found.facts, found.embedded.labels.tolist(), context.root)
    classes = class_embeddings(context.encode, prompts.names, prompts.templates)
    return Labelled(found.embedded.images[rows], found.embedded.labels[rows], rows, classes, prompts.names)


def image_text_pairs(found: Collection, context: Context) -> Pairs:
    """The pictures that can be decoded and have captions, and these, all of them. Raises ConfigError for none."""
    rows = [row for row, fact in enumerate(found.facts) if fact.captions and found.embedded.valid[row]]
    if not rows:
        raise ConfigError("no row has a caption and a picture that can be decoded")
    captions = [found.facts[row].captions for row in rows]
    owner = np.repeat(np.arange(len(rows)), [len(of_row) for of_row in captions])
    return Pairs(found.embedded.images[rows], context.encode([one for of_row in captions for one in of_row]), owner)


def mean_recall(ranks: Ranks, owner: Ints) -> Callable[[NDArray[np.float64]], float]:
    """The mean of recall@1 both ways, as DataComp has it, from how often each image counts."""
    texts, images = (ranks.texts < 1).astype(np.float64), (ranks.images < 1).astype(np.float64)

    def of(weights: NDArray[np.float64]) -> float:
        asked = weights[owner]
        return float((asked @ texts / asked.sum() + weights @ images / weights.sum()) / 2)

    return of


def read_groups(group: Group, found: Collection, rows: Ints) -> Ints:
    """The group of each of some rows, int64, -1 for none. Raises ConfigError where no row is in one."""
    told = []
    for row in rows.tolist():
        value = found.facts[row].extra.get(group.field)
        value = value[group.place] if isinstance(value, list) and group.place < len(value) else value
        told.append(None if value is None or isinstance(value, list) or str(value) in group.leave_out else str(value))
    names = sorted({name for name in told if name is not None})
    if not names:
        raise ConfigError(f"no row has {group.field!r} ({group.place}), by which the groups are told")
    return np.array([-1 if name is None else names.index(name) for name in told], np.int64)


def histogram(pairs: Pairs, bins: int = 60, seed: int = 0) -> list[dict[str, float]]:
    """How similar captions are to their own images, and to others drawn at random: shares by bins of the cosine."""
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
    """What guessing scores, where that is known: k of C classes."""
    if metric == "macro_f1":
        return None
    return min(1.0, (5 if metric.endswith("top5") else 1) / classes)


def _counts(found: Collection, scored: int) -> dict[str, int]:
    bad = int((~found.embedded.valid).sum())
    return {"images": scored, "bad": bad, "unmarked": len(found.facts) - bad - scored}
