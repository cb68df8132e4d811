"""A training step whose batch does not fit: in parts (GradCache) beside steps of one part each, on the same number of images.

make bench NAME=step
python benchmarks/step.py --batch 4096 --repetitions 1
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from benchmarks import report
from nev.common.cli import make_command, report_errors

MEMORY_GOAL, TIME_GOAL = 1.3, 4 / 3
NOTES = (
    "A ViT-Ti of 17 tokens (32 px, patches of 8), float32, AdamW, one process on every core; each run in a process of its own. "
    "Both train on the same number of images: parts in one step, plain in as many steps as there are parts.",
    "mib: the most memory that a run took, weights, optimiser, images and all; the interpreter with its imports is left out. "
    "4/3 is what the second forward costs where a backward costs two.",
)


def main(
    batch: Annotated[int, typer.Option(min=32, help="B, images of the step in parts.")] = 16384,
    part: Annotated[int, typer.Option(min=16, help="Images of a part, and of a plain step. Divides B.")] = 256,
    repetitions: Annotated[int, typer.Option(min=1, help="Rounds; each contestant runs once in each.")] = 3,
    results: Annotated[
        Path, typer.Option(help="Folder of step.json.", show_default="benchmarks/results")
    ] = report.RESULTS,
) -> None:
    """Measure a step in parts beside plain steps; writes benchmarks/results/step.json."""
    from benchmarks.contestants import steps
    from benchmarks.contestants.processes import in_own_process

    console = Console()
    with report_errors():
        beside: dict[str, list[float]] = {}

        def seconds(name: str, step: int) -> float:
            found = in_own_process(steps.cost, batch, step, part)
            beside.setdefault(f"{name}_mib", []).append(found.mib)
            return found.seconds

        contestants: dict[str, Callable[[], float]] = {
            "parts_s": partial(seconds, "parts", batch),
            "plain_s": partial(seconds, "plain", part),
        }
        ratios = {
            "gradcache_memory": report.Ratio("parts_mib", "plain_mib", MEMORY_GOAL, at_most=True),
            "gradcache_time": report.Ratio("parts_s", "plain_s", TIME_GOAL, at_most=True),
        }
        figures = report.measure_interleaved(contestants, repetitions, console) | beside
        report.write("step", report.this_command(), figures, ratios, NOTES, results, console)


app = make_command(main, "make bench NAME=step")

if __name__ == "__main__":
    app()
