"""The plan of several sets: shares at any step, each row once an epoch of its set, any block alone as in the stream."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from helpers.plans import block_rows
from hypothesis import given, reject, settings
from hypothesis import strategies as st

from nev.data.mixture import MixturePlan, make_mixture
from nev.data.set_order import SetOrder
from nev.data.windows import count_rows_read, make_windows
from nev.storage.reading import DataError


@st.composite
def mixtures(draw: st.DrawFn) -> MixturePlan:
    """Mixtures of one to four small sets, whose row groups are whole blocks or not, with parts of a few windows."""
    block = draw(st.integers(1, 8))
    sizes = st.sampled_from([block, 2 * block]) if draw(st.booleans()) else st.integers(1, 3 * block)
    sets = draw(st.lists(st.lists(sizes, min_size=1, max_size=30), min_size=1, max_size=4))
    for own in sets:
        own += [draw(st.integers(1, 3 * block))] * draw(st.integers(0, 1))  # the last row group of a shard
        own += [0] * draw(st.integers(0, 2))  # `data.used_rows` leaves nothing
    weights = draw(st.lists(st.sampled_from([0.3, 1, 2, 5.5]), min_size=len(sets), max_size=len(sets)))
    by_epochs, seed = draw(st.booleans()), draw(st.integers(0, 2**40))
    window = draw(st.one_of(st.none(), st.integers(0, 7)))
    rows = [np.array(own, np.int64) for own in sets]
    try:
        return make_mixture(rows, weights, by_epochs, seed, block * draw(st.integers(1, 3)), block, window)
    except DataError:  # a set is smaller than its part of a step
        reject()


def set_of(plan: MixturePlan, group: int) -> int:
    """The set of a row group."""
    return int(np.searchsorted(plan.first_groups, group, side="right")) - 1


def read_in_order(plan: MixturePlan, blocks: int) -> list[list[tuple[int, int, int]]]:
    """The rows of blocks 0 to `blocks` - 1, as a stream reads them."""
    windows, rows = make_windows(plan, 0, blocks), []
    for number in range(len(windows)):
        window = windows[number]
        assert window.first == len(rows), "windows follow one another"
        read = [(epoch, group, row) for group, start, stop, epoch in window.segments for row in range(start, stop)]
        rows += [[read[at] for at in chosen] for chosen in window.order.reshape(window.blocks, -1)]
    return rows


@given(mixtures(), st.data())
@settings(deadline=None)
def test_any_block_alone_is_that_of_the_stream(plan: MixturePlan, data: st.DataObject) -> None:
    count = data.draw(st.integers(1, 3 * plan.part_rows // plan.block_rows))
    block = data.draw(st.integers(0, count - 1))
    stream = read_in_order(plan, count)
    assert len(stream) == count
    assert all(len(rows) == plan.block_rows for rows in stream)
    assert block_rows(replace(plan, _parts={}), block) == stream[block]
    start, stop = plan.window_bounds(block)
    assert start <= block < stop
    assert plan.part_start(plan.find_part(block)) <= block < plan.part_start(plan.find_part(block) + 1)


@given(mixtures())
@settings(deadline=None)
def test_every_row_once_in_each_epoch_of_its_set_but_for_those_left_out(plan: MixturePlan) -> None:
    blocks = 3 * plan.part_rows // plan.block_rows
    seen = Counter(row for rows in read_in_order(plan, blocks) for row in rows)
    assert max(seen.values()) == 1
    counts = Counter((set_of(plan, group), epoch) for epoch, group, _ in seen)
    for number, order in enumerate(plan.orders):
        done = (
            blocks * plan.block_rows * plan.shares[number] / sum(plan.shares) - 2 * (plan.window + 2) * plan.merged.most
        )
        for epoch in range(max(0, int(done / order.epoch_rows))):
            assert counts[number, epoch] == order.epoch_rows
        assert order.left_out < plan.block_rows
        assert order.epoch_rows + order.left_out == plan.sets[number].sum()


@given(mixtures())
@settings(deadline=None)
def test_shares_hold_at_every_block(plan: MixturePlan) -> None:
    """Within the largest row groups of all sets, for sets of any row groups and any number of sets."""
    bound = sum(int(rows.max()) for rows in plan.sets)
    counts, total = np.zeros(len(plan.sets)), sum(plan.shares)
    for number, rows in enumerate(read_in_order(plan, 2 * plan.part_rows // plan.block_rows), 1):
        for _, group, _ in rows:
            counts[set_of(plan, group)] += 1
        exact = np.array(plan.shares) / total * number * plan.block_rows
        assert np.abs(counts - exact).max() <= bound


@pytest.mark.parametrize("weights", [(7, 3), (1, 1, 1), (0.6, 0.25, 0.1, 0.05)])
def test_shares_of_ten_thousand_steps_are_within_a_block(weights: tuple[float, ...]) -> None:
    """At every step, with row groups of a block; the last of each set is shorter."""
    sets = [np.array([256] * (400 + 37 * number) + [112]) for number in range(len(weights))]
    plan = make_mixture(sets, weights, False, 5, 1024, 256)
    windows = make_windows(plan, 0, plan.step_blocks(10_000).start)
    counts, off = np.zeros(len(weights)), 0.0
    for number in range(len(windows)):
        window = windows[number]
        sets_of_rows = np.concatenate([np.full(s.stop - s.start, set_of(plan, s.group)) for s in window.segments])
        for at, chosen in enumerate(window.order.reshape(window.blocks, -1), window.first + 1):
            counts += np.bincount(sets_of_rows[chosen], minlength=len(weights))
            off = max(off, np.abs(counts - np.array(weights) / sum(weights) * at * 256).max())
    assert counts.sum() == 10_000 * 1024
    assert off <= 256


@given(mixtures())
@settings(deadline=None)
def test_a_window_has_each_set_spread_evenly(plan: MixturePlan) -> None:
    if not plan.window:
        return
    windows = make_windows(plan, 0, plan.part_rows // plan.block_rows)
    for number in range(min(5, len(windows) - 1)):
        window = windows[number]
        sets = np.concatenate([np.full(s.stop - s.start, set_of(plan, s.group)) for s in window.segments])
        assert sorted(window.order.tolist()) == list(range(len(sets)))
        share = np.bincount(sets, minlength=len(plan.sets)) / len(sets)
        for chosen in window.order.reshape(window.blocks, -1):
            counts = np.bincount(sets[chosen], minlength=len(plan.sets))
            assert np.abs(counts - share * plan.block_rows).max() <= len(plan.sets)


def test_no_row_group_is_read_twice_where_few_are_uneven() -> None:
    sets = [np.array([32] * 300 + [13]), np.array([32] * 90 + [5, 30])]
    plan = make_mixture(sets, (2, 1), False, 0, 64, 32, window=4)
    assert plan.tail_rows == 13 + 3
    assert count_rows_read(plan, count=2000) / 32 < 1.05


def test_other_rows_are_left_out_in_each_epoch() -> None:
    order = SetOrder(np.array([8] * 12 + [5]), 0, 0, 3, 8)
    assert order.left_out == 5
    every = {(group, row) for group, rows in enumerate(order.rows) for row in range(rows)}
    left_out = []
    for epoch in range(40):
        runs = order.runs_between(epoch * order.epoch_rows, (epoch + 1) * order.epoch_rows)
        rows = [
            (int(group), int(start) + at)
            for group, start, count in zip(runs.group, runs.start, runs.rows, strict=True)
            for at in range(count)
        ]
        assert len(set(rows)) == len(rows) == order.epoch_rows
        assert set(runs.epoch.tolist()) == {epoch}
        left_out.append(frozenset(every - set(rows)))
    assert len(set(left_out)) > 30
    assert len(frozenset().union(*left_out)) > 60, "of 101 rows"


def test_the_fingerprint_is_that_of_sets_and_shares() -> None:
    one, other = np.full(9, 8), np.full(7, 8)
    plan = make_mixture([one, other], (1, 2), False, 0, 16, 8)
    same = make_mixture([one, other], (0.5, 1), False, 0, 16, 8)
    assert plan.fingerprint == same.fingerprint
    assert plan.shares == same.shares == (1, 2)
    others = [
        make_mixture([other, one], (1, 2), False, 0, 16, 8),
        make_mixture([one, other], (1, 3), False, 0, 16, 8),
        make_mixture([one, other], (1, 2), False, 1, 16, 8),
        make_mixture([one, other], (1, 2), False, 0, 16, 8, window=3),
        make_mixture([one, other], (1, 2), False, 0, 32, 8),
    ]
    assert len({plan.fingerprint, *(own.fingerprint for own in others)}) == 6


def test_epochs_are_shares_by_size_and_a_length() -> None:
    plan = make_mixture([np.full(10, 8), np.full(40, 8)], (3, 0.5), True, 0, 16, 8)
    assert plan.shares == (3, 2)
    assert plan.epoch_rows == 3 * 80 + 160
    assert plan.count_steps(1) == 25
    assert plan.count_steps(2) == 50
    assert plan.epochs_done(25) == (3.0, 0.5)
    weighted = make_mixture([np.full(10, 8), np.full(40, 8)], (3, 0.5), False, 0, 16, 8)
    with pytest.raises(ValueError, match="know no epoch"):
        weighted.count_steps(1)


def test_a_set_smaller_than_its_part_of_a_step_is_refused() -> None:
    with pytest.raises(
        DataError, match=r"set 2 of data.train has 16 rows, and a step of 64 takes 32 .* meet themselves"
    ):
        make_mixture([np.full(100, 8), np.full(2, 8)], (1, 1), False, 0, 64, 8)
