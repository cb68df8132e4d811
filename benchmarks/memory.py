"""Memory of the stream over a run ten times longer: the object store and the heap, sampled at every batch, as a curve.

make bench NAME=memory
NEV_DATA=../shared/data python benchmarks/memory.py --batches 40

The consumer is slow for the second half of the long run: the stream has to hold back, not to pile up.
"""

from __future__ import annotations

import contextlib
import tempfile
import time
from pathlib import Path
from typing import Annotated, NamedTuple

import typer
from rich.console import Console

from benchmarks import report
from nev.common.cli import make_command, report_errors

MIB = 2**20
SLOW_S = 0.4  # what the slow consumer takes for a batch: the stream could give several in that time
FLAT = 1.1  # what a later tenth may hold of an earlier one with the same consumer
TENTHS = {"second": 1, "fifth": 4, "seventh": 6, "last": 9}
NOTES = (
    "One consumer takes blocks of 256 Flickr8k pictures at 224 px with their text vectors. object_store: bytes in use there. "
    "heap: memory of their own (USS) of all Ray worker processes and of the consumer.",
    "short: the highest value of a run of N batches. long_*: of tenths of a run of 10 N batches, whose second half has a "
    f"consumer that takes {SLOW_S} s a batch. The first tenth holds the start of the decoding processes. Tenths are compared "
    "with those of the same consumer.",
)


class Sample(NamedTuple):
    """What a run holds when it has taken `batch` batches, in MiB."""

    batch: int
    object_store: float
    heap: float


def main(
    data: Annotated[Path, typer.Option(help="Folder with flickr8k/.", envvar="NEV_DATA")] = Path("../shared/data"),
    size: Annotated[int, typer.Option(min=8, help="Side of the pictures, in pixels.")] = 224,
    batches: Annotated[int, typer.Option(min=10, help="Batches of 256 of the short run.")] = 40,
    rows: Annotated[int, typer.Option(min=1024, help="Rows of the set; runs go through it again and again.")] = 4096,
    results: Annotated[Path, typer.Option(help="Folder of memory.json.", show_default="benchmarks/results")] = (
        report.RESULTS
    ),
    picture: Annotated[Path, typer.Option(help="Where the curve goes.")] = Path("docs/images/memory.png"),
) -> None:
    """Show that memory stays flat over a run ten times longer; writes benchmarks/results/memory.json and a picture."""
    from benchmarks.contestants import pictures
    from benchmarks.contestants.processes import in_own_process

    console = Console()
    with report_errors(), tempfile.TemporaryDirectory(prefix="nev-bench-") as name:
        own = pictures.flickr8k(data.absolute(), Path(name), rows)
        with console.status("the short run"):
            short = in_own_process(samples, own, size, batches, batches)
        with console.status("the long run"):
            long = in_own_process(samples, own, size, 10 * batches, 5 * batches)
        figures: dict[str, list[float]] = {}
        for kind in ("object_store", "heap"):
            figures[f"short_{kind}_mib"] = [max(getattr(one, kind) for one in short)]
            for label, tenth in TENTHS.items():
                figures[f"long_{label}_tenth_{kind}_mib"] = [highest(long, kind, tenth, batches)]
        ratios = {
            f"long_{later}_vs_{earlier}_tenth_{kind}": report.Ratio(
                f"long_{later}_tenth_{kind}_mib", f"long_{earlier}_tenth_{kind}_mib", FLAT, at_most=True
            )
            for kind in ("object_store", "heap")
            for later, earlier in (("fifth", "second"), ("last", "seventh"))
        }
        report.write("memory", report.this_command(), figures, ratios, NOTES, results, console)
        draw(long, 5 * batches, picture)


def highest(found: list[Sample], kind: str, tenth: int, batches: int) -> float:
    """The most that was held in a tenth (from 0) of a run of 10 times `batches`."""
    return max(getattr(one, kind) for one in found if tenth * batches <= one.batch < (tenth + 1) * batches)


def samples(own: object, size: int, batches: int, fast: int) -> list[Sample]:
    """Take `batches` batches, slowly after the first `fast`, and note what is held after each."""
    import os

    import psutil
    import ray
    from ray._private.internal_api import node_stats

    from benchmarks.contestants.streams import reader_and_plan
    from nev.cluster.session import connect
    from nev.data.stream import make_stream

    connect()
    (node,) = ray.nodes()
    raylet = node["NodeManagerAddress"], node["NodeManagerPort"]
    reader, plan = reader_and_plan(own, size)  # type: ignore[arg-type]
    blocks = make_stream(reader, plan, 0, batches).iter_batches(
        batch_size=None, batch_format="numpy", prefetch_batches=2
    )
    found = []
    for number, _ in enumerate(blocks):
        used = node_stats(*raylet).store_stats.object_store_bytes_used
        me = psutil.Process(os.getpid())
        workers = [process for process in me.children(recursive=True) if process.name().startswith("ray::")]
        heap = 0
        for process in (me, *workers):
            with contextlib.suppress(psutil.NoSuchProcess):  # it has ended since it was listed
                heap += process.memory_full_info().uss
        found.append(Sample(number, used / MIB, heap / MIB))
        if number >= fast:
            time.sleep(SLOW_S)
    ray.shutdown()
    return found


def draw(found: list[Sample], slow_from: int, path: Path) -> None:
    """The two curves over the batches taken."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 3.2), layout="constrained")
    batches = [one.batch for one in found]
    axes.plot(batches, [one.heap for one in found], label="heap of all processes")
    axes.plot(batches, [one.object_store for one in found], label="object store in use")
    axes.axvspan(slow_from, batches[-1], alpha=0.08, color="black", label="slow consumer")
    axes.set(xlabel="batches of 256 pictures taken", ylabel="MiB", ylim=(0, None), title="Memory of the stream")
    axes.legend(loc="center right")
    figure.savefig(path, dpi=120)


app = make_command(main, "make bench NAME=memory")

if __name__ == "__main__":
    app()
