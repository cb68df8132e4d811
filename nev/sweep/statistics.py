"""Statistics of an arm that was tried with a few seeds: its mean and interval, and a curve through several arms."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats

LEVEL = 0.95
MIN_RANGE = 4  # least ratio of the largest setting to the smallest for which a curve is fitted


class Estimate(NamedTuple):
    """A mean over `seeds` seeds, and its 95 % interval, which is infinite for one seed."""

    mean: float
    low: float
    high: float
    seeds: int


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


def fit_parabola(values: Mapping[float, Mapping[int, float]]) -> Curve | None:
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
