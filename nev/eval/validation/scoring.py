"""A run's own set scored as a suite of tasks, and the names of its metrics in MLflow."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np

from nev.config.base import ConfigError
from nev.eval.metrics.ranks import Floats, mean_cosine
from nev.eval.suite.results import TaskResult
from nev.eval.suite.schema import Task
from nev.eval.suite.vectors import Embedded, Texts
from nev.eval.validation.task import Validation, make_tasks
from nev.eval.validation.texts import Classes
from nev.storage.reading import DataError


def score_validation(
    task: Validation, embedded: Embedded, texts: Texts, scale: float, complete: bool = False
) -> dict[str, float]:
    """The metrics of a validation by their names in MLflow, with the ends of their 95 % intervals (`..._low`, `..._high`).

    scale: 1 / temperature of the model.
    complete: also measure the calibration of zero-shot, and the space of pictures and captions: what the report has beside the
        shares, and takes several times as long.
    Raises DataError where no row can be scored.
    """
    index = task.reader.index
    tasks = make_tasks(index.root, task.classes, task.retrieval, index.columns)
    if not complete:
        tasks = tuple(part for part in tasks if part.kind != "alignment")
    try:
        return name_metrics(score_tasks(tasks, embedded, texts, scale, complete), embedded)
    except ConfigError as error:
        raise DataError(f"{index.root}: {error}, so there is nothing to score. Correct data.val.") from error


def score_tasks(
    tasks: Sequence[Task], embedded: Embedded, texts: Texts, scale: float, calibration: bool = True
) -> list[TaskResult]:
    """The result of each task. A set that is too small for `alignment` goes without."""
    from nev.eval.suite.collection import Collection
    from nev.eval.suite.tasks import Context, score  # imports scipy, which takes a second

    results = []
    for task in tasks:
        try:
            results.append(score(task, Collection(embedded, [], {}), Context(scale, texts, calibration=calibration)))
        except ConfigError:
            if task.kind != "alignment":
                raise
    return results


def name_metrics(results: Sequence[TaskResult], embedded: Embedded) -> dict[str, float]:
    """Every number of a validation by its name in MLflow, with the rows of the set and the likeness of its pictures."""
    images = embedded.images[embedded.valid]
    metrics = {"val/rows": float(len(embedded.valid)), "val/bad_rows": float((~embedded.valid).sum())}
    if len(images) > 1:
        metrics["space/anisotropy_images"] = mean_cosine(images)
    for result in results:
        metrics |= {name_metric(result.kind, name): value for name, value in result.metrics.items()}
        if result.kind == "zero_shot" and result.chance is not None:
            metrics["zero_shot/chance"] = result.chance
    return metrics


def name_metric(kind: str, name: str) -> str:
    """A metric of a task as MLflow has it: `zero_shot/top1`, `retrieval/text_to_image/r1`, `space/gap`, `mixed/own_image`."""
    if kind == "alignment":
        area, _, rest = name.partition("_")
        return f"{area}/{rest}" if area in ("mixed", "texts") else f"space/{name}"
    return f"{kind}/{name.replace('to_image_', 'to_image/').replace('to_text_', 'to_text/')}"


@functools.cache
def list_metric_names(classes: int, captions: int) -> frozenset[str]:
    """The names that `score_validation` gives, the space included.

    classes: number of classes; 0 where zero-shot is not scored.
    captions: most captions of a picture; 0 where retrieval is not scored.
    """
    random = np.random.default_rng(0)

    def unit(rows: int) -> Floats:
        vectors = random.normal(size=(rows, 8))
        return np.asarray(vectors / np.linalg.norm(vectors, axis=1, keepdims=True), np.float32)

    rows = 24
    prompts = Classes(tuple(f"class {number}" for number in range(classes)), ("{}",), None) if classes else None
    embedded = Embedded(unit(rows), np.ones(rows, bool), np.arange(rows) % max(1, classes))
    owner = np.repeat(np.arange(rows), captions) if captions else None
    texts = Texts(unit(classes) if classes else None, unit(captions * rows) if captions else None, owner)
    return frozenset(
        name_metrics(score_tasks(make_tasks("nowhere", prompts, captions > 0), embedded, texts, 1.0), embedded)
    )
