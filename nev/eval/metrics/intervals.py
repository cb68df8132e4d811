"""95 % intervals by bootstrap over images, each with all of its queries."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

DRAWS = 1000
BATCH = 50  # draws in memory at a time; a draw has a number for each image


class Interval(NamedTuple):
    """The ends of a confidence interval."""

    low: float
    high: float


def interval_from_draws(
    metric: Callable[[NDArray[np.float64]], float], images: int, level: float = 0.95, draws: int = DRAWS, seed: int = 0
) -> Interval:
    """The percentile interval (Efron 1979) of a metric of `images` images.

    metric: from the weights of the images, float64 [images], to a number. A weight is how often the image was drawn; with all
    weights 1 the metric is that of the set.
    """

    if images == 1:
        whole = metric(np.ones(1))
        return Interval(whole, whole)

    from scipy.stats import bootstrap  # late: half a second of every training process

    def measure(rows: NDArray[np.int64]) -> float:
        return metric(np.bincount(rows, minlength=images).astype(np.float64))

    ends = bootstrap(
        (np.arange(images),),
        measure,
        vectorized=False,
        n_resamples=draws,
        batch=1,
        confidence_level=level,
        method="percentile",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return Interval(float(ends.low), float(ends.high))


def interval(
    hits: ArrayLike, image: ArrayLike | None = None, level: float = 0.95, draws: int = DRAWS, seed: int = 0
) -> Interval:
    """The percentile interval (Efron 1979) of the mean of `hits`, bool or float [q].

    image: int [q], the image that a query belongs to. None: every query has an image of its own.
    Images are drawn, each with all its queries. Captions of an image succeed and fail together: if captions were drawn, the
    interval would be too narrow. Raises ValueError for no hits.
    """
    values = np.asarray(hits, np.float64)
    if not len(values):
        raise ValueError("an interval needs at least one query")
    _, place = np.unique(np.arange(len(values)) if image is None else np.asarray(image), return_inverse=True)
    sums, counts = np.bincount(place, values), np.bincount(place).astype(np.float64)
    if len(sums) == 1 or np.ptp(values) == 0:
        mean = float(values.mean())
        return Interval(mean, mean)

    from scipy.stats import bootstrap  # late, as above

    def share(hit: NDArray[np.float64], queries: NDArray[np.float64], axis: int) -> NDArray[np.float64]:
        return np.asarray(hit.sum(axis) / queries.sum(axis))

    ends = bootstrap(
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
    return Interval(float(ends.low), float(ends.high))
