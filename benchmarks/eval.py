"""Evaluation: embedding through Ray against the bare forward loop, the whole quick suite, and search among 100,000 pictures.

make bench NAME=eval ARGS="--cifar10 runs/cifar10/checkpoints/step-00001170 --flickr8k runs/flickr8k/checkpoints/step-00000500"

The checkpoints are those of the README's experiments. Each suite starts with nothing kept.
"""

from __future__ import annotations

import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from benchmarks import report
from benchmarks.contestants import embedding
from benchmarks.contestants.processes import in_own_process
from nev.common.cli import make_command, report_errors

FORWARD_GOAL = 0.85
SUITE_GOAL_S, SEARCH_GOAL_GIB = 180.0, 1.0
NOTES = (
    "embed_images_per_s: Flickr8k's training pictures (JPEGs of 224 px) read from tars, decoded, and embedded by the Flickr8k "
    "checkpoint through Ray on every core, from the moment at which the processes have begun to give pictures. "
    "forward_images_per_s: the same tower over arrays that are in memory, as many processes as cores, one thread each.",
    "quick_suite_s: `evaluate.py --suite quick` from its start to its end with nothing kept: the slower of both checkpoints; "
    f"goal at most {SUITE_GOAL_S:g} s.",
    "retrieval_100k: ranks both ways of 100,000 texts and 100,000 images of 768 numbers (random). extra_gib: what it takes at "
    f"its peak beside the embeddings themselves; goal at most {SEARCH_GOAL_GIB:g} GiB.",
)


def main(
    cifar10: Annotated[str, typer.Option(help="Checkpoint of configs/cifar10.yaml.")],
    flickr8k: Annotated[str, typer.Option(help="Checkpoint of configs/flickr8k.yaml.")],
    data: Annotated[Path, typer.Option(help="Folder with flickr8k/ and cifar10/.", envvar="NEV_DATA")] = Path(
        "../shared/data"
    ),
    repetitions: Annotated[int, typer.Option(min=1, help="Rounds.")] = 5,
    rows: Annotated[int, typer.Option(min=1000, help="Pictures and captions of the search.")] = 100_000,
    results: Annotated[Path, typer.Option(help="Folder of eval.json.", show_default="benchmarks/results")] = (
        report.RESULTS
    ),
) -> None:
    """Measure evaluation; writes benchmarks/results/eval.json."""
    console = Console()
    with report_errors(), tempfile.TemporaryDirectory(prefix="nev-bench-") as name:
        tars = str(data.absolute() / "flickr8k/train")
        embedded = report.measure_interleaved(
            {
                "embed_images_per_s": partial(in_own_process, embedding.through_ray, flickr8k, tars),
                "forward_images_per_s": partial(in_own_process, embedding.bare_forward, flickr8k),
            },
            repetitions,
            console,
        )
        suites = []
        for number, checkpoint in enumerate((cifar10, flickr8k)):
            begin = time.perf_counter()
            embedding.quick_suite(checkpoint, data.absolute(), Path(name, str(number)))
            suites.append(time.perf_counter() - begin)
            console.print(f"quick suite  {suites[-1]:.0f} s", highlight=False)
        search = in_own_process(embedding.search, rows, 768)
        figures = {
            **embedded,
            "quick_suite_s": [max(suites)],
            "quick_suite_cifar10_s": suites[:1],
            "quick_suite_flickr8k_s": suites[1:],
            "retrieval_100k_extra_gib": [search.gib],
            "retrieval_100k_s": [search.seconds],
        }
        report.write(
            "eval",
            report.this_command(),
            figures,
            {"embed_vs_forward": report.Ratio("embed_images_per_s", "forward_images_per_s", FORWARD_GOAL)},
            NOTES,
            folder=results,
            console=console,
        )


app = make_command(main, 'make bench NAME=eval ARGS="--cifar10 CHECKPOINT --flickr8k CHECKPOINT"')

if __name__ == "__main__":
    app()
