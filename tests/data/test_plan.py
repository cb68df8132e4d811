"""The plan: which rows a step has. Every promise of it, over plans that hypothesis makes up."""

import hashlib
import pickle
import tracemalloc
from collections import Counter
from itertools import groupby, pairwise

import numpy as np
import pytest
from helpers.fresh import run_in_fresh_process
from helpers.plans import block_rows, epoch_blocks, epoch_rows, fresh, plans, segment_rows, window_blocks
from hypothesis import given
from hypothesis import strategies as st

from nev.data.plan import SPREAD, Plan, Window, choose_window, sequential_blocks
from nev.data.windows import make_windows
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
        assert {epoch for epoch, _, _ in alone} == {plan.epoch_of(block)} == {block // plan.blocks_per_epoch}


@given(plans(), st.integers(0, 3))
def test_a_window_has_the_rows_of_its_row_groups_but_for_less_than_a_block(plan: Plan, epoch: int) -> None:
    """Its first row group may lack rows, which the window before took; it may take rows of the next window."""
    order = plan._order(epoch).groups.tolist()
    starts = [*plan.window_starts(epoch).tolist(), plan.blocks_per_epoch]
    base = epoch * plan.blocks_per_epoch
    for first, end in pairwise(starts):
        window = plan.make_window(base + first, end - first)
        assert plan.window_bounds(base + first) == plan.window_bounds(base + end - 1) == (base + first, base + end)
        groups = [segment.group for segment in window.segments]
        assert groups == order[order.index(groups[0]) : order.index(groups[0]) + len(groups)]
        assert all(segment.start == 0 for segment in window.segments[1:])
        assert all(segment.stop == plan.rows[segment.group] for segment in window.segments[:-1])
        read = range(len(segment_rows(window.segments)))
        assert len(set(window.order.tolist())) == len(window.order) > len(read) - plan.block_rows
        assert set(window.order.tolist()) <= set(read)
        size = max(1, plan.window)
        number = order.index(groups[0]) // size
        of_the_next = [row for row in segment_rows(window.segments) if order.index(row[1]) // size > number]
        assert len(of_the_next) <= 2 * (plan.block_rows - 1), "for its last block, and the rest that is left out"


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


@given(plans(), st.data())
def test_windows_of_a_range_have_its_blocks_once_and_in_order(plan: Plan, data: st.DataObject) -> None:
    """From any block to any other, over the ends of epochs: as the tasks of a stream."""
    first = data.draw(st.integers(0, 3 * plan.blocks_per_epoch))
    last = first + data.draw(st.integers(0, 2 * plan.blocks_per_epoch))
    windows = make_windows(plan, first, last)
    every = [windows[number] for number in range(len(windows))]
    assert [window.first + number for window in every for number in range(window.blocks)] == list(range(first, last))
    for window in every:
        rows = list(window_blocks(window))
        assert rows == [block_rows(plan, window.first + number) for number in range(window.blocks)]
    for number in data.draw(st.lists(st.sampled_from(range(len(every))), max_size=5)) if every else []:
        again = make_windows(fresh(plan), first, last)[number]
        assert again[:3] == every[number][:3]
        assert np.array_equal(again.order, every[number].order)
    with pytest.raises(IndexError):
        windows[len(windows)]


@given(plans(windows=st.integers(1, 6)))
def test_a_window_is_read_once(plan: Plan) -> None:
    """The tasks of an epoch read each row once: a row group that two windows share, in two parts."""
    windows = make_windows(plan, 0, plan.blocks_per_epoch)
    read = Counter(row for number in range(len(windows)) for row in segment_rows(windows[number].segments))
    assert set(read.values()) <= {1}


@given(
    st.lists(st.integers(1, 5), min_size=200, max_size=300), st.integers(1, 5), st.integers(1, 6), st.integers(0, 99)
)
def test_one_uneven_row_group_disturbs_few_others(blocks: list[int], window: int, uneven: int, seed: int) -> None:
    """A row group with a remainder, such as the last one of a set, costs a second reading of few others."""
    plan = Plan(np.array([7 * count for count in blocks] + [uneven], np.int64), seed, 7, 7, window)
    for epoch in range(2):
        windows = make_windows(plan, epoch * plan.blocks_per_epoch, (epoch + 1) * plan.blocks_per_epoch)
        read = [segment for number in range(len(windows)) for segment in windows[number].segments]
        parts = [(start, stop) != (0, plan.rows[group]) for group, start, stop, _ in read]
        assert sum(parts) <= 2 * (SPREAD + 1)
        assert {segment.group for segment in read} == set(range(len(plan.rows)))


def test_an_epoch_leaves_out_other_rows_each_time() -> None:
    """Three rows of 1,603; those of the uneven row group no more often than others, within the noise."""
    plan = Plan(np.array([16] * 100 + [3], np.int64), 5, 4, 4, window=2)
    left_out: Counter[int] = Counter()
    there = {(group, row) for group, count in enumerate(plan.rows) for row in range(count)}
    for epoch in range(400):
        taken = {row[1:] for row in epoch_rows(plan, epoch)}
        left_out.update(group for group, _ in there - taken)
    assert plan.tail_rows == 3
    assert sum(left_out.values()) == 3 * 400
    assert len(left_out) > 95
    assert left_out[100] <= 15, "its share is 3 of 1,603 rows, or two of these times"


def test_blocks_of_two_windows_are_refused() -> None:
    plan = Plan(np.full(8, 4, np.int64), 0, 4, 4, window=2)
    assert plan.make_window(0, 2).blocks == 2
    with pytest.raises(ValueError, match="blocks 1 to 2 are not in one window, 0 to 1"):
        plan.make_window(1, 2)


def meeting_again(plan: Plan, epochs: int) -> float:
    """The share of the pairs of rows of a batch that are in one batch in the epoch after, too."""
    batches = []
    for epoch in range(epochs):
        rows = [row[1:] for row in epoch_rows(plan, epoch)]
        batches.append({row: place // plan.global_batch for place, row in enumerate(rows)})
    again = pairs = 0
    for one, other in pairwise(batches):
        met = Counter((batch, other.get(row, -1)) for row, batch in one.items())
        again += sum(count * (count - 1) for (_, later), count in met.items() if later >= 0)
        pairs += plan.steps_per_epoch * plan.global_batch * (plan.global_batch - 1)
    return again / pairs


def test_rows_that_met_seldom_meet_again() -> None:
    """6,000 rows in row groups of 256 and batches of 128, as in a small run; in a whole shuffle it would be 0.02."""
    rows = np.array([256] * 23 + [112], np.int64)
    default = choose_window(rows, 128)
    shares = {window: meeting_again(Plan(rows, 1, 128, 128, window), 10) for window in (0, 1, default, len(rows))}
    assert shares[0] > 0.8
    assert shares[1] < 0.55
    assert shares[default] < 0.10
    assert shares[len(rows)] == pytest.approx(127 / 5999, rel=0.2)


@pytest.mark.parametrize(
    ("group", "block", "window"),
    [(256, 256, 4), (250, 256, 6), (250, 125, 4), (1000, 256, 2), (10_000, 256, 1), (64, 256, 24)],
)
def test_the_default_window_has_some_thousand_rows(group: int, block: int, window: int) -> None:
    rows = np.full(100, group, np.int64)
    assert choose_window(rows, block) == window
    rows[7] = 3  # an odd one, as the last of a set
    assert choose_window(rows, block) == window


def test_a_row_may_be_in_any_place_of_its_window() -> None:
    plan = Plan(np.full(2, 3, np.int64), 5, 6, 2, window=2)
    places = np.zeros((6, 6), int)
    for epoch in range(3000):
        for place, (_, group, row) in enumerate(epoch_rows(plan, epoch)):
            places[place, 3 * group + row] += 1
    assert abs(places - 500).max() < 5 * (3000 * 1 / 6 * 5 / 6) ** 0.5


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


def test_the_order_in_windows_is_the_one_that_was_published() -> None:
    plan = Plan(np.array([3, 5, 2, 4, 6], np.int64), seed=7, global_batch=4, block_rows=2, window=2)
    assert [[row[1:] for row in block_rows(plan, block)] for block in range(10)] == [
        [(4, 1), (4, 5)],
        [(3, 1), (3, 2)],
        [(4, 3), (4, 2)],
        [(4, 0), (3, 0)],
        [(4, 4), (3, 3)],
        [(0, 1), (0, 0)],
        [(2, 1), (2, 0)],
        [(1, 0), (0, 2)],
        [(1, 3), (1, 1)],
        [(1, 2), (1, 4)],
    ]
    large = Plan(np.array([100] * 99 + [30], np.int64), seed=7, global_batch=100, block_rows=50, window=3)
    order = [row[1:] for row in epoch_rows(large, 2)]
    assert (
        hashlib.sha256(np.array(order, "<i4").tobytes()).hexdigest()
        == "3fd17425d9aa6ea5ddd23f35639ecf381acb8a0f270ce2d8c02aca182a4f9e9d"
    )
    assert plan.fingerprint == "2bcf29ddb2f18727449dbcb405cac69d8e27ec065d717d613ce2e4ca134e6462"


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
