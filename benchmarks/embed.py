"""Vectors of a corpus: `nev embed-images --model` beside a bare forward loop of the same model over decoded pictures.

make bench NAME=embed
python benchmarks/embed.py --pictures 8192 --large-shards 0 --repetitions 1

Run it on a quiet machine.
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

FORWARD_GOAL = 0.85
SMALL: list[str] = []  # the quickstart's own tower
LARGE = ["data.image_size=224", "vision.trunk=vit_small_patch16_224", "vision.trunk_args={}"]
NOTES = (
    "Pictures of the quickstart's kind (drawn shapes, JPEG of about 3 kB), in shards of 4,096. Every measurement has a process "
    "of its own, on the CPU alone. The weights are random.",
    "embed_pictures_per_s: the work of pipelines/embed_images.py --model over all pictures, as the command prints it: reading, "
    "decoding, forward, writing, with the start of the processes that embed. embed_pace_per_s: from the first pictures on. "
    "embed_wall_s: the whole command. The model is the quickstart's (a ViT of 0.8 M parameters, 48 px).",
    "forward_pictures_per_s: the same model, opened by nev.load, one process, every core, decoded pictures in memory: normalise "
    "and forward; the best of batches of 16 to 256.",
    "dataloader_pictures_per_s: torch's DataLoader, a process a core, decodes by Pillow and torchvision; the model embeds "
    "batches of 256 on every core; from the first batches on.",
    "vit_s_...: the same with ViT-S/16 at 224 px, over some of the shards.",
)

Contestants = dict[str, Callable[[], float]]


def main(
    pictures: Annotated[int, typer.Option(min=4096, help="Pictures to draw.")] = 100_000,
    large_shards: Annotated[int, typer.Option(min=0, help="Shards that ViT-S/16 embeds; 0: none.")] = 1,
    repetitions: Annotated[int, typer.Option(min=1, help="Rounds; every contestant runs once in each.")] = 3,
    results: Annotated[
        Path, typer.Option(help="Folder of embed.json.", show_default="benchmarks/results")
    ] = report.RESULTS,
) -> None:
    """Measure the embedding of a corpus; writes benchmarks/results/embed.json."""
    from benchmarks.contestants import corpus
    from benchmarks.contestants.processes import in_own_process

    console = Console()
    with report_errors(), tempfile.TemporaryDirectory(prefix="nev-bench-") as name:
        if (os.cpu_count() or 1) / 2 < report.LOAD_AT_START:
            console.print(
                f"[yellow]the machine is busy (load {report.LOAD_AT_START:.1f}): do not keep these figures[/]"
            )
        folder = Path(name)
        with console.status(f"{pictures:,} pictures are drawn"):
            shards = corpus.draw_pictures(folder / "pictures", pictures)
        contestants: Contestants = {}
        beside: dict[str, list[float]] = {}
        ratios: dict[str, report.Ratio] = {}
        small = in_own_process(corpus.save_random_model, folder / "small", SMALL)
        add_model(small, shards, folder / "vectors", None, "", contestants, beside, ratios)
        if large_shards:
            large = in_own_process(corpus.save_random_model, folder / "large", LARGE)
            add_model(large, shards, folder / "vectors", large_shards, "vit_s_", contestants, beside, ratios)
        figures = report.measure_interleaved(contestants, repetitions, console) | beside
        report.write("embed", report.this_command(), figures, ratios, NOTES, results, console)


def add_model(
    model: str,
    shards: str,
    output: Path,
    limit: int | None,
    prefix: str,
    contestants: Contestants,
    beside: dict[str, list[float]],
    ratios: dict[str, report.Ratio],
) -> None:
    """The command and the bare loop with a model, in pictures/s; their ratio. prefix: of the names of the figures."""
    from benchmarks.contestants import corpus
    from benchmarks.contestants.processes import in_own_process

    def embed() -> float:
        done = corpus.embed_corpus(model, shards, output, limit)
        beside.setdefault(f"{prefix}embed_pace_per_s", []).append(done.pace_per_s)
        beside.setdefault(f"{prefix}embed_wall_s", []).append(done.wall_s)
        return done.pictures_per_s

    command, loop = f"{prefix}embed_pictures_per_s", f"{prefix}forward_pictures_per_s"
    contestants[command] = embed
    contestants[loop] = partial(in_own_process, corpus.forward_per_s, model, shards)
    if not prefix:
        contestants["dataloader_pictures_per_s"] = partial(in_own_process, corpus.dataloader_per_s, model, shards)
        ratios["embed_pace_vs_dataloader"] = report.Ratio("embed_pace_per_s", "dataloader_pictures_per_s")
    ratios[f"{prefix}embed_vs_forward"] = report.Ratio(command, loop, FORWARD_GOAL)


app = make_command(main, "make bench NAME=embed")

if __name__ == "__main__":
    app()
