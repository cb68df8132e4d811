"""Time of collectives and of steps, against hand calculations and by properties."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nev.planner.network import Fabric, Message, collective_s, exposed_s
from nev.planner.step import BACKWARD, compute_from_step, compute_s, step_time, straggler_share

FLAT = Fabric(gpus=1, link_bytes_s=1.0, node_bytes_s=1e9, share=1.0, link_latency_s=0.0, node_latency_s=0.0)
TWO_TIERS = Fabric(gpus=8, link_bytes_s=300e9, node_bytes_s=100e9, share=0.5, link_latency_s=1e-6, node_latency_s=1e-5)
SIZES = st.floats(1e3, 1e11)
WORLDS = st.integers(0, 10).map(lambda power: 2**power)


def all_reduce(nbytes: float, calls: int = 1, hidden: float = 0.0) -> Message:
    return Message("all_reduce", "gradients", calls, nbytes, hidden)


def test_a_flat_ring_is_the_textbook_s() -> None:
    """2(n-1)/n S/bw of an all-reduce, half of that of a gather."""
    for n in (2, 4, 64):
        assert collective_s(all_reduce(4e9), n, FLAT) == pytest.approx(2 * (n - 1) / n * 4)
        assert collective_s(Message("all_gather", "texts", 1, 4e9), n, FLAT) == pytest.approx((n - 1) / n * 4)
    assert collective_s(all_reduce(4e9), 1, FLAT) == 0


def test_two_tiers_are_summed() -> None:
    """16 GPUs on two nodes, a GB: 14/8 of it at 150 GB/s, then 2/2 of it at 50 GB/s, and 3 calls of 14 and 2 hops."""
    expected = 14 / 8 / 150 + 2 / 2 / 50 + 3 * (14 * 1e-6 + 2 * 1e-5)
    assert collective_s(all_reduce(1e9, 3), 16, TWO_TIERS) == pytest.approx(expected)


@given(nbytes=SIZES, world=WORLDS)
def test_a_collective_never_takes_less_with_more_ranks(nbytes: float, world: int) -> None:
    for kind in ("all_reduce", "all_gather", "reduce_scatter"):
        message = Message(kind, "", 5, nbytes)
        assert collective_s(message, 2 * world, TWO_TIERS) >= collective_s(message, world, TWO_TIERS)


@given(nbytes=SIZES, hidden=st.floats(0, 1), hideable=st.floats(0, 100))
def test_what_is_hidden_is_at_most_what_there_is_to_hide_behind(nbytes: float, hidden: float, hideable: float) -> None:
    whole = collective_s(all_reduce(nbytes), 64, TWO_TIERS)
    seconds = exposed_s([all_reduce(nbytes, hidden=hidden)], 64, TWO_TIERS, hideable)
    assert seconds == pytest.approx(max((1 - hidden) * whole, whole - hideable))


def test_the_slowest_rank_is_near_the_largest_of_many_draws() -> None:
    """sqrt(2 ln W) deviations, a little above the mean of the largest of W normal draws, by numpy."""
    import numpy as np

    assert straggler_share(0.02, 256) == pytest.approx(0.02 * 3.3302, rel=1e-4)
    assert straggler_share(0.02, 1) == 0
    largest = np.random.default_rng(0).normal(1.0, 0.02, (2000, 256)).max(1).mean() - 1
    assert largest < straggler_share(0.02, 256) < 1.25 * largest


def test_a_small_part_takes_the_time_of_its_launches() -> None:
    assert compute_s(1024, 256, 1000, 0.02, 0.5) == pytest.approx(1.524)
    assert compute_s(1024, 10, 1000, 0.02, 0.0) == pytest.approx(103 * 0.02)
    assert compute_s(100, 64, 1000, 0.0, 0.0) == pytest.approx(0.1)  # the last part is smaller


@given(compute=st.floats(0.01, 10), nbytes=SIZES, world=WORLDS)
def test_the_computation_of_a_measured_step_is_found_again(compute: float, nbytes: float, world: int) -> None:
    messages = [all_reduce(nbytes, 20, hidden=0.5)]
    step_s = step_time(compute, messages, world, TWO_TIERS, 0.02).total
    found = compute_from_step(step_s, messages, world, TWO_TIERS, 0.02)
    assert found == pytest.approx(compute, rel=1e-6)


def test_a_step_that_is_shorter_than_its_collectives_is_refused() -> None:
    with pytest.raises(ValueError, match="shorter than its collectives"):
        compute_from_step(0.01, [all_reduce(1e12)], 16, TWO_TIERS, 0.02)


@given(compute=st.floats(0.01, 10), nbytes=SIZES, world=WORLDS)
def test_a_step_takes_at_least_its_computation(compute: float, nbytes: float, world: int) -> None:
    step = step_time(compute, [all_reduce(nbytes, hidden=1.0)], world, TWO_TIERS, 0.02)
    whole = collective_s(all_reduce(nbytes), world, TWO_TIERS)
    assert step.total >= compute
    assert step.communication == pytest.approx(max(0.0, whole - BACKWARD * compute), abs=1e-9 * whole)
    assert math.isfinite(step.total)
