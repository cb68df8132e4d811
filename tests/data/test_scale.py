"""The published set's size, 1.55 billion pairs in 15,445 shards, made up: planned in bounded memory, and still correct."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
from helpers.fresh import run_in_fresh_process

from benchmarks.scale import ROWS, SHARDS, made_up_index
from nev.data import index_cache
from nev.data.plan import Plan, choose_window

BATCH, BLOCK = 65_536, 256
BYTES_A_GROUP = 60  # rows 8, two epochs' orders of 12, and 24 for a moment while a third is drawn


@pytest.mark.slow
@pytest.mark.parametrize("group_rows", [256, 10_000])
def test_1_55_billion_rows_are_planned_in_bounded_memory(group_rows: int) -> None:
    rows, groups, peak = run_in_fresh_process(plan_three_epochs, group_rows)
    assert rows == ROWS
    assert peak < BYTES_A_GROUP * groups + 1_000_000


def plan_three_epochs(group_rows: int) -> tuple[int, int, int]:
    """The rows and row groups of the set, and the peak of memory in bytes while three epochs are begun."""
    rows = made_up_index(group_rows).rows
    tracemalloc.start()
    plan = Plan(rows.copy(), 7, BATCH, BLOCK)
    for epoch in range(3):  # a plan holds the orders of two epochs at most
        plan.make_window(epoch * plan.blocks_per_epoch)
    return int(rows.sum()), len(rows), tracemalloc.get_traced_memory()[1]


@pytest.mark.parametrize("group_rows", [256, 10_000])
def test_blocks_of_1_55_billion_rows_are_whole_and_apart(group_rows: int) -> None:
    group_sizes = made_up_index(group_rows).rows
    plan = Plan(group_sizes, 7, BATCH, BLOCK, choose_window(group_sizes, BLOCK))
    per_epoch = plan.blocks_per_epoch
    assert plan.tail_rows == ROWS % BATCH
    sampled = np.random.default_rng(0).integers(0, per_epoch, 300).tolist()
    within = sorted({0, 1, per_epoch - 1, *plan.step_blocks(12_345), *sampled})
    for epoch in (0, 2):
        first_row = np.concatenate([[0], np.cumsum(plan.rows)])
        taken = []
        for block in within:
            window = plan.make_window(epoch * per_epoch + block)
            assert plan.find_part(epoch * per_epoch + block) == epoch
            assert len(window.order) == BLOCK
            assert all(0 <= start < stop <= plan.rows[group] for group, start, stop, _ in window.segments)
            assert (
                len(window.segments) <= plan.window + 2
            )  # one that the window before has begun, and one to fill a block
            read = [
                np.arange(first_row[group] + start, first_row[group] + stop)
                for group, start, stop, _ in window.segments
            ]
            taken.append(np.concatenate(read)[window.order])
        rows = np.concatenate(taken)
        assert len(rows) == len(np.unique(rows)) == BLOCK * len(within)


def test_the_index_of_1_55_billion_rows_comes_back_from_the_cache() -> None:
    index = made_up_index(256)
    assert len(index.paths) == SHARDS
    stored = index_cache.RowGroups(index.columns, index.shard, index.group, index.rows, index.nbytes, index.tars)
    index_cache.store("key", stored)
    back = index_cache.load("key")
    assert back is not None
    assert all(np.array_equal(got, put) for got, put in zip(back[1:5], stored[1:5], strict=True))
    assert back.tars == stored.tars
