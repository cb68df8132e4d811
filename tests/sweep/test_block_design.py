"""Differences of arms: a randomised block with one error, Dunnett's comparison, equivalence, power."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from nev.sweep.block_design import (
    RESOLUTION,
    adjusted_p,
    compare_steps,
    compare_with_reference,
    compute_power,
    critical_value,
    least_difference,
    make_block,
)
from nev.sweep.statistics import holm

FLOATS = st.floats(0, 1, allow_subnormal=False)


@given(st.lists(st.tuples(FLOATS, FLOATS), min_size=3, max_size=6))
def test_two_arms_are_students_paired_t(pairs: list[tuple[float, float]]) -> None:
    one, other = np.array(pairs).T
    if np.std(other - one, ddof=1) < RESOLUTION:
        return
    values = {"a": dict(enumerate(one)), "b": {**dict(enumerate(other)), 99: 0.0}}  # a seed that the reference lacks
    (found,) = compare_with_reference(values, "a")
    expected = stats.ttest_rel(other, one)
    assert found.arm == "b"
    assert found.p == pytest.approx(expected.pvalue)
    assert found.size.mean == pytest.approx(np.mean(other - one))
    assert (found.size.low, found.size.high) == pytest.approx(tuple(expected.confidence_interval(0.95)))


def test_the_error_is_that_of_an_analysis_of_variance() -> None:
    """Against least squares over dummies of arms and seeds."""
    random = np.random.default_rng(0)
    arms, seeds = 5, 4
    table = random.normal(size=(arms, seeds)) + 3 * random.normal(size=(arms, 1)) + 5 * random.normal(size=seeds)
    arm, seed = (index.ravel() for index in np.indices(table.shape))
    dummies = np.concatenate([np.eye(arms)[arm], np.eye(seeds)[seed][:, 1:]], axis=1)
    rest = table.ravel() - dummies @ np.linalg.lstsq(dummies, table.ravel(), rcond=None)[0]
    block = make_block({number: dict(enumerate(row)) for number, row in enumerate(table)})
    assert block.freedom == arms * seeds - dummies.shape[1] == 12
    assert block.error == pytest.approx(math.sqrt(2 / seeds * (rest @ rest) / block.freedom))


# Dunnett 1964 (Biometrics 20), two-sided 5 %: degrees of freedom, compared arms, bound.
@pytest.mark.parametrize(
    ("freedom", "compared", "bound"), [(20, 1, 2.09), (20, 2, 2.38), (20, 3, 2.54), (20, 5, 2.73), (10, 2, 2.57)]
)
def test_bounds_are_those_of_dunnetts_table(freedom: int, compared: int, bound: float) -> None:
    assert critical_value(compared, freedom) == pytest.approx(bound, abs=0.011)
    assert adjusted_p(critical_value(compared, freedom), compared, freedom) == pytest.approx(0.05, abs=1e-3)


def test_small_p_values_are_neither_nothing_nor_below_those_of_one_test() -> None:
    for t in (1.0, 3.0, 6.0, 12.0):
        alone = 2 * stats.t.sf(t, 16)
        assert alone <= adjusted_p(t, 8, 16) <= min(1, 8 * alone)
        assert adjusted_p(t, 1, 16) == pytest.approx(alone)


def draw(random: np.random.Generator, arms: int, seeds: int, first: float = 0.0) -> dict[int, dict[int, float]]:
    """Arms that are equal but for the second, which has `first` more; seeds differ by ten times the noise."""
    table = random.normal(size=(arms, seeds)) + 10 * random.normal(size=seeds)
    table[1] += first
    return {number: dict(enumerate(row)) for number, row in enumerate(table.tolist())}


def test_power_and_family_error_by_simulation() -> None:
    """Nine arms, three seeds, three standard deviations: a paired t with Holm sees them in 9 % of all sweeps."""
    random = np.random.default_rng(1)
    bound, compared = critical_value(8, 16), 1500
    seen = wrong = 0
    for _ in range(compared):
        block = make_block(draw(random, 9, 3, first=3.0))
        ratios = [abs(block.difference(arm, 0)) / block.error > bound for arm in range(1, 9)]
        seen += ratios[0]
        wrong += any(ratios[1:])
    assert compute_power(9, 3, 3.0) == pytest.approx(0.746, abs=0.002)
    assert seen / compared == pytest.approx(compute_power(9, 3, 3.0), abs=0.03)
    assert wrong / compared <= 0.06
    assert compute_power(9, 5, 3.0) >= 0.95
    assert compute_power(9, 3, 0.0) == pytest.approx(2 * stats.t.sf(bound, 16), rel=0.01)


def test_the_least_difference_that_a_design_sees() -> None:
    for arms, seeds in ((2, 3), (9, 3), (9, 8)):
        assert compute_power(arms, seeds, least_difference(arms, seeds)) == pytest.approx(0.8, abs=0.01)
    assert least_difference(9, 8) < least_difference(9, 3) < least_difference(2, 3)


def test_intervals_of_all_arms_hold_at_once() -> None:
    random = np.random.default_rng(2)
    held = 0
    for _ in range(1000):
        block = make_block(draw(random, 5, 3))
        half = critical_value(4, 8) * block.error
        held += all(abs(block.difference(arm, 0)) < half for arm in range(1, 5))
    assert held / 1000 == pytest.approx(0.95, abs=0.02)
    for first in (0.0, 2.0, 4.0, 8.0):
        for one in compare_with_reference(draw(random, 5, 3, first), 0):
            assert (one.p < 0.05) == (not one.size.low < 0 < one.size.high)


def test_equal_is_said_of_what_must_be() -> None:
    noise = {0: 0.001, 1: -0.001, 2: 0.0005, 3: -0.0005}
    base = {seed: 0.5 + seed / 10 for seed in noise}
    close = {seed: value + noise[seed] + 0.001 for seed, value in base.items()}
    apart = {seed: value + 0.02 - noise[seed] for seed, value in base.items()}
    near, far = compare_with_reference({"base": base, "close": close, "apart": apart}, "base")
    assert near.is_within(0.01)
    assert not near.is_within(0.002)
    assert not far.is_within(0.02)
    few = compare_with_reference({"base": {0: 0.5}, "same": {0: 0.5}}, "base")[0]
    assert not few.is_within(1.0), "of one seed nothing is known"


def test_seeds_that_differ_alike_hide_no_difference() -> None:
    """The seeds spread far more than the arms do; paired, the difference shows all the same."""
    spread = {0: 0.1, 1: 0.5, 2: 0.9}
    values = {"base": spread, "better": {seed: value + 0.01 + 0.001 * seed for seed, value in spread.items()}}
    (found,) = compare_with_reference(values, "base")
    assert found.distinguishable
    assert not compare_with_reference({"base": spread, "same": spread}, "base")[0].distinguishable
    assert (
        compare_with_reference({"base": spread, "shifted": {s: v + 0.5 for s, v in spread.items()}}, "base")[0].p < 1e-6
    )
    for few in ({0: 0.1}, {0: 0.1, 1: 0.5}):
        assert not compare_with_reference({"base": few, "other": {s: v + 0.5 for s, v in few.items()}}, "base")[
            0
        ].distinguishable
    tied = {seed: value + 1e-4 for seed, value in spread.items()}  # one picture of 10,000, thrice
    assert not compare_with_reference({"base": spread, "tied": tied}, "base")[0].distinguishable


@given(st.lists(FLOATS, min_size=1, max_size=7))
def test_holm(ps: list[float]) -> None:
    adjusted = holm(ps)
    order = np.argsort(ps, kind="stable")
    by_hand = np.minimum(1, np.maximum.accumulate(np.sort(ps) * np.arange(len(ps), 0, -1)))
    assert np.array(adjusted)[order] == pytest.approx(by_hand)


def test_steps_up_end_where_returns_do() -> None:
    noise = {0: 0.001, 1: -0.002, 2: 0.0015}
    heights = {64.0: 0.3, 128.0: 0.4, 256.0: 0.4005}
    values = {size: {seed: height + noise[seed] * size / 64 for seed in noise} for size, height in heights.items()}
    (steps,) = compare_steps([values])
    assert [(lower, upper, one.distinguishable) for lower, upper, one in steps] == [(64, 128, True), (128, 256, False)]


def test_the_steps_of_all_lines_have_one_error_and_are_adjusted_together() -> None:
    random = np.random.default_rng(3)
    lines = [{float(2**x): dict(enumerate(random.normal(0.1 * x, 0.05, 4))) for x in range(3)} for _ in range(2)]
    block = make_block({(number, x): own for number, line in enumerate(lines) for x, own in line.items()})
    found = [(number, *step) for number, steps in enumerate(compare_steps(lines)) for step in steps]
    assert [step[:3] for step in found] == [(0, 1, 2), (0, 2, 4), (1, 1, 2), (1, 2, 4)]
    ratios = [block.difference((number, upper), (number, lower)) / block.error for number, lower, upper, _ in found]
    assert [one.p for *_, one in found] == pytest.approx(holm(2 * stats.t.sf(np.abs(ratios), block.freedom)))
