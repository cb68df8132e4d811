"""The data plane side by side: nev's stream, torch's DataLoader, open_clip's WebDataset pipeline, and the bare decoding loop.

make bench NAME=data
NEV_DATA=../shared/data python benchmarks/data.py --repetitions 5

Every contestant feeds one consumer on this machine's cores. Run it on a quiet machine: it takes seventeen minutes.
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

DATALOADER_GOAL, OPEN_CLIP_GOAL, LIMIT_GOAL, RESUME_GOAL = 1.0, 2.0, 0.9, 1.2
TAR_GOAL, INDEX_GOAL = 0.95, 0.5
NOTES = (
    "Every measurement has a process of its own; nev's starts a Ray of this machine's CPUs and warms it with two short "
    "streams. Batches and blocks have 256 rows. A rate is that of 10 s, from 5 s after the first batch on.",
    "stream: parquet shards with text sidecars -> Ray Data -> iter_batches in one consumer, with the text vectors. dataloader: "
    "torch's DataLoader with a worker a core and nev's decoding, bytes in memory. open_clip: its WebDataset pipeline with a "
    "worker a core, its own transform and tokenizer. limit: nev's decoding and resizing alone, a process a core, no batch "
    "given to anyone.",
    "tars: the same stream from tars of the same rows where they lie. index_tars: the index of the tars of imagenet_sample by "
    "one process, beside a plain read of the same files, which are not in memory before.",
    "first_batch_s: from asking for the stream to its first batch, on the warm cluster. resume_*: the same at the first and "
    "at the last step of the second epoch; each the median of 5 starts in turns.",
    "bytes_copied_per_row is the sum of: what Arrow allocates for the columns that are read (the file itself is mapped into "
    "memory); the crop, which torch lays in one piece before it resizes; the block, put into the object store. The consumer's "
    "tensors lie in the object store's memory: nothing is copied there.",
)


def main(
    data: Annotated[Path, typer.Option(help="Folder with imagenet_sample/ and flickr8k/.", envvar="NEV_DATA")] = Path(
        "../shared/data"
    ),
    size: Annotated[int, typer.Option(min=8, help="Side of the pictures, in pixels.")] = 224,
    rows: Annotated[int, typer.Option(min=1024, help="Rows of each set.")] = 4096,
    repetitions: Annotated[int, typer.Option(min=1, help="Rounds; every contestant runs once in each.")] = 5,
    results: Annotated[
        Path, typer.Option(help="Folder of data.json.", show_default="benchmarks/results")
    ] = report.RESULTS,
) -> None:
    """Measure how fast pictures reach one consumer, beside what one would otherwise use; writes benchmarks/results/data.json."""
    from benchmarks.contestants import open_clip, pictures, streams
    from benchmarks.contestants.processes import in_own_process

    console = Console()
    with report_errors(), tempfile.TemporaryDirectory(prefix="nev-bench-") as name:
        if (os.cpu_count() or 1) / 2 < report.LOAD_AT_START:
            console.print(
                f"[yellow]the machine is busy (load {report.LOAD_AT_START:.1f}): do not keep these figures[/]"
            )
        with console.status("writing shards and tars"):
            sets = [make(data.absolute(), Path(name), rows) for make in (pictures.imagenet_sample, pictures.flickr8k)]
        contestants: dict[str, Callable[[], float]] = {}
        beside: dict[str, list[float]] = {}
        ratios: dict[str, report.Ratio] = {}
        missing = open_clip.not_installed()
        if missing:
            console.print(f"[yellow]open_clip is left out: {', '.join(missing)} not installed ({open_clip.INSTALL})[/]")

        def stream(own: pictures.Pictures) -> float:
            found = in_own_process(streams.nev_stream, own, size)
            for key in ("first_batch_s", "resume_first_s", "resume_last_s"):
                beside.setdefault(f"{own.name}_{key}", []).append(getattr(found, key))
            return found.images_per_s

        def tar_stream(own: pictures.Pictures) -> float:
            return in_own_process(streams.nev_stream, own._replace(shards=own.in_place), size).images_per_s

        for own in sets:
            ours, in_tars, loader, theirs, bare = (
                f"{own.name}_{kind}_images_per_s" for kind in ("stream", "tars", "dataloader", "open_clip", "limit")
            )
            contestants[ours] = partial(stream, own)
            contestants[in_tars] = partial(tar_stream, own)
            contestants[loader] = partial(in_own_process, streams.dataloader, own, size)
            contestants[bare] = partial(in_own_process, streams.limit, own, size)
            ratios[f"tar_in_place_vs_parquet_{own.name}"] = report.Ratio(in_tars, ours, TAR_GOAL)
            ratios[f"stream_vs_dataloader_{own.name}"] = report.Ratio(ours, loader, DATALOADER_GOAL)
            ratios[f"stream_vs_limit_{own.name}"] = report.Ratio(ours, bare, LIMIT_GOAL)
            if not missing:
                contestants[theirs] = partial(in_own_process, streams.open_clip_stream, own, size)
                ratios[f"stream_vs_open_clip_{own.name}"] = report.Ratio(ours, theirs, OPEN_CLIP_GOAL)
            ratios[f"resume_last_vs_first_{own.name}"] = report.Ratio(
                f"{own.name}_resume_last_s", f"{own.name}_resume_first_s", RESUME_GOAL, at_most=True
            )
        figures = report.measure_interleaved(contestants, repetitions, console)
        figures |= beside
        figures["first_batch_s"] = beside["imagenet_sample_first_batch_s"]
        speeds = [in_own_process(streams.tar_mb_per_s, sets[0]) for _ in range(repetitions)]
        figures["tar_read_mb_per_s"], figures["index_tars_mb_per_s"] = map(list, zip(*speeds, strict=True))
        ratios["index_tars_vs_read"] = report.Ratio("index_tars_mb_per_s", "tar_read_mb_per_s", INDEX_GOAL)
        for own in sets:
            copied = in_own_process(streams.copies, own, size)
            figures |= {f"{own.name}_bytes_copied_per_row_{where}": [count] for where, count in copied.items()}
            figures[f"{own.name}_bytes_copied_per_row"] = [sum(copied.values())]
        figures["bytes_copied_per_row"] = figures["imagenet_sample_bytes_copied_per_row"]
        headline = {key.removesuffix("_imagenet_sample"): ratio for key, ratio in ratios.items()}
        report.write("data", report.this_command(), figures, headline, NOTES, results, console)


app = make_command(main, "make bench NAME=data")

if __name__ == "__main__":
    app()
