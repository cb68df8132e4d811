"""What a report shows of a task beside its numbers: where the model is right and wrong, and plots of finer results."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from nev.eval.metrics import classification
from nev.eval.metrics.neighbours import nearest
from nev.eval.metrics.ranks import Floats
from nev.eval.metrics.retrieval import retrieval_ranks
from nev.eval.metrics.zeroshot import zero_shot_ranks
from nev.eval.report.plots import COLOURS, INK, colours, dress, gallery, new_figure, save
from nev.eval.suite.collection import Collection
from nev.eval.suite.reading import read_pictures
from nev.eval.suite.results import TaskResult
from nev.eval.suite.schema import Task
from nev.eval.suite.tasks import Context, image_text_pairs, labelled_images

QUERIES, RESULTS = 5, 5
WORST = 8  # classes of a confusion matrix that cannot hold all
DOTS = 1000  # of each modality in the map of the space


class Figure(NamedTuple):
    """A picture, and what it shows. path: a PNG."""

    title: str
    path: Path


def make_figures(task: Task, found: Collection, context: Context, result: TaskResult, folder: Path) -> list[Figure]:
    """The pictures of a task that was run, written to `folder`."""
    made = []
    for title, draw in DRAWN.get(task.kind, {}).items():
        path = folder / f"{task.name}-{title.split(':')[0].replace(' ', '-')}.png"
        draw(task, found, context, result, path)
        made.append(Figure(title, path))
    return made


def _galleries(best: bool) -> Callable[..., None]:
    """Captions whose own picture is first, or whose own is furthest behind, with what was found instead."""

    def draw(task: Task, found: Collection, context: Context, result: TaskResult, path: Path) -> None:
        pairs = image_text_pairs(found, context)
        rows = [row for row, fact in enumerate(found.facts) if fact.captions and found.embedded.valid[row]]
        ranks = retrieval_ranks(*pairs).texts
        order = np.random.default_rng(0).permutation(len(ranks))
        order = order[np.argsort(ranks[order] if best else -ranks[order], kind="stable")]
        _, first = np.unique(pairs.owner[order], return_index=True)  # one caption a picture
        chosen = order[np.sort(first)][:QUERIES]
        hits = nearest(pairs.texts[chosen], pairs.images, RESULTS)
        captions = [one for row in rows for one in found.facts[row].captions]
        names = [[found.facts[rows[hit]].uid for hit in line] for line in hits.rows]
        right = (hits.rows == pairs.owner[chosen][:, None]).tolist()
        asked = [
            f"{captions[text]} (its own is number {ranks[text] + 1:,})" if not best else captions[text]
            for text in chosen
        ]
        _gallery(path, context, asked, names, hits.scores.tolist(), right)

    return draw


def _mistakes(task: Task, found: Collection, context: Context, result: TaskResult, path: Path) -> None:
    """Classes that do worst, with the pictures that are taken for them most surely; framed where rightly."""
    seen = labelled_images(task, found, context)
    given = classification.rank_answers(
        zero_shot_ranks(seen.images, seen.labels, seen.classes), seen.images, seen.labels, seen.classes
    )
    worst = np.argsort(classification.per_class(given), kind="stable")[:QUERIES]
    hits = nearest(seen.classes[worst], seen.images, RESULTS)
    names = [[found.facts[seen.rows[hit]].uid for hit in line] for line in hits.rows]
    right = (seen.labels[hits.rows] == worst[:, None]).tolist()
    _gallery(path, context, [seen.names[label] for label in worst], names, hits.scores.tolist(), right)


def _gallery(
    path: Path,
    context: Context,
    asked: Sequence[str],
    names: list[list[str]],
    scores: list[list[float]],
    right: list[list[bool]],
) -> None:
    views = read_pictures(context.reading, {uid for line in names for uid in line})
    size = context.reading.view.size
    blank = np.full((size, size, 3), 255, np.uint8)
    gallery(path, asked, [[views.get(uid, blank) for uid in line] for line in names], scores, right)


def _confusion(task: Task, found: Collection, context: Context, result: TaskResult, path: Path) -> None:
    """Of the classes that do worst: what share of their pictures is taken for which classes."""
    seen = labelled_images(task, found, context)
    given = classification.rank_answers(
        zero_shot_ranks(seen.images, seen.labels, seen.classes), seen.images, seen.labels, seen.classes
    )
    shares = classification.per_class(given)
    known = [int(label) for label in np.argsort(shares, kind="stable") if np.isfinite(shares[label])]
    worst = known if len(known) <= WORST + WORST // 2 else known[:WORST]
    taken = np.array([np.bincount(given.given[given.labels == label], minlength=len(seen.names)) for label in worst])
    taken = taken / taken.sum(1, keepdims=True)
    often = [int(label) for label in np.argsort(-taken.sum(0), kind="stable") if label not in worst]
    columns = [*worst, *often[: WORST // 2]]
    table, names = taken[:, columns], [seen.names[label][:18] for label in columns]
    if len(columns) < len(seen.names):
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
    axes.set_xlabel("given", color=INK)
    axes.set_ylabel("right", color=INK)
    save(figure, path)


def _histogram(task: Task, found: Collection, context: Context, result: TaskResult, path: Path) -> None:
    """Cosines of captions with their own pictures, and with others."""
    figure = new_figure(7, 3.6)
    axes = figure.subplots()
    left = [row["from"] for row in result.table]
    width = result.table[0]["to"] - result.table[0]["from"]
    for name, label, colour in (("others", "another picture", COLOURS[5]), ("own", "its own picture", COLOURS[0])):
        axes.bar(left, [row[name] for row in result.table], width, align="edge", color=colour, alpha=0.65, label=label)
    dress(axes, "cosine of a caption with", "share", legend=True)
    save(figure, path)


def _map(task: Task, found: Collection, context: Context, result: TaskResult, path: Path) -> None:
    """Images and texts on the two directions in which all of them vary most (principal components)."""
    pairs = image_text_pairs(found, context)
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


def _sizes(task: Task, found: Collection, context: Context, result: TaskResult, path: Path) -> None:
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


def _severities(task: Task, found: Collection, context: Context, result: TaskResult, path: Path) -> None:
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
DRAWN: dict[str, dict[str, Draw]] = {
    "zero_shot": {
        "confusion: what the worst classes are taken for": _confusion,
        "nearest: the pictures most like the worst classes; framed ones are of the class": _mistakes,
    },
    "retrieval": {
        "found: captions whose own picture, framed, ranks best": _galleries(best=True),
        "missed: captions whose own picture is furthest behind": _galleries(best=False),
    },
    "alignment": {
        "cosines: how near captions are to their own pictures, and to others": _histogram,
        "map: images and texts in one plane": _map,
    },
    "compression": {"size: what smaller vectors cost": _sizes},
    "robustness": {"severity: accuracy under corruption": _severities},
}
