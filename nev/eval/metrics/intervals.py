"""How sure a share is: bootstrap intervals over images, each with all of its queries."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import bootstrap

DRAWS = 1000
BATCH = 50  # draws in memory at once, each of as many numbers as there are images


class Interval(NamedTuple):
    """The ends of an interval that holds the share of a new sample's in `level` of all samples."""

    low: float
    high: float


def interval_from_draws(
    metric: Callable[[NDArray[np.float64]], float], images: int, level: float = 0.95, draws: int = DRAWS, seed: int = 0
) -> Interval:
    """The percentile interval (Efron 1979) of any metric of so many images.

    metric: from how often each image was drawn, float64 [images], to a number; all ones give the metric of the set itself.
    """

    if images == 1:
        whole = metric(np.ones(1))
        return Interval(whole, whole)

    def drawn(rows: NDArray[np.int64]) -> float:
        return metric(np.bincount(rows, minlength=images).astype(np.float64))

    found = bootstrap(
        (np.arange(images),),
        drawn,
        vectorized=False,
        n_resamples=draws,
        batch=1,
        confidence_level=level,
        method="percentile",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return Interval(float(found.low), float(found.high))


def interval(
    hits: ArrayLike, image: ArrayLike | None = None, level: float = 0.95, draws: int = DRAWS, seed: int = 0
) -> Interval:
    """The percentile interval (Efron 1979) of the mean of `hits`, bool or float [q].

    image: int [q], the image that a query belongs to. Images are drawn, with all their queries: captions of one image succeed
    and fail together, and drawn one by one they would promise too narrow an interval. None: every query is its own. Raises
    ValueError for no hits.
    """
    values = np.asarray(hits, np.float64)
    if not len(values):
        raise ValueError("no query, so there is no share to be sure of")
    _, place = np.unique(np.arange(len(values)) if image is None else np.asarray(image), return_inverse=True)
    sums, counts = np.bincount(place, values), np.bincount(place).astype(np.float64)
    if len(sums) == 1 or np.ptp(values) == 0:
        mean = float(values.mean())
        return Interval(mean, mean)

    def share(hit: NDArray[np.float64], asked: NDArray[np.float64], axis: int) -> NDArray[np.float64]:
        return np.asarray(hit.sum(axis) / asked.sum(axis))

    found = bootstrap(
        (sums, counts),
        share,
        paired=True,
        vectorized=True,
        n_resamples=draws,
        batch=BATCH,
        confidence_level=level,
        method="percentile",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return Interval(float(found.low), float(found.high))
