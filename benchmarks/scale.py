"""What the size of the data set costs before the first picture: the index of many shards, the plan of 1.55 billion rows.

make bench NAME=scale
python benchmarks/scale.py --shards 400

The large index is made up (15,445 shards, 1,547,277,668 rows, as many as DFN-2B has); the shards of the small one are files.
"""

from __future__ import annotations

import os
import pickle
import tempfile
import time
import tracemalloc
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import numpy as np
import typer
from rich.console import Console

from benchmarks import report
from nev.common.cli import make_command, report_errors

if TYPE_CHECKING:
    from nev.data.index import Index
    from nev.data.plan import Plan

SHARDS, ROWS = 15_445, 1_547_277_668
BATCH, BLOCK = 65_536, 256
PICTURE_BYTES = 30_000  # an order of magnitude: the made-up index needs some number
MIB = 2**20
FILE_GROUPS, FILE_ROWS = 40, 4  # row groups of a small shard, and rows of each
NOTES = (
    f"plan_*: {ROWS:,} rows in {SHARDS:,} made-up shards, row groups of 256 rows (the last of a shard is shorter), "
    f"B = {BATCH:,}, R = {BLOCK}, windows of as many row groups as have 1,024 rows. new_s: the plan, the windows of an epoch and "
    "the first one, which draws the epoch's order. block_us: a block, in windows of an epoch whose order is known. "
    "groups_a_block_count: row groups that are read for a block, on average over 5,000 windows; rows_read_vs_rows: rows that "
    "are read for a row; whole: where every row group has exactly 256 rows; 10000, 1000: "
    "row groups of so many rows; tars: 256, 256, 256 and 232 rows, as tars of 1,000 samples have.",
    "plan_peak_mib: the most that the plan and three epochs' first blocks hold. plan_sent_mib: the plan as it goes to Ray's "
    "object store, once a node. index_sent_mib: the index beside it.",
    f"index_*: a folder of small shards of {FILE_GROUPS} row groups on a local disk whose pages are in memory. uncached: "
    "every footer is read, and the cache written. cached: a listing and the cache's file. Shards/s of the whole build_index.",
)


def main(
    shards: Annotated[int, typer.Option(min=1, help="Shards of the folder that is indexed.")] = 400,
    repetitions: Annotated[int, typer.Option(min=1, help="Rounds.")] = 3,
    results: Annotated[
        Path, typer.Option(help="Folder of scale.json.", show_default="benchmarks/results")
    ] = report.RESULTS,
) -> None:
    """Time the plan of 1.55 billion rows and the index with and without its cache; writes benchmarks/results/scale.json."""
    from nev.data.windows import count_rows_read

    console = Console()
    with report_errors(), tempfile.TemporaryDirectory(prefix="nev-bench-") as name:
        os.environ["NEV_CACHE"] = f"{name}/cache"
        write_shards(Path(name, "shards"), shards)
        index = made_up_index(BLOCK)
        whole = replace(index, rows=np.full_like(index.rows, BLOCK))
        figures = report.measure_interleaved(
            {
                "index_uncached_shards_per_s": lambda: shards / index_seconds(name, cached=False),
                "index_cached_shards_per_s": lambda: shards / index_seconds(name, cached=True),
                "plan_new_s": lambda: new_seconds(index),
                "plan_block_us": lambda: block_microseconds(index),
            },
            repetitions,
            console,
        )
        figures |= {
            "plan_peak_mib": [peak_mib(index)],
            "plan_sent_mib": [len(pickle.dumps(new_plan(index), protocol=5)) / MIB],
            "index_sent_mib": [len(pickle.dumps(index, protocol=5)) / MIB],
            "plan_row_groups_count": [float(len(index.rows))],
        }
        tars = replace(index, rows=np.tile([BLOCK, BLOCK, BLOCK, 232], len(index.rows) // 4))
        sizes = {
            "": index,
            "_whole": whole,
            "_10000": made_up_index(10_000),
            "_1000": made_up_index(1000),
            "_tars": tars,
        }
        for name_of_size, of_size in sizes.items():
            plan = new_plan(of_size)
            figures[f"plan_groups_a_block{name_of_size}_count"] = [groups_a_block(plan)]
            figures[f"plan_rows_read_vs_rows{name_of_size}"] = [count_rows_read(plan, 5000) / BLOCK]
        ratios = {"index_cached_vs_uncached": report.Ratio("index_cached_shards_per_s", "index_uncached_shards_per_s")}
        report.write("scale", report.this_command(), figures, ratios, NOTES, results, console)


def made_up_index(group_rows: int) -> Index:
    """An index of SHARDS shards and ROWS rows in row groups of `group_rows`, the last of each shard being shorter."""
    from nev.config.data import Columns
    from nev.data.index import Index

    rows_of_shard = np.full(SHARDS, ROWS // SHARDS)
    rows_of_shard[: ROWS % SHARDS] += 1
    groups = -(-rows_of_shard // group_rows)
    last = np.cumsum(groups) - 1
    rows = np.full(groups.sum(), group_rows)
    rows[last] = rows_of_shard - (groups - 1) * group_rows
    return Index(
        root="made-up",
        paths=tuple(f"{shard:08d}.parquet" for shard in range(SHARDS)),
        shard=np.repeat(np.arange(SHARDS, dtype=np.int32), groups),
        group=(np.arange(len(rows)) - np.repeat(last + 1 - groups, groups)).astype(np.int32),
        rows=rows,
        nbytes=rows * PICTURE_BYTES,
        columns=Columns(uid="uid", image="image", caption="caption"),
        fingerprint="made up",
        tars=(None,) * SHARDS,
        objects={},
    )


def write_shards(folder: Path, count: int) -> None:
    """Small shards of FILE_GROUPS row groups: what matters here is their footers."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.table({"uid": ["uid"] * FILE_ROWS, "image": [b"image"] * FILE_ROWS, "caption": ["caption"] * FILE_ROWS})
    folder.mkdir()
    for shard in range(count):
        with pq.ParquetWriter(folder / f"{shard:08d}.parquet", table.schema) as writer:
            for _ in range(FILE_GROUPS):
                writer.write_table(table)


def index_seconds(name: str, cached: bool) -> float:
    """Seconds of build_index over the folder's shards, whose entry is in the cache or has been deleted."""
    from nev.config.data import Columns
    from nev.data.index import build_index
    from nev.data.index_cache import cache_folder

    if cached:
        build_index(f"{name}/shards", Columns())
    else:
        for entry in cache_folder().glob("*"):
            entry.unlink()
    begin = time.perf_counter()
    build_index(f"{name}/shards", Columns())
    return time.perf_counter() - begin


def new_plan(index: Index) -> Plan:
    """A plan that has drawn no epoch's order yet."""
    from nev.data.plan import Plan, choose_window

    return Plan(index.rows, 0, BATCH, BLOCK, choose_window(index.rows, BLOCK))


def new_seconds(index: Index) -> float:
    """Seconds of a new plan, the windows of an epoch and the first of them."""
    from nev.data.windows import make_windows

    begin = time.perf_counter()
    plan = new_plan(index)
    make_windows(plan, 0, plan.blocks_per_epoch)[0]
    return time.perf_counter() - begin


def block_microseconds(index: Index, count: int = 500) -> float:
    """Microseconds a block, over the first windows of an epoch and the last."""
    from nev.data.windows import make_windows

    plan = new_plan(index)
    windows = make_windows(plan, 0, plan.blocks_per_epoch)
    windows[0]
    begin, blocks = time.perf_counter(), 0
    for number in (*range(count), *range(len(windows) - count, len(windows))):
        blocks += windows[number].blocks
    return (time.perf_counter() - begin) / blocks * 1e6


def peak_mib(index: Index) -> float:
    """MiB that the plan, its copy of the rows and three epochs' orders, of which it keeps two, take at most."""
    tracemalloc.start()
    try:
        plan = new_plan(index)
        for epoch in range(3):
            plan.make_window(epoch * plan.blocks_per_epoch)
        return (tracemalloc.get_traced_memory()[1] + plan.rows.nbytes) / MIB
    finally:
        tracemalloc.stop()


def groups_a_block(plan: Plan, count: int = 5000) -> float:
    """Row groups that are read for a block: the mean over `count` windows in the middle of an epoch."""
    from nev.data.windows import make_windows

    windows = make_windows(plan, 0, plan.blocks_per_epoch)
    middle = [windows[number] for number in range(len(windows))[len(windows) // 2 :][:count]]
    return sum(len(window.segments) for window in middle) / sum(window.blocks for window in middle)


app = make_command(main, "make bench NAME=scale")

if __name__ == "__main__":
    app()
