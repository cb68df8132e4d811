"""Losses of nodes: Young's and Daly's period, the share of the work that counts, and the same by simulation."""

from __future__ import annotations

import math
import statistics
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nev.planner.losses import best_period, goodput, mean_time_between_losses
from nev.planner.simulate import Scenario, simulate

HOUR = 3600.0
RUN = Scenario(
    steps=10_000,
    step_s=2.0,
    batch=1000,
    checkpoint_steps=100,
    checkpoint_s=1.0,
    boot_s=300,
    start_s=60,
    losses_s=0.0,
    decoders=0,
    own_images_s=1e6,
    decoder_images_s=100.0,
    request_s=10.0,
)


def test_daly_s_own_examples() -> None:
    """Of the paper (Daly 2006, figures 3 to 5): dump 5 min, losses every 24 h, 6 h and 15 min."""
    for mtbl_min, expected in ((24 * 60, 117), (6 * 60, 57), (15, 9.1)):
        assert best_period(5 * 60, mtbl_min * 60) / 60 == pytest.approx(expected, abs=0.6)


@given(checkpoint=st.floats(0.1, 100), mtbl=st.floats(1000, 1e6), factor=st.floats(0.05, 20))
def test_no_other_period_is_much_better(checkpoint: float, mtbl: float, factor: float) -> None:
    best = best_period(checkpoint, mtbl)
    assert goodput(best, checkpoint, mtbl, 60) >= goodput(factor * best, checkpoint, mtbl, 60) - 1e-4


def test_without_losses_only_checkpoints_cost() -> None:
    assert mean_time_between_losses(64, 0.0) == math.inf
    assert best_period(5, math.inf) == math.inf
    assert goodput(95, 5, math.inf, 400) == pytest.approx(0.95)
    assert mean_time_between_losses(64, 0.002) == pytest.approx(HOUR / 0.128)


def test_losses_faster_than_a_restart_leave_nothing() -> None:
    assert goodput(HOUR, 1.0, 1.0, 300) == 0.0


@pytest.mark.parametrize("mtbl_s", [HOUR / 2, 2 * HOUR, 10 * HOUR])
def test_the_simulation_agrees_with_daly_s_formula(mtbl_s: float) -> None:
    run = replace(RUN, losses_s=1 / mtbl_s)
    took = [simulate(run, seed) for seed in range(200)]
    useful = run.steps * run.step_s / statistics.mean(each.seconds - each.first_step_s for each in took)
    assert useful == pytest.approx(goodput(200, 1.0, mtbl_s, 360), rel=0.03)
    assert all(each.repeated <= 100 * each.losses for each in took)


def test_a_run_without_losses_takes_its_steps_and_its_start() -> None:
    assert simulate(RUN, 0).seconds == pytest.approx(360 + 10_000 * (2.0 + 0.01))
    assert simulate(RUN, 0).losses == simulate(RUN, 0).repeated == 0


def test_decoders_come_one_request_after_another() -> None:
    """Four decoders, requested 1, 1 and 2 at a time, ten seconds apart, each 300 s after its request. 100 images/s each."""
    run = replace(RUN, decoders=4, own_images_s=100.0, decoder_images_s=100.0, steps=100)
    took = simulate(run, 0)
    assert took.first_step_s == 360
    assert took.grown_s == 360 + 20 + 300
    # 100 images/s for 300 s are 30 steps of 1,000; then 10 s at 200, 10 s at 300, and the rest at 500.
    done = 300 / 10.01 + 10 / 5.01 + 10 / (10 / 3 + 0.01)
    assert took.seconds == pytest.approx(680 + (100 - done) * 2.01)


def test_nothing_is_decoded_before_the_first_decoder() -> None:
    took = simulate(replace(RUN, decoders=1, own_images_s=0.0, decoder_images_s=1000.0, steps=10), 0)
    assert took.seconds == pytest.approx(660 + 10 * 2.01)
    assert simulate(replace(RUN, own_images_s=0.0), 0).seconds == math.inf
