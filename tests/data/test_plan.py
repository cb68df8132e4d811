"""The plan: which rows a step has. Every promise of it, over plans that hypothesis makes up."""

import hashlib
import pickle
import tracemalloc
from itertools import groupby

import numpy as np
import pytest
from helpers.fresh import run_in_fresh_process
from helpers.plans import block_rows, epoch_blocks, epoch_rows, fresh, plans, segment_rows
from hypothesis import given
from hypothesis import strategies as st

from nev.data.block_plan import Window, sequential_blocks
from nev.data.plan import Plan
from nev.storage.reading import DataError


@given(plans(), st.integers(0, 3))
def test_every_row_once_an_epoch_save_a_counted_tail(plan: Plan, epoch: int) -> None:
    taken = epoch_rows(plan, epoch)
    there = {(epoch, group, row) for group, count in enumerate(plan.rows) for row in range(count)}
    assert len(taken) == len(set(taken)) == plan.steps_per_epoch * plan.global_batch
    assert set(taken) <= there
    assert len(there) - len(taken) == plan.tail_rows < plan.global_batch


@given(plans(windows=st.just(0)), st.integers(0, 3))
def test_without_a_window_row_groups_are_read_whole_and_in_a_row(plan: Plan, epoch: int) -> None:
    taken = epoch_rows(plan, epoch)
    runs = [[row for _, _, row in run] for _, run in groupby(taken, key=lambda row: row[1])]
    assert len(runs) == len({group for _, group, _ in taken})
    assert all(run == list(range(len(run))) for run in runs)
    assert sum(len(run) for run in runs[:-1]) == sum(
        plan.rows[group] for group in list(dict.fromkeys(group for _, group, _ in taken))[:-1]
    )


@given(plans(), st.data())
def test_a_block_has_exactly_its_rows_whoever_asks_and_when(plan: Plan, data: st.DataObject) -> None:
    blocks = range(3 * plan.blocks_per_epoch)
    in_sequence = [block_rows(plan, block) for block in blocks]
    other_way = fresh(plan)
    for block in data.draw(st.lists(st.sampled_from(blocks), max_size=20)):
        alone = block_rows(fresh(plan), block)
        assert alone == in_sequence[block] == block_rows(other_way, block)
        assert len(alone) == plan.block_rows
        assert all(0 <= row < plan.rows[group] for _, group, row in alone)
        assert {epoch for epoch, _, _ in alone} == {plan.find_part(block)} == {block // plan.blocks_per_epoch}


@given(plans(), st.integers(0, 10))
def test_the_rows_of_a_step_do_not_depend_on_the_world_size(plan: Plan, step: int) -> None:
    whole = [row for block in plan.step_blocks(step) for row in block_rows(plan, block)]
    for world in range(1, 13):
        first_step = max(0, step - world)
        shares = [plan.rank_blocks(step, rank, world, first_step) for rank in range(world)]
        even = plan.blocks_per_step // world
        assert {len(share) for share in shares} <= {even, plan.max_rank_blocks(world)}
        assert plan.max_rank_blocks(world) == even + bool(plan.blocks_per_step % world)
        if plan.blocks_per_step % world == 0:
            assert shares == [plan.rank_blocks(step, rank, world) for rank in range(world)]
        assert sorted(block for share in shares for block in share) == list(plan.step_blocks(step))
        rows = [row for share in shares for block in share for row in block_rows(fresh(plan), block)]
        assert len(rows) == plan.global_batch
        assert sorted(rows) == sorted(whole)


@given(plans())
def test_steps_follow_one_another_without_a_gap(plan: Plan) -> None:
    steps = 2 * plan.steps_per_epoch
    assert [block for step in range(steps) for block in plan.step_blocks(step)] == list(
        range(2 * plan.blocks_per_epoch)
    )


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    def order(seed: int, epoch: int, window: int) -> tuple[tuple[int, ...], ...]:
        plan = Plan(np.full(30, 4, np.int64), seed, 8, 4, window)
        return tuple(row[1:] for row in epoch_rows(plan, epoch))

    orders = {order(seed, epoch, window) for seed in range(5) for epoch in range(5) for window in (0, 1, 4)}
    assert len(orders) == 75
    assert all(sorted(one) == [(group, row) for group in range(30) for row in range(4)] for one in orders)


def test_every_row_group_is_as_likely_in_every_place() -> None:
    plan = Plan(np.ones(6, np.int64), 11, 6, 1)
    counts = np.zeros((6, 6), int)
    for epoch in range(3000):
        for place, block in enumerate(epoch_blocks(plan, epoch)):
            counts[place, block_rows(plan, block)[0][1]] += 1
    assert abs(counts - 500).max() < 5 * (3000 * 1 / 6 * 5 / 6) ** 0.5


def test_the_order_is_the_one_that_was_published() -> None:
    """A run resumes on the rows that it would have had, also under a later version: a change here breaks that."""
    plan = Plan(np.array([3, 5, 2, 4, 6], np.int64), seed=7, global_batch=4, block_rows=2)
    first, second = ([pieces(plan, block) for block in epoch_blocks(plan, epoch)] for epoch in (0, 1))
    assert first == [
        [(3, 0, 2)],
        [(3, 2, 4)],
        [(4, 0, 2)],
        [(4, 2, 4)],
        [(4, 4, 6)],
        [(0, 0, 2)],
        [(0, 2, 3), (2, 0, 1)],
        [(2, 1, 2), (1, 0, 1)],
        [(1, 1, 3)],
        [(1, 3, 5)],
    ]
    assert second == [
        [(1, 0, 2)],
        [(1, 2, 4)],
        [(1, 4, 5), (3, 0, 1)],
        [(3, 1, 3)],
        [(3, 3, 4), (2, 0, 1)],
        [(2, 1, 2), (4, 0, 1)],
        [(4, 1, 3)],
        [(4, 3, 5)],
        [(4, 5, 6), (0, 0, 1)],
        [(0, 1, 3)],
    ]
    large = Plan(np.ones(1000, np.int64), seed=7, global_batch=10, block_rows=10)
    order = [group for _, group, _ in epoch_rows(large, 2)]
    assert order[:8] == [277, 790, 818, 552, 514, 883, 158, 654]
    assert (
        hashlib.sha256(np.array(order, "<i4").tobytes()).hexdigest()
        == "d885881a4e2ca7589d61874f51ac5d40a3f04f3a7419dc92b0f7faf93dd4fd03"
    )
    assert plan.fingerprint == "315a549632b3e050047224426bf1667c5892392f4cfd422ae27315234963ca3f"


def pieces(plan: Plan, block: int) -> list[tuple[int, int, int]]:
    """The rows of a block whose rows keep their order: row group, start, stop."""
    runs = [[*run] for _, run in groupby(block_rows(plan, block), key=lambda row: row[1])]
    return [(run[0][1], run[0][2], run[-1][2] + 1) for run in runs]


def test_the_fingerprint_names_everything_that_the_rows_depend_on() -> None:
    rows = np.array([8, 8, 16], np.int64)
    plan = Plan(rows, 1, 8, 4)
    assert plan.fingerprint == Plan(rows.copy(), 1, 8, 4).fingerprint == pickle.loads(pickle.dumps(plan)).fingerprint  # noqa: S301
    others = [
        Plan(rows, 2, 8, 4),
        Plan(rows, 1, 16, 4),
        Plan(rows, 1, 8, 2),
        Plan(np.array([8, 16, 8], np.int64), 1, 8, 4),
        Plan(np.array([8, 8, 15], np.int64), 1, 8, 4),
        Plan(rows, 1, 8, 4, window=1),
        Plan(rows, 1, 8, 4, window=2),
    ]
    assert len({one.fingerprint for one in [plan, *others]}) == 8


def test_a_plan_that_has_been_used_survives_pickling() -> None:
    plan = Plan(np.array([5, 6, 7], np.int64), 3, 6, 3, window=2)
    rows = [block_rows(plan, block) for block in range(12)]
    copy = pickle.loads(pickle.dumps(plan))  # noqa: S301
    assert [block_rows(copy, block) for block in range(12)] == rows


def test_too_little_data_for_one_batch_is_an_error() -> None:
    with pytest.raises(DataError, match=r"has 7 rows, fewer than one global batch of 8: lower train\.global_batch"):
        Plan(np.array([3, 4], np.int64), 0, 8, 4)
    with pytest.raises(ValueError, match=r"B \(10\) must be a multiple of R \(4\)"):
        Plan(np.array([30], np.int64), 0, 10, 4)
    assert Plan(np.array([4, 4], np.int64), 0, 8, 4).steps_per_epoch == 1


@given(st.lists(st.integers(1, 20), min_size=1, max_size=30), st.integers(1, 9))
def test_in_order_covers_every_row_once_inside_row_groups(counts: list[int], most: int) -> None:
    blocks = sequential_blocks(np.array(counts, np.int64), most)
    rows = [row for segments in blocks for row in segment_rows(segments)]
    assert rows == [(0, group, row) for group, count in enumerate(counts) for row in range(count)]
    assert all(len(segments) == 1 and len(segment_rows(segments)) <= most for segments in blocks)


def test_a_billion_rows_are_planned_in_little_memory() -> None:
    groups = 1_500_000
    peak, ends, tail_rows = run_in_fresh_process(plan_a_billion_rows, groups)
    assert peak < 200e6
    assert [len(window.order) for window in ends] == [256, 256]
    assert tail_rows == groups * 1032 % 65_536


def plan_a_billion_rows(groups: int) -> tuple[int, tuple[Window, Window], int]:
    """The peak of memory in bytes, the first and last block of an epoch, and the rows of its tail."""
    tracemalloc.start()
    plan = Plan(np.full(groups, 1032, np.int64), 0, 65_536, 256, window=1)
    ends = plan.make_window(0), plan.make_window(plan.blocks_per_epoch - 1)
    return tracemalloc.get_traced_memory()[1], ends, plan.tail_rows


def test_epochs_that_are_over_are_forgotten() -> None:
    assert (
        run_in_fresh_process(bytes_after_20_epochs, 200_000) < 3 * 200_000 * 12
    )  # an epoch's order: 4 + 8 bytes a group


def bytes_after_20_epochs(groups: int) -> int:
    """What a plan holds after the first block of each of 20 epochs."""
    plan = Plan(np.full(groups, 3, np.int64), 0, 300, 3)
    tracemalloc.start()
    for epoch in range(20):
        plan.make_window(epoch * plan.blocks_per_epoch)
    return tracemalloc.get_traced_memory()[0]
