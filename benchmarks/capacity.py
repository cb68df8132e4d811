"""The memory of a training step as `nev.train.capacity` tells it, beside the peak of a process that takes it.

make bench NAME=capacity
python benchmarks/capacity.py --repetitions 1
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from benchmarks import report
from nev.common.cli import make_command, report_errors
from nev.config.experiment import Experiment
from nev.config.file import parse

STEPS = 2
VIT_S = {"trunk": "vit_small_patch16_224", "pool": "map"}
EVA02_B = {"trunk": "eva02_base_patch14_224", "trunk_args": {"patch_size": 16, "ref_feat_shape": [14, 14]}}
NARROW = {
    "trunk": "vit_tiny_patch16_224",
    "trunk_args": {"patch_size": 8, "embed_dim": 192, "depth": 12, "num_heads": 3},
}
# name -> vision, side of the images, batch, more of `train`
SETTINGS: dict[str, tuple[dict[str, Any], int, int, dict[str, Any]]] = {
    "vit_s_batch_32": (VIT_S, 224, 32, {}),
    "vit_s_batch_32_few_activations": (VIT_S, 224, 32, {"activation_checkpointing": True}),
    "vit_s_batch_256_in_parts_of_16": (VIT_S, 224, 256, {"micro_batch": 16}),
    "eva02_b_batch_16": (EVA02_B, 224, 16, {}),
    "narrow_batch_1024": (NARROW, 32, 1024, {}),
    "narrow_batch_4096_in_parts_of_256": (NARROW, 32, 4096, {"micro_batch": 256}),
}
NOTES = (
    "Float32, AdamW, one process on every core, texts of 384 numbers. told: the peak of nev.train.capacity. measured: that of a "
    "fresh process over two steps, less what it took before it built the model, with the libraries' own first calls in it; "
    "glibc's allocator as it is.",
)


def experiment(name: str) -> Experiment:
    """One of `SETTINGS`."""
    vision, size, batch, train = SETTINGS[name]
    raw = {
        "name": "capacity",
        "data": {"train": "none", "image_size": size, "block_rows": min(batch, 256)},
        "vision": vision,
        "optim": {"lr": 1e-4},
        "train": {"global_batch": batch, "steps": 1, "precision": "fp32", **train},
    }
    return parse(Experiment, raw)


def main(
    repetitions: Annotated[int, typer.Option(min=1, help="Rounds; every setting runs once in each.")] = 3,
    results: Annotated[
        Path, typer.Option(help="Folder of capacity.json.", show_default="benchmarks/results")
    ] = report.RESULTS,
) -> None:
    """Measure the memory of steps beside what was told; writes benchmarks/results/capacity.json."""
    from benchmarks.contestants import steps
    from benchmarks.contestants.processes import in_own_process
    from nev.train.capacity import estimate_memory

    console = Console()
    with report_errors():
        contestants: dict[str, Callable[[], float]] = {}
        ratios: dict[str, report.Ratio] = {}

        def measured(name: str) -> float:
            return in_own_process(steps.cost_of, experiment(name), STEPS).mib

        def told(name: str) -> float:
            return estimate_memory(experiment(name), steps.WIDTH).peak / 2**20

        for name in SETTINGS:
            contestants |= {f"{name}_told_mib": partial(told, name), f"{name}_measured_mib": partial(measured, name)}
            ratios[f"told_vs_measured_{name}"] = report.Ratio(f"{name}_told_mib", f"{name}_measured_mib")
        figures = report.measure_interleaved(contestants, repetitions, console)
        report.write("capacity", report.this_command(), figures, ratios, NOTES, results, console)


app = make_command(main, "make bench NAME=capacity")

if __name__ == "__main__":
    app()
