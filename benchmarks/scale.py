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
    f"B = {BATCH:,}, R = {BLOCK}. new_s: the plan and the first block of an epoch, which draws the epoch's order. block_us: "
    "a block once the order is known. groups_a_block_count: row groups that a block touches, on average over 20,000 blocks; "
    "whole: where every row group has exactly 256 rows; 10000: row groups of 10,000 rows.",
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
            "plan_groups_a_block_count": [groups_a_block(new_plan(index))],
            "plan_groups_a_block_whole_count": [groups_a_block(new_plan(whole))],
            "plan_groups_a_block_10000_count": [groups_a_block(new_plan(made_up_index(10_000)))],
        }
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
    from nev.data.plan import Plan

    return Plan(index.rows, 0, BATCH, BLOCK)


def new_seconds(index: Index) -> float:
    """Seconds of a new plan and its first block."""
    begin = time.perf_counter()
    new_plan(index).make_window(0)
    return time.perf_counter() - begin


def block_microseconds(index: Index, blocks: int = 2000) -> float:
    """Microseconds a block, over the first and the last thousand of an epoch."""
    plan = new_plan(index)
    plan.make_window(0)
    begin = time.perf_counter()
    for block in (*range(blocks // 2), *range(plan.blocks_per_epoch - blocks // 2, plan.blocks_per_epoch)):
        plan.make_window(block)
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


def groups_a_block(plan: Plan, blocks: int = 20_000) -> float:
    """Row groups that a block touches, the mean over blocks in the middle of an epoch."""
    middle = plan.blocks_per_epoch // 2
    return float(np.mean([len(plan.segments(block)) for block in range(middle, middle + blocks)]))


app = make_command(main, "make bench NAME=scale")

if __name__ == "__main__":
    app()
