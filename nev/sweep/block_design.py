"""Arms × seeds as a randomised block: one error for all arms, and all arms compared with the reference together.

A value is the arm's effect, plus the seed's effect, plus noise whose standard deviation is the same for all arms. With a arms
and b seeds that noise is estimated with (a - 1)(b - 1) degrees of freedom, so three seeds say much, where an arm's own
differences from the reference have two. With two arms this is Student's paired t.

Differences from the reference share the reference and the estimate of the noise. Dunnett's comparison (1955) takes that into
account: with probability 0.95 all intervals hold at once. Its distribution is the multivariate t with correlation 1/2.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Generic, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray
from scipy import optimize, stats

from nev.sweep.statistics import LEVEL, Estimate, holm

# Seeds that a test of a difference needs. With two seeds values are too often equal, where a metric counts pictures.
MIN_SEEDS = 3
RESOLUTION = 1e-4  # least standard deviation of a difference that a test assumes, for the same reason
POWER = 0.8  # of the smallest difference that a design is said to see

Key = TypeVar("Key")
Values = Mapping[Key, Mapping[int, float]]  # arm, then seed


class Difference(NamedTuple, Generic[Key]):
    """The difference of an arm from the reference at the same seeds.

    size: the arm less the reference, and its 95 % interval. The intervals of all arms hold at once.
    p: two-sided, adjusted for all arms of the metric.
    """

    arm: Key
    size: Estimate
    p: float

    @property
    def distinguishable(self) -> bool:
        """Whether the difference is larger than seeds alone explain."""
        return self.p < 1 - LEVEL

    def is_within(self, margin: float) -> bool:
        """Whether the arm equals the reference to within `margin`: the interval lies inside.

        That is a test of equivalence by two one-sided tests (TOST, Schuirmann 1987), at half of its level, of all arms at once.
        """
        return -margin < self.size.low and self.size.high < margin


class Block(NamedTuple, Generic[Key]):
    """The common seeds of some arms.

    arms: a of them.
    values: float64 [a, b], of each arm at each seed.
    error: standard error of the difference of two arms.
    freedom: degrees of freedom of the error. 0: no test.
    """

    arms: tuple[Key, ...]
    values: NDArray[np.float64]
    error: float
    freedom: int

    def difference(self, arm: Key, other: Key) -> float:
        """The mean of `arm` less that of `other`."""
        means = self.values.mean(axis=1)
        return float(means[self.arms.index(arm)] - means[self.arms.index(other)])


def make_block(values: Values[Key], resolution: float = RESOLUTION) -> Block[Key]:
    """The block of all arms, at the seeds that all have.

    resolution: least standard deviation of a difference at one seed, in the units of the metric.
    Raises ValueError where the arms have no common seed.
    """
    seeds = sorted(set.intersection(*(set(by_seed) for by_seed in values.values())))
    if not seeds:
        raise ValueError("make_block: the arms have no common seed")
    table = np.array([[by_seed[seed] for seed in seeds] for by_seed in values.values()], np.float64)
    freedom = (table.shape[0] - 1) * (table.shape[1] - 1)
    residuals = table - table.mean(axis=1, keepdims=True) - table.mean(axis=0, keepdims=True) + table.mean()
    deviation = math.sqrt(2 * float(np.sum(residuals**2)) / freedom) if freedom else math.inf
    error = max(deviation, resolution) / math.sqrt(len(seeds))
    return Block(tuple(values), table, error, freedom if len(seeds) >= MIN_SEEDS else 0)


def compare_with_reference(
    values: Values[Key], reference: Key, resolution: float = RESOLUTION
) -> list[Difference[Key]]:
    """The difference of each other arm from the reference, over the common seeds. Arms are complete.

    With fewer than MIN_SEEDS seeds every p is 1 and every interval infinite.
    """
    if len(values) < 2 or reference not in values:
        return []
    block = make_block(values, resolution)
    arms = [arm for arm in block.arms if arm != reference]
    return [_compare(block, arm, reference, len(arms)) for arm in arms]


def compare_steps(
    lines: Sequence[Values[float]], resolution: float = RESOLUTION
) -> list[list[tuple[float, float, Difference[float]]]]:
    """For each line, the steps from a setting to the next larger one: (lower, upper, difference).

    All lines have one error. The interval of a step is its own; the p values of all steps of all lines are adjusted (Holm 1979).
    """
    block = make_block({(number, x): own for number, line in enumerate(lines) for x, own in line.items()}, resolution)
    tests = [
        (number, lower, upper, _compare(block, (number, upper), (number, lower), 1))
        for number, line in enumerate(lines)
        for lower, upper in itertools.pairwise(sorted(line))
    ]
    adjusted = holm([difference.p for *_, difference in tests])
    steps: list[list[tuple[float, float, Difference[float]]]] = [[] for _ in lines]
    for (number, lower, upper, difference), p in zip(tests, adjusted, strict=True):
        steps[number].append((lower, upper, Difference(upper, difference.size, p)))
    return steps


def _compare(block: Block[Key], arm: Key, other: Key, compared: int) -> Difference[Key]:
    """The difference of two arms. compared: number of arms that are compared with `other`."""
    mean, seeds = block.difference(arm, other), block.values.shape[1]
    if not block.freedom:
        return Difference(arm, Estimate(mean, -math.inf, math.inf, seeds), 1.0)
    half = critical_value(compared, block.freedom) * block.error
    p = adjusted_p(abs(mean) / block.error, compared, block.freedom)
    return Difference(arm, Estimate(mean, mean - half, mean + half, seeds), p)


def adjusted_p(t: float, compared: int, freedom: int) -> float:
    """Dunnett's two-sided p value of a difference of `t` standard errors, one of `compared` differences from one reference."""
    alone = float(2 * stats.t.sf(t, freedom))
    # The multivariate t is integrated to some 1e-4; a small p lies between these bounds, the upper one being Bonferroni's.
    return float(np.clip(1 - _share_within(t, compared, freedom), alone, min(1.0, compared * alone)))


@functools.lru_cache(maxsize=256)
def critical_value(compared: int, freedom: int) -> float:
    """The standard errors that `compared` differences from one reference all stay within, with probability 0.95."""
    alone = float(stats.t.ppf((1 + LEVEL) / 2, freedom))
    if compared == 1:
        return alone
    bonferroni = float(stats.t.ppf(1 - (1 - LEVEL) / 2 / compared, freedom))
    return float(
        optimize.brentq(lambda t: _share_within(t, compared, freedom) - LEVEL, alone, 1.01 * bonferroni, xtol=1e-4)
    )


def _share_within(t: float, compared: int, freedom: int) -> float:
    """The probability that all of `compared` differences from one reference are within `t` standard errors, if no arm differs."""
    if compared == 1:
        return float(1 - 2 * stats.t.sf(t, freedom))
    correlation = np.full((compared, compared), 0.5) + 0.5 * np.eye(compared)
    distribution = stats.multivariate_t(shape=correlation, df=freedom, seed=0)
    return float(distribution.cdf(np.full(compared, t), lower_limit=np.full(compared, -t)))


def compute_power(arms: int, seeds: int, difference: float) -> float:
    """The probability that a difference of one arm from the reference is distinguishable.

    difference: in standard deviations of the noise.
    """
    freedom = (arms - 1) * (seeds - 1)
    bound, shift = critical_value(arms - 1, freedom), difference * math.sqrt(seeds / 2)
    # The mean over estimates of the noise. SciPy's noncentral t, which would do the same, has no value for some arguments.
    deviations = stats.chi.ppf((np.arange(1000) + 0.5) / 1000, freedom) / math.sqrt(freedom)
    return float(np.mean(stats.norm.sf(bound * deviations - shift) + stats.norm.cdf(-bound * deviations - shift)))


def least_difference(arms: int, seeds: int) -> float:
    """The smallest difference that is distinguishable with probability `POWER`, in standard deviations of the noise."""
    enough = 1.0
    while compute_power(arms, seeds, enough) < POWER:
        enough *= 2
    return float(optimize.brentq(lambda size: compute_power(arms, seeds, size) - POWER, 0.0, enough, xtol=1e-3))
