"""The pictures of a report: where a model is right and wrong, and plots of finer results."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from nev.eval.metrics import classification
from nev.eval.metrics.neighbours import nearest
from nev.eval.metrics.ranks import Floats, Ints
from nev.eval.metrics.retrieval import retrieval_ranks
from nev.eval.metrics.zeroshot import zero_shot_ranks
from nev.eval.report.plots import COLOURS, INK, colours, curve, dress, gallery, new_figure, save
from nev.eval.suite.collection import Collection
from nev.eval.suite.results import TaskResult
from nev.eval.suite.schema import Task
from nev.eval.suite.tasks import Context, Labelled, captioned_rows, image_text_pairs, labelled_images
from nev.runs.metrics_log import MetricPoint

QUERIES, RESULTS = 5, 5
DRAWN_QUERIES, DRAWN_RESULTS = 7, 6  # of the galleries that choose no query by its score
WORST = 8  # classes of a confusion matrix that cannot hold all
DOTS = 1000  # of each modality in the map of the space


class Figure(NamedTuple):
    """A picture of a report. title: NAME: what the picture shows. path: a PNG."""

    title: str
    path: Path


def make_figures(
    task: Task, collection: Collection, context: Context, result: TaskResult, folder: Path
) -> list[Figure]:
    """Draw the pictures of a task that was scored, as TASK-NAME.png in `folder`."""
    figures = []
    for title, draw in FIGURES.get(task.kind, {}).items():
        path = folder / f"{task.name}-{title.split(':')[0].replace(' ', '-')}.png"
        draw(task, collection, context, result, path)
        figures.append(Figure(title, path))
    return figures


def _drawn_captions(task: Task, collection: Collection, context: Context, result: TaskResult, path: Path) -> None:
    """Captions drawn at random, with the pictures nearest to each."""
    count = len(image_text_pairs(collection, context).texts)
    chosen = np.random.default_rng(0).choice(count, min(DRAWN_QUERIES, count), replace=False)
    _caption_gallery(path, collection, context, chosen, DRAWN_RESULTS)


def _ranked_captions(best: bool) -> Callable[..., None]:
    """Captions whose own picture ranks first, or ranks furthest behind, with the pictures nearest to each."""

    def draw(task: Task, collection: Collection, context: Context, result: TaskResult, path: Path) -> None:
        pairs = image_text_pairs(collection, context)
        ranks = retrieval_ranks(*pairs).texts
        order = np.random.default_rng(0).permutation(len(ranks))
        order = order[np.argsort(ranks[order] if best else -ranks[order], kind="stable")]
        _, first = np.unique(pairs.owner[order], return_index=True)  # one caption for each picture
        chosen = order[np.sort(first)][:QUERIES]
        notes = None if best else [f" (its own is number {rank + 1:,})" for rank in ranks[chosen].tolist()]
        _caption_gallery(path, collection, context, chosen, RESULTS, notes)

    return draw


def _caption_gallery(
    path: Path,
    collection: Collection,
    context: Context,
    chosen: Ints,
    results: int,
    notes: Sequence[str] | None = None,
) -> None:
    """The pictures nearest to each of some captions; a caption's own picture is framed."""
    pairs = image_text_pairs(collection, context)
    rows = np.array(captioned_rows(collection))
    captions = [caption for row in rows for caption in collection.facts[row].captions]
    queries = [captions[text] + (notes[place] if notes else "") for place, text in enumerate(chosen.tolist())]
    hits = nearest(pairs.texts[chosen], pairs.images, results)
    correct = hits.rows == pairs.owner[chosen][:, None]
    _gallery(path, context, queries, rows[hits.rows], hits.scores, correct)


def _drawn_classes(task: Task, collection: Collection, context: Context, result: TaskResult, path: Path) -> None:
    """Classes at even distances in the list, with the pictures nearest to each."""
    labelled = labelled_images(task, collection, context)
    last = len(labelled.names) - 1
    chosen = np.unique(np.linspace(0, last, DRAWN_QUERIES).round().astype(np.int64))
    _class_gallery(path, context, labelled, chosen, DRAWN_RESULTS)


def _mistakes(task: Task, collection: Collection, context: Context, result: TaskResult, path: Path) -> None:
    """The classes of the lowest accuracy, with the pictures nearest to each."""
    labelled = labelled_images(task, collection, context)
    worst = np.argsort(classification.per_class(_rank_classes(labelled)), kind="stable")[:QUERIES]
    _class_gallery(path, context, labelled, worst, RESULTS)


def _rank_classes(labelled: Labelled) -> classification.Answers:
    images, labels, _, classes, names = labelled
    return classification.rank_answers(
        zero_shot_ranks(images, labels, classes, names=names), images, labels, classes, names
    )


def _class_gallery(path: Path, context: Context, labelled: Labelled, chosen: Ints, results: int) -> None:
    """The pictures nearest to each of some classes; pictures of the class are framed."""
    hits = nearest(labelled.classes[chosen], labelled.images, results)
    correct = labelled.labels[hits.rows] == chosen[:, None]
    queries = [labelled.names[label] for label in chosen.tolist()]
    _gallery(path, context, queries, labelled.rows[hits.rows], hits.scores, correct)


def _gallery(
    path: Path, context: Context, queries: Sequence[str], rows: Ints, scores: Floats, correct: np.ndarray
) -> None:
    """rows: int64 [Q, K], of the set. scores: float32 [Q, K]. correct: bool [Q, K]."""
    assert context.pictures
    distinct = np.unique(rows).tolist()
    views = dict(zip(distinct, context.pictures(distinct), strict=True))
    gallery(path, queries, [[views[row] for row in line] for line in rows.tolist()], scores.tolist(), correct.tolist())


def _confusion(task: Task, collection: Collection, context: Context, result: TaskResult, path: Path) -> None:
    """Of the classes of the lowest accuracy: the share of their pictures that is predicted to be of each class."""
    labelled = labelled_images(task, collection, context)
    answers = _rank_classes(labelled)
    shares = classification.per_class(answers)
    known = [int(label) for label in np.argsort(shares, kind="stable") if np.isfinite(shares[label])]
    worst = known if len(known) <= WORST + WORST // 2 else known[:WORST]
    counts = [np.bincount(answers.predicted[answers.labels == label], minlength=len(labelled.names)) for label in worst]
    confused = np.array(counts) / np.sum(counts, axis=1, keepdims=True)
    often = [int(label) for label in np.argsort(-confused.sum(0), kind="stable") if label not in worst]
    columns = [*worst, *often[: WORST // 2]]
    table, names = confused[:, columns], [labelled.names[label][:18] for label in columns]
    if len(columns) < len(labelled.names):
        table, names = np.concatenate([table, 1 - table.sum(1, keepdims=True)], axis=1), [*names, "others"]
    figure = new_figure(7.5, 5.5)
    axes = figure.subplots()
    axes.imshow(table, cmap="Blues", vmin=0, vmax=1)
    axes.set_xticks(range(len(names)), names, rotation=40, ha="right", parse_math=False)
    axes.set_yticks(range(len(worst)), names[: len(worst)], parse_math=False)
    for row, line in enumerate(table):
        for column, share in enumerate(line):
            axes.text(
                column, row, f"{share:.0%}", ha="center", va="center", fontsize=8, color="white" if share > 0.5 else INK
            )
    axes.set_xlabel("predicted", color=INK)
    axes.set_ylabel("true", color=INK)
    save(figure, path)


def _histogram(task: Task, collection: Collection, context: Context, result: TaskResult, path: Path) -> None:
    """Cosines of captions with their own pictures, and with others."""
    figure = new_figure(7, 3.6)
    axes = figure.subplots()
    left = [row["from"] for row in result.table]
    width = result.table[0]["to"] - result.table[0]["from"]
    for name, label, colour in (("others", "another picture", COLOURS[5]), ("own", "its own picture", COLOURS[0])):
        axes.bar(left, [row[name] for row in result.table], width, align="edge", color=colour, alpha=0.65, label=label)
    dress(axes, "cosine of a caption with", "share", legend=True)
    save(figure, path)


def _map(task: Task, collection: Collection, context: Context, result: TaskResult, path: Path) -> None:
    """Images and texts on the two directions in which all of them vary most (principal components)."""
    pairs = image_text_pairs(collection, context)
    rng = np.random.default_rng(0)
    sides = [_some(side, rng) for side in (pairs.images, pairs.texts)]
    rows = np.concatenate(sides)
    mean = rows.mean(0)
    _, strength, directions = np.linalg.svd(rows - mean, full_matrices=False)
    explained = strength[:2] ** 2 / (strength**2).sum()
    figure = new_figure(6, 4.8)
    axes = figure.subplots()
    for side, label, colour in zip(sides, ("images", "texts"), COLOURS, strict=False):
        at = (side - mean) @ directions[:2].T
        axes.scatter(at[:, 0], at[:, 1], s=7, alpha=0.5, color=colour, label=label, linewidths=0)
    dress(axes, f"first component ({explained[0]:.0%} of the variance)", f"second ({explained[1]:.0%})", legend=True)
    save(figure, path)


def _some(rows: Floats, rng: np.random.Generator) -> Floats:
    return rows[rng.choice(len(rows), min(DOTS, len(rows)), replace=False)]


def _sizes(task: Task, collection: Collection, context: Context, result: TaskResult, path: Path) -> None:
    """The score against the bytes of a vector, a line for each precision."""
    figure = new_figure(7, 4)
    axes = figure.subplots()
    precisions = list(dict.fromkeys(row["precision"] for row in result.table))
    for precision, colour in zip(precisions, colours(len(precisions)), strict=True):
        rows = [row for row in result.table if row["precision"] == precision]
        axes.plot(
            [row["bytes"] for row in rows], [row["score"] for row in rows], marker="o", color=colour, label=precision
        )
    axes.set_xscale("log", base=2)
    sizes = sorted({row["bytes"] for row in result.table})
    axes.set_xticks(sizes, [f"{size:,}" for size in sizes], rotation=40)
    axes.minorticks_off()
    dress(axes, "bytes of a vector", "score", legend=True)
    save(figure, path)


def _severities(task: Task, collection: Collection, context: Context, result: TaskResult, path: Path) -> None:
    """Accuracy against severity, a line for each corruption."""
    figure = new_figure(7, 4.2)
    axes = figure.subplots()
    names = list(dict.fromkeys(row["corruption"] for row in result.table))
    cycle: list[Any] = [*zip(colours(len(names)), "osv^Dx*p" * len(names), strict=False)]
    for name, (colour, marker) in zip(names, cycle, strict=True):
        rows = [row for row in result.table if row["corruption"] == name]
        at, shares = [0, *(row["severity"] for row in rows)], [result.metrics["clean"], *(row["top1"] for row in rows)]
        axes.plot(at, shares, marker=marker, color=colour, label=name.replace("_", " "), linewidth=1.5, markersize=5)
    axes.set_xticks(range(6), ["clean", "1", "2", "3", "4", "5"])
    dress(axes, "severity", "top-1", legend=True)
    save(figure, path)


Draw = Callable[[Task, Collection, Context, TaskResult, Path], None]
FIGURES: dict[str, dict[str, Draw]] = {
    "zero_shot": {
        "confusion: what the worst classes are confused with": _confusion,
        "nearest: the pictures nearest to the worst classes; pictures of the class are framed": _mistakes,
        "classes: the pictures nearest to some classes; pictures of the class are framed": _drawn_classes,
    },
    "retrieval": {
        "search: captions drawn at random; the caption's own picture is framed": _drawn_captions,
        "found: captions whose own picture (framed) ranks best": _ranked_captions(best=True),
        "missed: captions whose own picture is furthest behind": _ranked_captions(best=False),
    },
    "alignment": {
        "cosines: of captions with their own pictures, and with other pictures": _histogram,
        "map: images and texts in one plane": _map,
    },
    "compression": {"size: what smaller vectors cost": _sizes},
    "robustness": {"severity: accuracy under corruption": _severities},
}


def run_curves(path: str | Path, points: Sequence[MetricPoint], name: str) -> None:
    """The loss of a run, and its validation scores below, from the run's metrics log."""

    def history(key: str) -> tuple[list[int], list[float]]:
        values = {point.step: point.metrics[key] for point in points if key in point.metrics}
        return sorted(values), [values[step] for step in sorted(values)]

    scores = {"zero_shot/top1": "zero-shot top-1", "retrieval/text_to_image/r10": "text→image R@10"}
    validations = {label: history(key) for key, label in scores.items() if history(key)[0]}
    curve(path, {"loss": history("loss")}, name, "InfoNCE loss", points=validations or None)
