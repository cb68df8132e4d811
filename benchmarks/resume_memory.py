"""The host memory of four ranks that start from a checkpoint of a ViT-B/16 with both moments: read once and shared, or by each.

make bench NAME=resume_memory
python benchmarks/resume_memory.py --repetitions 1
"""

from __future__ import annotations

import tempfile
from functools import partial
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from benchmarks import report
from nev.common.cli import make_command, report_errors

NOTES = (
    "Four processes on one machine, joined by gloo; ViT-B/16 with MAP pooling, float32, AdamW; a checkpoint of weights and both "
    "moments. Peak of the processes' proportional set sizes (a page that several processes share counts in parts), every 20 ms "
    "from the end of the imports to the end of the start, libraries included.",
    "each_rank: every rank reads the whole checkpoint and keeps it until its optimiser has the moments. shared: rank 0 reads, "
    "and sends one tensor after another (nev.train.worker.state.load_model). shared_fsdp: the same under train.fsdp: a rank "
    "keeps its part.",
)


def main(
    repetitions: Annotated[int, typer.Option(min=1, help="Rounds; every way runs once in each.")] = 3,
    results: Annotated[
        Path, typer.Option(help="Folder of resume_memory.json.", show_default="benchmarks/results")
    ] = report.RESULTS,
) -> None:
    """Measure the host memory of a start from a checkpoint at W = 4; writes benchmarks/results/resume_memory.json."""
    from benchmarks.contestants import resuming
    from benchmarks.contestants.processes import in_own_process

    console = Console()
    with report_errors(), tempfile.TemporaryDirectory(prefix="nev-bench-") as folder:
        in_own_process(resuming.write_checkpoint, folder)
        ways = {f"{way}_mib": partial(resuming.peak_mib, way, folder) for way in ("each_rank", "shared", "shared_fsdp")}
        ratios = {
            "shared_vs_each_rank": report.Ratio("shared_mib", "each_rank_mib"),
            "shared_fsdp_vs_each_rank": report.Ratio("shared_fsdp_mib", "each_rank_mib"),
        }
        figures = report.measure_interleaved(ways, repetitions, console)
        report.write("resume_memory", report.this_command(), figures, ratios, NOTES, results, console)


app = make_command(main, "make bench NAME=resume_memory")

if __name__ == "__main__":
    app()
