"""Pictures of a result: a text-to-image gallery of a validation set, and the curves of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nev.eval.report.plots import curve, gallery
from nev.eval.validation.on_cluster import pictures
from nev.eval.validation.scoring import Embedded
from nev.eval.validation.task import Validation
from nev.eval.validation.texts import Texts, all_captions
from nev.runs.metrics_log import MetricPoint

QUERIES = 7
RESULTS = 6


def retrieval_gallery(path: str | Path, task: Validation, embedded: Embedded, texts: Texts, seed: int = 0) -> None:
    """Captions drawn from the set, each with the pictures nearest to it; its own picture is framed."""
    vectors, owner = texts.captions, texts.owner
    assert vectors is not None
    assert owner is not None
    chosen = np.random.default_rng(seed).choice(len(vectors), min(QUERIES, len(vectors)), replace=False)
    captions = all_captions(task.reader.index)
    scores = vectors[chosen] @ np.where(embedded.valid[:, None], embedded.images, 0).T
    nearest = np.argsort(-scores, axis=1, kind="stable")[:, :RESULTS]
    gallery(
        path,
        queries=[captions[row] for row in chosen],
        results=[pictures(task, rows) for rows in nearest],
        scores=np.take_along_axis(scores, nearest, axis=1).tolist(),
        correct=[(rows == owner[text]).tolist() for rows, text in zip(nearest, chosen, strict=True)],
    )


def class_gallery(path: str | Path, task: Validation, embedded: Embedded, texts: Texts) -> None:
    """Class prompts, each with the pictures nearest to it; those of the class are framed."""
    assert task.classes
    assert texts.classes is not None
    names = task.classes.names
    chosen: NDArray[np.int64] = np.linspace(0, len(names) - 1, min(QUERIES, len(names))).round().astype(np.int64)
    scores = texts.classes[chosen] @ np.where(embedded.valid[:, None], embedded.images, 0).T
    nearest = np.argsort(-scores, axis=1, kind="stable")[:, :RESULTS]
    gallery(
        path,
        queries=[names[row] for row in chosen],
        results=[pictures(task, rows) for rows in nearest],
        scores=np.take_along_axis(scores, nearest, axis=1).tolist(),
        correct=[(embedded.labels[rows] == label).tolist() for rows, label in zip(nearest, chosen, strict=True)],
    )


def run_curves(path: str | Path, journal: list[MetricPoint], name: str) -> None:
    """The loss of a run, with its validation scores below, from the run's own journal."""

    def history(key: str) -> tuple[list[int], list[float]]:
        found = {point.step: point.metrics[key] for point in journal if key in point.metrics}
        return sorted(found), [found[step] for step in sorted(found)]

    points: dict[str, Any] = {
        label: scores
        for key, label in (("zero_shot/top1", "zero-shot top-1"), ("retrieval/text_to_image/r10", "text→image R@10"))
        if (scores := history(key))[0]
    }
    curve(path, {"loss": history("loss")}, name, "InfoNCE loss", points=points or None)
