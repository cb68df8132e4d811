"""What can be said of arms that were tried with the same few seeds: means, intervals, and differences paired by seed.

Intervals are Student's, so with three seeds they are 4.3 standard errors wide on either side: few seeds say little, and this says
so. p values of one metric's differences are adjusted together (Holm 1979).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Generic, NamedTuple, TypeVar

import numpy as np
from scipy import stats

LEVEL = 0.95
# Seeds for a difference to be called one: two differ by equal amounts too often, where a metric counts pictures.
FEWEST = 3
RESOLUTION = (
    1e-4  # the least spread of differences that is believed, for the same reason, where nothing larger is known
)
SPAN = 4  # the largest setting over the smallest, below which no curve is fitted

Key = TypeVar("Key")
Values = Mapping[Key, Mapping[int, float]]  # arm, then seed


class Estimate(NamedTuple):
    """A mean over so many seeds, and its 95 % interval: infinite where one seed says nothing of the others."""

    mean: float
    low: float
    high: float
    seeds: int


class Difference(NamedTuple, Generic[Key]):
    """An arm less the reference at the same seeds. p: two-sided, adjusted for all arms of the metric."""

    arm: Key
    by: Estimate
    p: float

    @property
    def distinguishable(self) -> bool:
        """Whether the difference is more than seeds make."""
        return self.p < 1 - LEVEL


def estimate(values: Sequence[float]) -> Estimate:
    """Mean and Student's 95 % interval of one value a seed. Raises ValueError for none."""
    if not len(values):
        raise ValueError("estimate: no value")
    mean, count = float(np.mean(values)), len(values)
    if count == 1:
        return Estimate(mean, -math.inf, math.inf, 1)
    error = float(np.std(values, ddof=1)) / math.sqrt(count)
    half = float(stats.t.ppf((1 + LEVEL) / 2, count - 1)) * error
    return Estimate(mean, mean - half, mean + half, count)


def differences(values: Values[Key], reference: Key, resolution: float = RESOLUTION) -> list[Difference[Key]]:
    """Each other arm less the reference, over the seeds that both have; arms without a common seed are left out. resolution: the
    least spread of a difference that is believed, in the metric's units.
    """
    found = []
    for arm, own in values.items():
        seeds = sorted(own.keys() & values.get(reference, {}).keys())
        if arm != reference and seeds:
            by = np.array([own[seed] - values[reference][seed] for seed in seeds])
            found.append((arm, estimate(by.tolist()), paired_p(by, resolution)))
    adjusted = holm([p for _, _, p in found])
    return [Difference(arm, by, p) for (arm, by, _), p in zip(found, adjusted, strict=True)]


def paired_p(by: np.ndarray, resolution: float = RESOLUTION) -> float:
    """Two-sided p of differences whose mean is 0 (Student's paired t, spread at least `resolution`); 1 for fewer than FEWEST."""
    if len(by) < FEWEST:
        return 1.0
    spread = max(float(np.std(by, ddof=1)), resolution)
    return float(2 * stats.t.sf(abs(np.mean(by)) * math.sqrt(len(by)) / spread, len(by) - 1))


def holm(ps: Sequence[float]) -> list[float]:
    """Adjusted p values, in the order given (Holm 1979)."""
    adjusted, worst = [0.0] * len(ps), 0.0
    for rank, place in enumerate(np.argsort(ps, kind="stable")):
        worst = max(worst, min(1.0, (len(ps) - rank) * ps[place]))
        adjusted[place] = worst
    return adjusted


class Curve(NamedTuple):
    """y = a + b x + c x^2 with x = log2 of the setting, fitted to all seeds. turn: the setting where it is highest (`top`) or
    lowest, where that is among those tried; residual: standard deviation of what it leaves; p: that it is straight (two-sided t
    of c).
    """

    coefficients: tuple[float, float, float]
    turn: float | None
    residual: float
    p: float

    @property
    def top(self) -> bool:
        """Whether it turns down."""
        return self.coefficients[2] < 0

    def __call__(self, setting: float) -> float:
        """The fitted value."""
        a, b, c = self.coefficients
        x = math.log2(setting)
        return a + b * x + c * x * x


def fit(values: Values[float]) -> Curve | None:
    """A parabola over log2 of the settings, by least squares. None for fewer than four settings, which it would only connect, and
    for a range that is not worth a logarithm.
    """
    settings = sorted(values)
    if len(settings) < 4 or settings[0] <= 0 or settings[-1] < SPAN * settings[0]:
        return None
    points = [(math.log2(setting), value) for setting in settings for value in values[setting].values()]
    x, y = np.array(points).T
    (c, b, a), free = np.polyfit(x, y, 2), len(x) - 3
    turn = -b / (2 * c) if c else math.inf
    residual = math.sqrt(float(np.sum((y - (a + b * x + c * x**2)) ** 2)) / free)
    spread = np.linalg.inv(np.vander(x, 3).T @ np.vander(x, 3))[0, 0] ** 0.5  # of c, in residuals
    p = 2 * stats.t.sf(abs(c) / max(residual * spread, np.finfo(float).tiny), free)
    return Curve((a, b, c), float(2**turn) if x.min() <= turn <= x.max() else None, residual, float(p))


def steps_up(
    lines: Sequence[Values[float]], resolution: float = RESOLUTION
) -> list[list[tuple[float, float, Difference[float]]]]:
    """Of each line, each setting and the next larger one, and what going there changes, paired by seed; adjusted together."""
    found = []
    for place, values in enumerate(lines):
        for lower, upper in itertools.pairwise(sorted(values)):
            pair = {lower: values[lower], upper: values[upper]}
            found += [(place, lower, upper, one) for one in differences(pair, lower, resolution)]
    adjusted = holm([one.p for *_, one in found])
    steps: list[list[tuple[float, float, Difference[float]]]] = [[] for _ in lines]
    for (place, lower, upper, one), p in zip(found, adjusted, strict=True):
        steps[place].append((lower, upper, one._replace(p=p)))
    return steps
