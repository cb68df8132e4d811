"""Statistics of arms that were tried with the same few seeds: means, intervals, and differences paired by seed.

Intervals are Student's: with three seeds they reach 4.3 standard errors to either side, because few seeds allow few conclusions.
The p values of one metric's differences are adjusted together (Holm 1979).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Generic, NamedTuple, TypeVar

import numpy as np
from scipy import stats

LEVEL = 0.95
# Seeds that a test of a difference needs. With two seeds the differences are too often equal, where a metric counts pictures.
MIN_SEEDS = 3
RESOLUTION = 1e-4  # least standard deviation of differences that a test assumes, for the same reason
MIN_RANGE = 4  # least ratio of the largest setting to the smallest for which a curve is fitted

Key = TypeVar("Key")
Values = Mapping[Key, Mapping[int, float]]  # arm, then seed


class Estimate(NamedTuple):
    """A mean over `seeds` seeds, and its 95 % interval, which is infinite for one seed."""

    mean: float
    low: float
    high: float
    seeds: int


class Difference(NamedTuple, Generic[Key]):
    """The difference of an arm from the reference at the same seeds.

    size: the arm less the reference.
    p: two-sided, adjusted for all arms of the metric.
    """

    arm: Key
    size: Estimate
    p: float

    @property
    def distinguishable(self) -> bool:
        """Whether the difference is larger than seeds alone explain."""
        return self.p < 1 - LEVEL


def estimate(values: Sequence[float]) -> Estimate:
    """Mean and Student's 95 % interval of one value per seed. Raises ValueError for an empty sequence."""
    if not len(values):
        raise ValueError("estimate: no value")
    mean, count = float(np.mean(values)), len(values)
    if count == 1:
        return Estimate(mean, -math.inf, math.inf, 1)
    error = float(np.std(values, ddof=1)) / math.sqrt(count)
    half = float(stats.t.ppf((1 + LEVEL) / 2, count - 1)) * error
    return Estimate(mean, mean - half, mean + half, count)


def differences(values: Values[Key], reference: Key, resolution: float = RESOLUTION) -> list[Difference[Key]]:
    """The difference of each other arm from the reference, over the common seeds. Arms without a common seed are left out.

    resolution: least standard deviation of differences that the test assumes, in the units of the metric.
    """
    tests = []
    for arm, by_seed in values.items():
        seeds = sorted(by_seed.keys() & values.get(reference, {}).keys())
        if arm != reference and seeds:
            paired = np.array([by_seed[seed] - values[reference][seed] for seed in seeds])
            tests.append((arm, estimate(paired.tolist()), paired_p(paired, resolution)))
    adjusted = holm([p for _, _, p in tests])
    return [Difference(arm, size, p) for (arm, size, _), p in zip(tests, adjusted, strict=True)]


def paired_p(paired: np.ndarray, resolution: float = RESOLUTION) -> float:
    """Two-sided p value of paired differences under the hypothesis that their mean is 0 (Student's paired t).

    The standard deviation is taken as at least `resolution`. Fewer than MIN_SEEDS differences: 1.
    """
    if len(paired) < MIN_SEEDS:
        return 1.0
    deviation = max(float(np.std(paired, ddof=1)), resolution)
    return float(2 * stats.t.sf(abs(np.mean(paired)) * math.sqrt(len(paired)) / deviation, len(paired) - 1))


def holm(ps: Sequence[float]) -> list[float]:
    """Adjusted p values, in the order of `ps` (Holm 1979)."""
    adjusted, largest = [0.0] * len(ps), 0.0
    for rank, number in enumerate(np.argsort(ps, kind="stable")):
        largest = max(largest, min(1.0, (len(ps) - rank) * ps[number]))
        adjusted[number] = largest
    return adjusted


class Curve(NamedTuple):
    """A fit y = a + b x + c x^2 to all seeds, with x = log2 of the setting.

    coefficients: a, b, c.
    turn: the setting at which the curve is highest (`top`) or lowest. None where that is outside the settings that were tried.
    residual: standard deviation of the residuals.
    p: of the hypothesis that the curve is a straight line (two-sided t of c).
    """

    coefficients: tuple[float, float, float]
    turn: float | None
    residual: float
    p: float

    @property
    def top(self) -> bool:
        """Whether the curve has a highest point, not a lowest one."""
        return self.coefficients[2] < 0

    def __call__(self, setting: float) -> float:
        """The fitted value."""
        a, b, c = self.coefficients
        x = math.log2(setting)
        return a + b * x + c * x * x


def fit_parabola(values: Values[float]) -> Curve | None:
    """Fit a parabola over log2 of the settings, by least squares.

    None for fewer than four settings, which a parabola would only connect, and for a range below MIN_RANGE.
    """
    settings = sorted(values)
    if len(settings) < 4 or settings[0] <= 0 or settings[-1] < MIN_RANGE * settings[0]:
        return None
    points = [(math.log2(setting), value) for setting in settings for value in values[setting].values()]
    x, y = np.array(points).T
    (c, b, a), free = np.polyfit(x, y, 2), len(x) - 3
    turn = -b / (2 * c) if c else math.inf
    residual = math.sqrt(float(np.sum((y - (a + b * x + c * x**2)) ** 2)) / free)
    spread = np.linalg.inv(np.vander(x, 3).T @ np.vander(x, 3))[0, 0] ** 0.5  # of c, in residuals
    p = 2 * stats.t.sf(abs(c) / max(residual * spread, np.finfo(float).tiny), free)
    return Curve((a, b, c), float(2**turn) if x.min() <= turn <= x.max() else None, residual, float(p))


def compare_steps(
    lines: Sequence[Values[float]], resolution: float = RESOLUTION
) -> list[list[tuple[float, float, Difference[float]]]]:
    """For each line, the steps from a setting to the next larger one: (lower, upper, difference), paired by seed.

    The p values of all steps of all lines are adjusted together.
    """
    tests = []
    for number, values in enumerate(lines):
        for lower, upper in itertools.pairwise(sorted(values)):
            pair = {lower: values[lower], upper: values[upper]}
            tests += [(number, lower, upper, difference) for difference in differences(pair, lower, resolution)]
    adjusted = holm([difference.p for *_, difference in tests])
    steps: list[list[tuple[float, float, Difference[float]]]] = [[] for _ in lines]
    for (number, lower, upper, difference), p in zip(tests, adjusted, strict=True):
        steps[number].append((lower, upper, difference._replace(p=p)))
    return steps
