"""Scores of a zero-shot classifier beside its accuracy: by class, by group, and its calibration."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import minimize_scalar
from scipy.special import logsumexp

from nev.eval.metrics.neighbours import nearest
from nev.eval.metrics.ranks import Floats, Ints, row_numbers, unit_rows

Weights = NDArray[np.float64]
BINS = 15
CHUNK_SCORES = 2**23  # most scores in memory at once
FITTED = 10_000  # most images that a temperature is fitted on
SCALES = (1.0, 1000.0)  # range of the fitted scale


class Answers(NamedTuple):
    """Answers of a classifier.

    ranks: int64 [n], the rank of the right class, 0 is first.
    predicted: int64 [n], the class of the highest score.
    labels: int64 [n], the right class.
    classes: number of classes.
    """

    ranks: Ints
    predicted: Ints
    labels: Ints
    classes: int


def rank_answers(ranks: Ints, images: Floats, labels: Ints, classes: Floats, names: Sequence[str] = ()) -> Answers:
    """The answers for n images [n, D] over C classes [C, D].

    ranks: int64 [n], from `nev.eval.metrics.zeroshot`.
    names: of the classes. Of classes of one name the first one is predicted.
    """
    predicted = nearest(images, classes, 1).rows[:, 0]
    if names:
        first = {name: number for number, name in reversed(list(enumerate(names)))}
        predicted = np.array([first[name] for name in names])[predicted]
    return Answers(ranks, predicted, labels, len(classes))


def top_k(answers: Answers, k: int) -> Callable[[Weights], float]:
    """Share of images whose class is among the first k."""
    hits = (answers.ranks < k).astype(np.float64)
    return lambda weights: float(weights @ hits / weights.sum())


def mean_per_class(answers: Answers) -> Callable[[Weights], float]:
    """Balanced accuracy: the mean, over the classes that have images, of the share of their images that are right."""
    return lambda weights: float(np.nanmean(_shares(answers.ranks < 1, answers.labels, answers.classes, weights)))


def worst_group(answers: Answers, groups: Ints, k: int) -> Callable[[Weights], float]:
    """The smallest share, over groups, of images whose class is among the first k. groups: int64 [n], -1 for none."""
    inside = groups >= 0
    hits, members, count = (answers.ranks < k)[inside], groups[inside], int(groups.max(initial=0)) + 1
    return lambda weights: float(np.nanmin(_shares(hits, members, count, weights[inside])))


def macro_f1(answers: Answers) -> Callable[[Weights], float]:
    """Mean of F1 over the classes that have images: 2 right / (predicted + labelled)."""
    right = np.where(answers.predicted == answers.labels, 1.0, 0.0)

    def mean(weights: Weights) -> float:
        labelled = np.bincount(answers.labels, weights, answers.classes)
        predicted = np.bincount(answers.predicted, weights, answers.classes)
        hits = np.bincount(answers.labels, weights * right, answers.classes)
        known = labelled > 0
        return float(np.mean(2 * hits[known] / (predicted + labelled)[known]))

    return mean


def calibration_error(
    images: ArrayLike, labels: ArrayLike, classes: ArrayLike, scale: float, bins: int = BINS
) -> float:
    """Expected calibration error (Guo et al. 2017): |accuracy - confidence|, averaged over equal bins of confidence.

    images: unit [n, D]. labels: int [n]. classes: unit [C, D]. scale: 1 / temperature of the softmax over cosines.
    Of tied classes the class of the lower number is predicted. Raises ValueError as `nev.eval.metrics.zeroshot` does.
    """
    images, labels, classes = _checked(images, labels, classes)
    confidence, right = np.empty(len(images)), np.empty(len(images), np.bool_)
    for rows, scores in _scores(images, classes):
        predicted = scores.argmax(1)
        confidence[rows] = np.exp(scale * scores.max(1) - logsumexp(scale * scores, axis=1))
        right[rows] = predicted == labels[rows]
    place = np.minimum((confidence * bins).astype(np.int64), bins - 1)
    gap = np.bincount(place, right - confidence, bins)
    return float(np.abs(gap).sum() / len(images))


def fit_scale(images: ArrayLike, labels: ArrayLike, classes: ArrayLike) -> float:
    """The scale in 1..1000 that maximises the likelihood of the right classes (temperature scaling, Guo et al. 2017).

    The fit is over 10,000 images at most, to 1e-3 of the scale. Arguments and errors are those of `calibration_error`.
    """
    images, labels, classes = _checked(images, labels, classes)
    chosen = np.linspace(0, len(images) - 1, min(len(images), FITTED)).astype(np.int64)
    images, labels = images[chosen], labels[chosen]

    def mean_loss(log_scale: float) -> float:
        scale, total = np.exp(log_scale), 0.0
        for rows, scores in _scores(images, classes):
            right = np.take_along_axis(scores, labels[rows, None], axis=1)[:, 0]
            total += float((logsumexp(scale * scores, axis=1) - scale * right).sum())
        return total / len(images)

    minimum = minimize_scalar(mean_loss, bounds=tuple(np.log(SCALES)), method="bounded", options={"xatol": 1e-3})
    return float(np.exp(minimum.x))


def confusions(answers: Answers, most: int) -> list[tuple[int, int, float]]:
    """The most frequent confusions: (right class, predicted class, share of the right class's images), at most `most` of them."""
    wrong = answers.predicted != answers.labels
    pairs, counts = np.unique(np.stack([answers.labels[wrong], answers.predicted[wrong]]), axis=1, return_counts=True)
    shares = counts / np.bincount(answers.labels, minlength=answers.classes)[pairs[0]]
    return [
        (int(pairs[0, pair]), int(pairs[1, pair]), float(shares[pair]))
        for pair in np.argsort(-shares, kind="stable")[:most]
    ]


def per_class(answers: Answers) -> NDArray[np.float64]:
    """Share of each class's images that are right: float64 [C], NaN for a class without images."""
    return _shares(answers.ranks < 1, answers.labels, answers.classes, np.ones(len(answers.labels)))


def _shares(hits: NDArray[np.bool_], members: Ints, count: int, weights: Weights) -> NDArray[np.float64]:
    """Share of hits in each of `count` groups: float64 [count], NaN for a group without members."""
    totals = np.bincount(members, weights, count)
    with np.errstate(invalid="ignore"):
        shares: NDArray[np.float64] = np.bincount(members, weights * hits, count) / totals
    return shares


def _checked(images: ArrayLike, labels: ArrayLike, classes: ArrayLike) -> tuple[Floats, Ints, Floats]:
    pictures, names = unit_rows("images", images), unit_rows("classes", classes)
    return pictures, row_numbers("labels", labels, len(pictures), len(names), "the classes"), names


def _scores(images: Floats, classes: Floats) -> Iterator[tuple[NDArray[np.int64], NDArray[np.float64]]]:
    """Rows of `images`, a chunk at a time, and their cosines with all classes, float64 [rows, C]."""
    chunk = max(1, CHUNK_SCORES // len(classes))
    for top in range(0, len(images), chunk):
        rows = np.arange(top, min(top + chunk, len(images)))
        yield rows, (images[rows] @ classes.T).astype(np.float64)
