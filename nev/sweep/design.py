"""What a sweep can see before it runs: the smallest difference that its arms and seeds show, and what that costs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from rich.table import Table

from nev.common.words import counted
from nev.config.base import ConfigError
from nev.sweep.block_design import MIN_SEEDS, POWER, least_difference, make_block
from nev.sweep.config import Sweep
from nev.sweep.figures import make_label
from nev.sweep.findings import format_number
from nev.sweep.report import read_sweep
from nev.sweep.results import Outcome
from nev.sweep.trials import Trial, compute_steps, find_reference

OTHER_SEEDS = (3, 5, 8)


class Design(NamedTuple):
    """A number of seeds for the arms of a sweep.

    seeds: number.
    trials: number of trainings.
    least: smallest difference from the reference that is found with probability 0.8, in standard deviations over seeds; None with
        too few seeds.
    """

    seeds: int
    trials: int
    least: float | None


class Before(NamedTuple):
    """What an earlier run of the sweep says.

    noise: metric to the standard deviation of a trial over seeds.
    seconds: of a trial.
    """

    noise: dict[str, float]
    seconds: float


def list_designs(sweep: Sweep, arms: int) -> list[Design]:
    """The sweep's own number of seeds, and others."""
    counts = sorted({len(sweep.seeds), *OTHER_SEEDS})
    return [
        Design(seeds, arms * seeds, least_difference(arms, seeds) if seeds >= MIN_SEEDS and arms > 1 else None)
        for seeds in counts
    ]


def read_before(uri: str, sweep: Sweep) -> Before | None:
    """What the newest sweep of this name in MLflow says; None where there is none with a complete pair of arms."""
    if uri.startswith("sqlite:///") and not Path(uri.removeprefix("sqlite:///")).is_file():
        return None  # MLflow would make the file
    try:
        outcome = read_sweep(uri, sweep.name)
    except ConfigError:
        return None
    return measure(outcome)


def measure(outcome: Outcome) -> Before | None:
    """The noise and the time of the trials of a sweep; None without two complete arms at `MIN_SEEDS` seeds."""
    noise = {}
    for metric in outcome.sweep.metrics:
        values = {arm: own for arm, own in outcome.values(metric).items() if arm in outcome.complete_arms}
        if len(values) > 1 and (block := make_block(values, outcome.resolution(metric))).freedom:
            noise[metric] = block.error * math.sqrt(block.values.shape[1] / 2)
    if not noise:
        return None
    return Before(noise, sum(result.seconds for result in outcome.results) / len(outcome.results))


def describe_design(sweep: Sweep, trials: Sequence[Trial]) -> str:
    """One line: arms, trials, and the samples and steps of all trials."""
    arms, steps = len(trials) // len(sweep.seeds), sum(compute_steps(trial.experiment) for trial in trials)
    size = f"{counted(arms, 'arm')}, {counted(len(sweep.seeds), 'seed')}"
    return (
        f"{sweep.name}: {size}, {counted(len(trials), 'trial')} of {sweep.samples:,} samples; "
        f"{len(trials) * sweep.samples:,} samples in {steps:,} steps. Reference: {make_label(find_reference(sweep))}."
    )


def make_design_table(sweep: Sweep, arms: int, before: Before | None) -> Table:
    """The smallest difference and the cost, for some numbers of seeds."""
    title = f"smallest difference from the reference that is found with probability {POWER:.0%}"
    table = Table(title=title, title_justify="left")
    for column in ("seeds", "trials", "standard deviations", *(before.noise if before else ())):
        table.add_column(column, justify="right")
    table.add_column("time of all trials" if before else "samples", justify="right")
    for design in list_designs(sweep, arms):
        least = "none is tested" if design.least is None else f"{design.least:.1f}"
        cells = [
            "" if design.least is None else format_number(metric, design.least * noise, points=True)
            for metric, noise in (before.noise.items() if before else ())
        ]
        cost = f"{design.trials * before.seconds / 3600:,.1f} h" if before else f"{design.trials * sweep.samples:,}"
        mark = " (this sweep)" if design.seeds == len(sweep.seeds) else ""
        table.add_row(f"{design.seeds}{mark}", str(design.trials), least, *cells, cost)
    return table
