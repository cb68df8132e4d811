"""What a step pays for nev's metrics in Ray, as a share of the smallest step that nev ships.

make bench NAME=metrics_cost
python benchmarks/metrics_cost.py --steps 20 --repetitions 1
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from benchmarks import report
from nev.common.cli import make_command, report_errors

GOAL = 1e-3
LOGGED = 100  # times as many steps for the metrics, whose step takes microseconds
NOTES = (
    "metrics: the calls that a rank and the driver make for a step (clock, counters, gauges), on a Ray that collects metrics, "
    "with train.log_every = 10, the default. metrics_every_step: with train.log_every = 1. On a cluster the driver is on another "
    "node.",
    "step: the quickstart's tower on the 128 pictures of a rank, float32, AdamW, one process on every core.",
    "What Ray itself pays to collect metrics (some 2 % of two cores) is no part of this: a cluster pays it with or without nev, "
    "and `nev train` on one machine turns the collection off.",
)


def main(
    steps: Annotated[int, typer.Option(min=1, help="Training steps of a repetition.")] = 100,
    repetitions: Annotated[int, typer.Option(min=1, help="Rounds; each contestant runs once in each.")] = 5,
    results: Annotated[
        Path, typer.Option(help="Folder of metrics_cost.json.", show_default="benchmarks/results")
    ] = report.RESULTS,
) -> None:
    """Measure what a step pays for its metrics; writes benchmarks/results/metrics_cost.json."""
    from benchmarks.contestants import metrics
    from benchmarks.contestants.processes import in_own_process

    console = Console()
    with report_errors(), metrics.ray_with_metrics():
        contestants = {
            "metrics_us": partial(metrics.metrics_us, LOGGED * steps, 10),
            "metrics_every_step_us": partial(metrics.metrics_us, LOGGED * steps, 1),
            "step_us": partial(in_own_process, metrics.step_us, steps),
        }
        ratios = {
            "metrics_cost_share": report.Ratio("metrics_us", "step_us", GOAL, at_most=True),
            "metrics_cost_share_every_step": report.Ratio("metrics_every_step_us", "step_us", GOAL, at_most=True),
        }
        figures = report.measure_interleaved(contestants, repetitions, console)
        report.write("metrics_cost", report.this_command(), figures, ratios, NOTES, results, console)


app = make_command(main, "make bench NAME=metrics_cost")

if __name__ == "__main__":
    app()
