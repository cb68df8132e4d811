"""A locked trunk: Flickr8k from an empty folder, a stream of features, a head beside a bare loop, embed-images beside timm.

make bench NAME=frozen
python benchmarks/frozen.py --rows 16384 --steps 10 --repetitions 1 --flickr-rounds 0 --no-large

Run it on a quiet machine.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from benchmarks import report
from nev.common.cli import make_command, report_errors

if TYPE_CHECKING:
    from nev.config.experiment import Experiment

HEAD_GOAL, FORWARD_GOAL = 0.7, 0.85
GOALS = {
    "train_s": report.Goal(90, at_most=True),
    "step_65536_peak_gib": report.Goal(3, at_most=True),
    "online_vs_sidecar_loss": report.Goal(1e-3, at_most=True),
}
LARGE = 65_536
NOTES = (
    "Every measurement has a process of its own. All run on the CPU alone.",
    "prepare_s, embed_text_s, embed_images_s, train_s: the commands of configs/flickr8k_photos.yaml in an empty folder, with an "
    "empty cache, each from its start to its end; prepare_s is that of both splits. The recalls are of the validation set "
    "after training, as shares, with the 95 % interval of the first.",
    "The vectors of the next figures are random: 768 numbers of a picture, 768 of its text, in sidecars beside shards.",
    "stream_vectors: shards with both sidecars -> Ray Data -> iter_batches in one consumer, blocks of 4,096 rows; 10 s, from 5 s "
    "after the first block on.",
    "head_training: pipelines/train.py on a Ray of its own, one worker, a linear head, batches of 4,096 in one block; the first "
    "fifth of the steps is left out. It waits for data in the timed steps. bare_loop: one process, every core, float32 rows in "
    "memory, the same batch, head, AdamW and clipping, the whole matrix of scores and two cross-entropies. bare_loop_own_loss "
    "has nev's loss, so that what the pipeline itself costs shows.",
    "embed_images_per_s: the work of pipelines/embed_images.py over the training and the validation pictures, as the command "
    "prints it: reading, decoding, the trunk, writing, with the start of the processes that embed. embed_images_wall_s: the "
    "whole command. forward_per_s: timm's trunk alone, one process, every core, decoded pictures in memory, contiguous; the best "
    "of batches of 16, 64 and 256.",
    "step_65536: nev's training loop in one process that reads the sidecars itself; the second step. The peak is all resident "
    "memory of the process, with its libraries.",
    "online_vs_sidecar_loss: largest difference between the losses of 50 steps of 64 pictures with the trunk in the loop, and "
    "with its sidecars; evaluation view.",
)

Contestants = dict[str, Callable[[], float]]


def main(
    data: Annotated[Path, typer.Option(help="Folder with flickr8k/.", envvar="NEV_DATA")] = Path("../shared/data"),
    rows: Annotated[int, typer.Option(min=4096, help="Rows of the set of vectors.")] = 131_072,
    steps: Annotated[int, typer.Option(min=5, help="Steps of head training and of the bare loops.")] = 60,
    repetitions: Annotated[int, typer.Option(min=1, help="Rounds; every contestant runs once in each.")] = 3,
    flickr_rounds: Annotated[int, typer.Option(min=0, help="Runs of the commands over Flickr8k.")] = 1,
    large: Annotated[bool, typer.Option(help="Measure a step of 65,536 rows: some minutes.")] = True,
    results: Annotated[
        Path, typer.Option(help="Folder of frozen.json.", show_default="benchmarks/results")
    ] = report.RESULTS,
) -> None:
    """Measure training behind a locked trunk, and what comes before; writes benchmarks/results/frozen.json."""
    from benchmarks.contestants import photos, vectors
    from benchmarks.contestants.processes import BenchmarkFailed, in_own_process

    console = Console()
    with report_errors(), tempfile.TemporaryDirectory(prefix="nev-bench-") as name:
        if (os.cpu_count() or 1) / 2 < report.LOAD_AT_START:
            console.print(
                f"[yellow]the machine is busy (load {report.LOAD_AT_START:.1f}): do not keep these figures[/]"
            )
        if large and rows < LARGE:
            raise BenchmarkFailed(f"a step of {LARGE:,} rows needs as many: give --rows {LARGE} or more, or --no-large")
        data, folder = data.absolute(), Path(name)
        figures, overrides = run_commands(data, folder / "flickr8k", flickr_rounds, console)
        if overrides is None:
            with console.status("a set of pictures"):
                overrides = in_own_process(photos.make_set, data, folder / "pictures")
        with console.status("a set of vectors"):
            head = in_own_process(vectors.write_vectors, folder / "vectors", rows, 4096, 4096)
        contestants: Contestants = {}
        beside: dict[str, list[float]] = {}
        ratios: dict[str, report.Ratio] = {}
        add_heads(head, steps, contestants, beside, ratios)
        add_photos(overrides, contestants, beside, ratios)
        figures |= report.measure_interleaved(contestants, repetitions, console)
        figures |= beside
        if large:
            figures |= measure_large_step(head)
        difference = in_own_process(photos.online_vs_sidecar, overrides, folder / "modes")
        figures["online_vs_sidecar_loss"] = [difference]
        goals = {key: goal for key, goal in GOALS.items() if key in figures}
        report.write("frozen", report.this_command(), figures, ratios, NOTES, results, console, goals)


def run_commands(
    data: Path, folder: Path, rounds: int, console: Console
) -> tuple[dict[str, list[float]], list[str] | None]:
    """The figures of the commands over Flickr8k, and the settings of the last round; or a line why they are left out."""
    from benchmarks.contestants import photos
    from benchmarks.contestants.processes import in_own_process

    reason = "--flickr-rounds 0" if rounds == 0 else photos.not_there(data)
    if reason:
        console.print(f"[yellow]the commands over Flickr8k are left out: {reason}[/]", highlight=False, soft_wrap=True)
        return {}, None
    figures: dict[str, list[float]] = {}
    for number in range(rounds):
        if number:
            shutil.rmtree(folder, ignore_errors=True)
        found = in_own_process(photos.from_nothing, data, folder)
        for key, value in found.items():
            figures.setdefault(key, []).append(value)
        shown = "  ".join(f"{key} {value:,.4g}" for key, value in found.items())
        console.print(f"flickr8k {number + 1}/{rounds}  {shown}", highlight=False, soft_wrap=True)
    return figures, photos.overrides_for(folder)


def add_heads(
    head: Experiment,
    steps: int,
    contestants: Contestants,
    beside: dict[str, list[float]],
    ratios: dict[str, report.Ratio],
) -> None:
    """The stream, nev's job and the bare loops over the set of vectors, in rows/s; their ratios."""
    from benchmarks.contestants import heads
    from benchmarks.contestants.processes import in_own_process
    from benchmarks.contestants.ray_job import ray_job

    def timed_job() -> float:
        rates = ray_job(head, steps)
        beside.setdefault("head_training_rows_per_s_from_start", []).append(rates.images_per_s_from_start)
        beside.setdefault("head_training_data_wait_share", []).append(rates.data_wait_share)
        return rates.images_per_s

    job, loop, own = "head_training_rows_per_s", "bare_loop_rows_per_s", "bare_loop_own_loss_rows_per_s"
    contestants["stream_vectors_rows_per_s"] = partial(in_own_process, heads.stream_rows_per_s, head)
    contestants[job] = timed_job
    contestants[loop] = partial(in_own_process, heads.bare_loop, head, steps, False)
    contestants[own] = partial(in_own_process, heads.bare_loop, head, steps, True)
    ratios["head_training_vs_bare_loop"] = report.Ratio(job, loop, HEAD_GOAL)
    ratios["head_training_vs_bare_loop_own_loss"] = report.Ratio(job, own)


def add_photos(
    overrides: list[str], contestants: Contestants, beside: dict[str, list[float]], ratios: dict[str, report.Ratio]
) -> None:
    """embed-images and the bare trunk, in pictures/s; their ratio."""
    from benchmarks.contestants import photos
    from benchmarks.contestants.processes import in_own_process

    def embed() -> float:
        found = photos.embed_images(overrides)
        beside.setdefault("embed_images_wall_s", []).append(found.wall_s)
        return found.pictures_per_s

    contestants["embed_images_per_s"] = embed
    contestants["forward_per_s"] = partial(in_own_process, photos.forward_per_s, overrides)
    ratios["embed_images_vs_forward"] = report.Ratio("embed_images_per_s", "forward_per_s", FORWARD_GOAL)


def measure_large_step(head: Experiment) -> dict[str, list[float]]:
    """Seconds of a step of 65,536 rows, and the peak of the memory of its process."""
    from benchmarks.contestants import heads
    from benchmarks.contestants.processes import in_own_process

    train = head.train.model_copy(update={"global_batch": LARGE, "log_every": 1})
    job, reader = in_own_process(heads.prepare_head, head.model_copy(update={"train": train}), heads.LARGE_STEPS)
    cost = in_own_process(heads.large_step, job, reader)
    return {"step_65536_s": [cost.seconds], "step_65536_peak_gib": [cost.gib]}


app = make_command(main, "make bench NAME=frozen")

if __name__ == "__main__":
    app()
