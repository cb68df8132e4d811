"""Windows of the plan: rows that meet other rows, and are read once."""

import hashlib
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from helpers.plans import block_rows, epoch_rows, fresh, mixtures, plans, segment_rows, window_blocks
from hypothesis import given, settings
from hypothesis import strategies as st

from nev.data.block_plan import BlockPlan
from nev.data.plan import SPREAD, Plan, choose_window
from nev.data.windows import make_windows, task_blocks


@given(plans(), st.integers(0, 3))
def test_a_window_has_the_rows_of_its_row_groups_but_for_less_than_a_block(plan: Plan, epoch: int) -> None:
    """Its first row group may lack rows, which the window before took; it may take rows of the next window."""
    order = plan._order(epoch).groups.tolist()
    starts = [*(plan.window_starts(epoch) - plan.part_start(epoch)).tolist(), plan.blocks_per_epoch]
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


@given(st.one_of(plans(), mixtures()), st.data())
@settings(deadline=None)
def test_several_streams_hand_out_each_step_in_equal_parts(plan: BlockPlan, data: st.DataObject) -> None:
    """The windows of each stream have its blocks once and in order, and its ranks take turns with them."""
    streams = data.draw(st.sampled_from([n for n in (1, 2, 3, 4) if plan.blocks_per_step % n == 0]))
    ranks = data.draw(st.integers(1, plan.blocks_per_step // streams))
    part_steps = max(1, plan.part_start(1) // plan.blocks_per_step)
    first = data.draw(st.integers(0, 2 * part_steps))
    last = first + data.draw(st.integers(1, 2 * part_steps))
    every: list[int] = []
    for stream in range(streams):
        windows = make_windows(plan, plan.step_blocks(first).start, plan.step_blocks(last).start, stream, streams)
        read = [windows[number] for number in range(len(windows))]
        handed = [window.first + number for window in read for number in range(window.blocks)]
        assert handed == [block for step in range(first, last) for block in plan.stream_blocks(step, stream, streams)]
        for window in read:
            rows = list(window_blocks(window))
            assert rows == [block_rows(plan, window.first + number) for number in range(window.blocks)]
        world = ranks * streams
        for rank in range(ranks):
            own = (plan.rank_blocks(step, stream * ranks + rank, world, first, streams) for step in range(first, last))
            assert [block for blocks in own for block in blocks] == handed[rank::ranks]
        every += handed
    assert sorted(every) == list(range(plan.step_blocks(first).start, plan.step_blocks(last).start))


def test_a_task_has_a_window_or_a_stream_s_part_of_a_step() -> None:
    plan = Plan(np.full(64, 32), 0, 64, 8, 4)  # a window has 16 blocks, a step 8
    assert [task_blocks(plan, streams) for streams in (1, 2, 4)] == [16, 4, 2]


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
