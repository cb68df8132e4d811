"""The planner's word beside local runs of one and of two workers, and what the coordinator of a stream hands out.

make bench NAME=plan
python benchmarks/plan.py --steps 40 --repetitions 1

A prediction is made of parts that are measured without each other: the training processes without Ray, core-seconds of an image
in the reader, and of an empty block in nev's stream. The run is `nev train` itself.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from benchmarks import report
from nev.common.cli import make_command, report_errors
from nev.config.experiment import Experiment

CONFIG = Path(__file__).parents[1] / "configs/quickstart.yaml"
WITHIN = 0.15  # what a prediction may be off by
NOTES = (
    "predicted: B / (t + (B d + b o) / W): t seconds of a step of nev's training processes without Ray, their blocks in "
    "memory, collectives by gloo; d core-seconds of an image in the reader; b blocks of a step, and o core-seconds of an empty "
    "block in nev's stream (nev.planner.local). measured: `nev train`, after a fifth of the steps. off: |predicted / measured - "
    "1|, the larger of one and of two workers.",
    "coordinator: nev's stream with blocks of one byte into two consumers; executor, tasks and consumers share the cores, so a "
    "head of its own gives more.",
)


def main(
    steps: Annotated[int, typer.Option(min=10, help="Steps of a run, and of a training without Ray.")] = 200,
    pictures: Annotated[int, typer.Option(min=512, help="Pictures that are drawn.")] = 8192,
    repetitions: Annotated[int, typer.Option(min=1, help="Rounds.")] = 3,
    results: Annotated[
        Path, typer.Option(help="Folder of plan_vs_measured.json.", show_default="benchmarks/results")
    ] = report.RESULTS,
) -> None:
    """Predict local runs and measure them; writes benchmarks/results/plan_vs_measured.json."""
    from benchmarks.contestants import planned
    from benchmarks.contestants.processes import in_own_process
    from benchmarks.contestants.ray_job import ray_job

    console = Console()
    with report_errors(), tempfile.TemporaryDirectory(prefix="nev-bench-") as folder:
        config = draw_pictures(folder, pictures)
        contestants: dict[str, Callable[[], float]] = {}
        ratios: dict[str, report.Ratio] = {}
        for world in (1, 2):
            name, with_workers = f"w{world}", at_world(config, world)
            contestants[f"{name}_predicted_images_per_s"] = partial(predict, with_workers, steps)
            contestants[f"{name}_measured_images_per_s"] = partial(measured, ray_job, with_workers, steps)
            ratios[f"predicted_vs_measured_{name}"] = report.Ratio(
                f"{name}_predicted_images_per_s", f"{name}_measured_images_per_s"
            )
        contestants["coordinator_blocks_per_s"] = partial(in_own_process, planned.coordinator_blocks_s, 2, 20)
        figures = report.measure_interleaved(contestants, repetitions, console)
        figures["off_share"] = off_shares(figures)
        goals = {"off_share": report.Goal(WITHIN, at_most=True)}
        report.write("plan_vs_measured", report.this_command(), figures, ratios, NOTES, results, console, goals)


def draw_pictures(folder: str, pictures: int) -> Experiment:
    """The quickstart's experiment, its pictures drawn and its captions embedded, without validation."""
    from benchmarks.contestants.processes import run_script
    from nev.config.file import load

    settings = {
        "output": f"{folder}/runs",
        "data.train": f"{folder}/pictures/train",
        "data.val": f"{folder}/pictures/val",
        "eval.zero_shot.classes": f"{folder}/pictures/classes.txt",
        "train.steps": 2,
        "train.eval_every": 2,
        "workers.count": 1,
    }
    overrides = [f"{key}={value}" for key, value in settings.items()]
    options = [part for override in overrides for part in ("--set", override)]
    run_script("pipelines/quickstart.py", "--config", str(CONFIG), "--train", str(pictures), "--val", "64", *options)
    alone = ["data.val=null", "eval={}", "train.eval_every=null", "train.steps=100000", "train.checkpoint_every=100000"]
    return load(CONFIG, [*overrides, *alone])


def at_world(config: Experiment, world: int) -> Experiment:
    """The experiment with so many workers."""
    return config.model_copy(update={"workers": config.workers.model_copy(update={"count": world})})


def measured(run: Callable[[Experiment, int], object], config: Experiment, steps: int) -> float:
    """Images a second of `nev train` after its warm-up."""
    return float(run(config, steps).images_per_s)  # type: ignore[attr-defined]


def predict(config: Experiment, steps: int) -> float:
    """Images a second by parts that are measured one by one."""
    from benchmarks.contestants import planned
    from benchmarks.contestants.processes import in_own_process
    from nev.planner.local import shared_cores_step_s

    cores, batch = os.cpu_count() or 1, config.train.global_batch
    trained = in_own_process(planned.train_images_s, config, steps)
    decoded = in_own_process(planned.decode_core_images_s, config, 3.0)
    blocks_s = in_own_process(planned.coordinator_blocks_s, 2, 10)
    blocks = batch // config.data.block_rows
    return batch / shared_cores_step_s(
        batch / trained, config.workers.least, batch, 1 / decoded, blocks, cores / blocks_s
    )


def off_shares(figures: dict[str, list[float]]) -> list[float]:
    """By how much predictions are off, the worse of one and of two workers, by round."""
    pairs = [
        (figures[f"w{world}_predicted_images_per_s"], figures[f"w{world}_measured_images_per_s"]) for world in (1, 2)
    ]
    return [
        max(abs(predicted[number] / real[number] - 1) for predicted, real in pairs)
        for number in range(len(pairs[0][0]))
    ]


app = make_command(main, "make bench NAME=plan")

if __name__ == "__main__":
    app()
