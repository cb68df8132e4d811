"""What a zero-shot classifier is worth beside its accuracy: by class, by group, and whether it knows when it is wrong."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import minimize_scalar
from scipy.special import logsumexp

from nev.eval.metrics.neighbours import nearest
from nev.eval.metrics.ranks import Floats, Ints, row_numbers, unit_rows

Weights = NDArray[np.float64]
BINS = 15
CHUNK = 8192
FITTED = 10_000  # images that a temperature is fitted on, at most
SCALES = (1.0, 1000.0)  # between which it is sought


class Answers(NamedTuple):
    """Where the right classes rank (0 is first), the classes that were given, the right ones: int64 [n]. classes: how many."""

    ranks: Ints
    given: Ints
    labels: Ints
    classes: int


def rank_answers(ranks: Ints, images: Floats, labels: Ints, classes: Floats) -> Answers:
    """Answers of n images [n, D] over C classes [C, D], whose `ranks` are known."""
    return Answers(ranks, nearest(images, classes, 1).rows[:, 0], labels, len(classes))


def top_k(found: Answers, k: int) -> Callable[[Weights], float]:
    """Share of images whose class is among the first k."""
    hits = (found.ranks < k).astype(np.float64)
    return lambda weights: float(weights @ hits / weights.sum())


def mean_per_class(found: Answers) -> Callable[[Weights], float]:
    """Mean over the classes that there are of the share of their images that are right (balanced accuracy)."""
    return lambda weights: float(np.nanmean(_shares(found.ranks < 1, found.labels, found.classes, weights)))


def worst_group(found: Answers, groups: Ints, k: int) -> Callable[[Weights], float]:
    """The smallest share, over groups, of images whose class is among the first k. groups: int64 [n], -1 for none."""
    inside = groups >= 0
    hits, members, count = (found.ranks < k)[inside], groups[inside], int(groups.max(initial=0)) + 1
    return lambda weights: float(np.nanmin(_shares(hits, members, count, weights[inside])))


def macro_f1(found: Answers) -> Callable[[Weights], float]:
    """Mean of F1 over the classes that there are: 2 right / (given + there)."""
    right = np.where(found.given == found.labels, 1.0, 0.0)

    def of(weights: Weights) -> float:
        there = np.bincount(found.labels, weights, found.classes)
        given = np.bincount(found.given, weights, found.classes)
        hits = np.bincount(found.labels, weights * right, found.classes)
        known = there > 0
        return float(np.mean(2 * hits[known] / (given + there)[known]))

    return of


def calibration_error(
    images: ArrayLike, labels: ArrayLike, classes: ArrayLike, scale: float, bins: int = BINS
) -> float:
    """Expected calibration error (Guo et al. 2017): |accuracy - confidence|, averaged over equal bins of confidence.

    images: unit [n, D]; labels: int [n]; classes: unit [C, D]; scale: 1 / temperature of the softmax over cosines. Of tied
    classes the lower one is given. Raises ValueError as `nev.eval.metrics.zeroshot` does.
    """
    images, labels, classes = _checked(images, labels, classes)
    confidence, right = np.empty(len(images)), np.empty(len(images), np.bool_)
    for rows, scores in _scores(images, classes):
        given = scores.argmax(1)
        confidence[rows] = np.exp(scale * scores.max(1) - logsumexp(scale * scores, axis=1))
        right[rows] = given == labels[rows]
    place = np.minimum((confidence * bins).astype(np.int64), bins - 1)
    gap = np.bincount(place, right - confidence, bins)
    return float(np.abs(gap).sum() / len(images))


def fit_scale(images: ArrayLike, labels: ArrayLike, classes: ArrayLike) -> float:
    """The scale in 1..1000 under which the right classes are likeliest (temperature scaling, Guo et al. 2017).

    It is sought on 10,000 images at most. Same arguments and errors as `calibration_error`.
    """
    images, labels, classes = _checked(images, labels, classes)
    chosen = np.linspace(0, len(images) - 1, min(len(images), FITTED)).astype(np.int64)
    images, labels = images[chosen], labels[chosen]

    def surprise(log_scale: float) -> float:
        scale, total = np.exp(log_scale), 0.0
        for rows, scores in _scores(images, classes):
            own = np.take_along_axis(scores, labels[rows, None], axis=1)[:, 0]
            total += float((logsumexp(scale * scores, axis=1) - scale * own).sum())
        return total / len(images)

    found = minimize_scalar(surprise, bounds=tuple(np.log(SCALES)), method="bounded", options={"xatol": 1e-3})
    return float(np.exp(found.x))


def confusions(found: Answers, most: int) -> list[tuple[int, int, float]]:
    """The class pairs (right, given) that are mixed up most, with the share of the right class's images that it happens to."""
    wrong = found.given != found.labels
    pairs, counts = np.unique(np.stack([found.labels[wrong], found.given[wrong]]), axis=1, return_counts=True)
    there = np.bincount(found.labels, minlength=found.classes)
    shares = counts / there[pairs[0]]
    return [
        (int(pairs[0, at]), int(pairs[1, at]), float(shares[at])) for at in np.argsort(-shares, kind="stable")[:most]
    ]


def per_class(found: Answers) -> NDArray[np.float64]:
    """Share of each class's images that are right, float64 [C], NaN for a class without images."""
    return _shares(found.ranks < 1, found.labels, found.classes, np.ones(len(found.labels)))


def _shares(hits: NDArray[np.bool_], members: Ints, count: int, weights: Weights) -> NDArray[np.float64]:
    """Share of hits in each of `count` parts, NaN for an empty one."""
    there = np.bincount(members, weights, count)
    with np.errstate(invalid="ignore"):
        shares: NDArray[np.float64] = np.bincount(members, weights * hits, count) / there
    return shares


def _checked(images: ArrayLike, labels: ArrayLike, classes: ArrayLike) -> tuple[Floats, Ints, Floats]:
    pictures, names = unit_rows("images", images), unit_rows("classes", classes)
    return pictures, row_numbers("labels", labels, len(pictures), len(names), "the classes"), names


def _scores(images: Floats, classes: Floats) -> Iterator[tuple[NDArray[np.int64], NDArray[np.float64]]]:
    """Cosines of all classes, a chunk of images at a time, with the rows that they are of."""
    for top in range(0, len(images), CHUNK):
        rows = np.arange(top, min(top + CHUNK, len(images)))
        yield rows, (images[rows] @ classes.T).astype(np.float64)
