"""The plan of several sets: shares at any step, each row once an epoch of its set, any block alone as in the stream."""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from helpers.plans import block_rows, mixtures
from hypothesis import given, settings
from hypothesis import strategies as st

from nev.data.mixture import MixturePlan, make_mixture
from nev.data.set_order import SetOrder
from nev.data.windows import count_rows_read, make_windows
from nev.storage.reading import DataError


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
            blocks * plan.block_rows * plan.shares[number] / sum(plan.shares)
            - 2 * (plan.window + 2) * plan.merged.largest_run
        )
        for epoch in range(max(0, int(done / order.epoch_rows))):
            assert counts[number, epoch] == order.epoch_rows
        assert order.skipped_rows < plan.block_rows
        assert order.epoch_rows + order.skipped_rows == plan.group_rows[number].sum()


@given(mixtures())
@settings(deadline=None)
def test_shares_hold_at_every_block(plan: MixturePlan) -> None:
    """Within the largest row groups of all sets, for sets of any row groups and any number of sets."""
    bound = sum(int(rows.max()) for rows in plan.group_rows)
    counts, total = np.zeros(len(plan.group_rows)), sum(plan.shares)
    for number, rows in enumerate(read_in_order(plan, 2 * plan.part_rows // plan.block_rows), 1):
        for _, group, _ in rows:
            counts[set_of(plan, group)] += 1
        exact = np.array(plan.shares) / total * number * plan.block_rows
        assert np.abs(counts - exact).max() <= bound


def test_shares_of_ten_thousand_steps_are_within_a_block() -> None:
    """At every step, with row groups of a block; the last of each set is shorter."""
    weights = (0.6, 0.25, 0.1, 0.05)
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
        share = np.bincount(sets, minlength=len(plan.group_rows)) / len(sets)
        for chosen in window.order.reshape(window.blocks, -1):
            counts = np.bincount(sets[chosen], minlength=len(plan.group_rows))
            assert np.abs(counts - share * plan.block_rows).max() <= len(plan.group_rows)


def test_no_row_group_is_read_twice_where_few_are_uneven() -> None:
    sets = [np.array([32] * 300 + [13]), np.array([32] * 90 + [5, 30])]
    plan = make_mixture(sets, (2, 1), False, 0, 64, 32, window=4)
    assert plan.tail_rows == 13 + 3
    assert count_rows_read(plan, count=2000) / 32 < 1.05


def test_other_rows_are_left_out_in_each_epoch() -> None:
    order = SetOrder(np.array([8] * 12 + [5]), 0, 0, 3, 8)
    assert order.skipped_rows == 5
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
    # An epoch of the second set has 88 rows, since it leaves out the 5 of a row group that is no whole block.
    uneven = make_mixture([np.full(10, 8), np.array([8] * 11 + [5])], (1, 1), True, 0, 16, 8)
    assert uneven.shares == (10, 11)
    weighted = make_mixture([np.full(10, 8), np.full(40, 8)], (3, 0.5), False, 0, 16, 8)
    with pytest.raises(ValueError, match="know no epoch"):
        weighted.count_steps(1)


def test_a_set_smaller_than_its_part_of_a_step_is_refused() -> None:
    with pytest.raises(
        DataError, match=r"set 2 of data.train has 16 rows in an epoch, and a step of 64 takes 32 .* meet"
    ):
        make_mixture([np.full(100, 8), np.full(2, 8)], (1, 1), False, 0, 64, 8)
    # Of 300 rows an epoch leaves 4 out, which are as many as a step takes.
    with pytest.raises(DataError, match=r"^small of data.train has 296 rows in an epoch, and a step of 600 takes 300"):
        make_mixture([np.full(1000, 256), np.array([256, 44])], (1, 1), False, 0, 600, 8, names=("large", "small"))
    with pytest.raises(DataError, match=r"^set 2 of data.train has no row that is used"):
        make_mixture([np.full(10, 8), np.zeros(2, np.int64)], (1, 1), False, 0, 16, 8)


def test_the_order_is_the_one_that_was_published() -> None:
    """A run continues with the same rows after an upgrade: another order needs another fingerprint."""
    plan = make_mixture([np.array([8] * 5 + [3]), np.array([8] * 3)], (2, 1), True, 7, 16, 8, window=3)
    assert [(row[1], row[2]) for row in read_in_order(plan, 2)[1]] == [
        (3, 7),
        (1, 1),
        (8, 7),
        (3, 4),
        (1, 4),
        (8, 6),
        (3, 6),
        (1, 2),
    ]
    large = make_mixture([np.array([256] * 50 + [112]), np.full(37, 256)], (3, 1), False, 1, 1024, 256)
    digest = hashlib.sha256(repr(read_in_order(large, 200)).encode()).hexdigest()
    assert (digest[:16], large.fingerprint[:16]) == ("dc90fc4ab7e59194", "3c1add4718a6eea5")


def test_every_epoch_and_every_set_has_an_order_of_its_own() -> None:
    sets = [np.full(40, 8), np.full(40, 8)]
    plan = make_mixture(sets, (1, 1), False, 0, 16, 8)
    orders = [
        order.runs_between(epoch * order.epoch_rows, (epoch + 1) * order.epoch_rows).group - order.first_group
        for order in plan.orders
        for epoch in range(2)
    ]
    for own in orders:
        assert sorted(own.tolist()) == list(range(40))
        assert sum(abs(np.diff(own)) == 1) < 15, "no run of neighbours"
    assert len({tuple(own.tolist()) for own in orders}) == 4


def test_a_row_of_a_window_may_come_anywhere_in_it() -> None:
    plan = make_mixture([np.full(64, 8), np.full(64, 8)], (1, 1), False, 0, 32, 8, window=8)
    windows = make_windows(plan, 0, 64)
    places = [np.argsort(windows[number].order)[:8] for number in range(len(windows))]  # of the first row group's rows
    assert all(np.ptp(own) > 8 for own in places)
    assert len({tuple(own.tolist()) for own in places}) == len(places)


def test_a_window_has_a_thousand_rows_and_a_row_group_of_each_set_by_default() -> None:
    assert make_mixture([np.full(99, 256), np.full(99, 256)], (1, 1), False, 0, 1024, 256).window == 4
    assert make_mixture([np.full(99, 2048)] * 3, (1, 1, 1), False, 0, 1024, 256).window == 3
    # As many as have 1,024 rows where a row group has 341, in the mean over the mixture's row groups.
    assert make_mixture([np.full(99, 256), np.full(99, 512)], (1, 1), False, 0, 1024, 256).window == 3


@given(mixtures(), st.lists(st.tuples(st.integers(0, 600), st.integers(0, 200)), min_size=1, max_size=20))
@settings(deadline=None)
def test_any_piece_of_the_merged_sequence_is_that_of_the_whole(
    plan: MixturePlan, pieces: list[tuple[int, int]]
) -> None:
    whole = plan.merged.runs_between(0, 800)
    for first, rows in pieces:
        piece, chosen = (
            plan.merged.runs_between(first, first + rows),
            slice(*np.searchsorted(whole.begin, [first, first + rows])),
        )
        assert all(np.array_equal(got, column[chosen]) for got, column in zip(piece, whole, strict=True))


@pytest.mark.parametrize("shares", [(1, 1), (7, 3), (97, 1)])
def test_two_sets_are_within_half_of_a_row_group_at_every_boundary(shares: tuple[int, int]) -> None:
    sets = [np.array([8, 24, 40] * 20), np.array([16, 64, 8, 32] * 15)]
    plan = make_mixture(sets, shares, False, 3, 16, 8)
    runs = plan.merged.runs_between(0, 20_000)
    for number, share in enumerate(shares):
        rows = np.cumsum(np.where(runs.set == number, runs.rows, 0))
        exact = np.cumsum(runs.rows) * share / sum(shares)
        assert np.abs(rows - exact).max() <= max(map(max, sets)) / 2


def test_small_sets_are_merged_first() -> None:
    """With the largest first, a small set would be late by half of a row group at each merge."""
    shares = (5, 3, 1, 1)
    plan = make_mixture([np.full(400, 16)] * 4, shares, False, 0, 16, 16)
    runs = plan.merged.runs_between(0, 200_000)
    off = [
        np.abs(np.cumsum(np.where(runs.set == number, 16, 0)) - np.cumsum(runs.rows) * share / sum(shares)).max()
        for number, share in enumerate(shares)
    ]
    assert max(off) <= 12, "three quarters of a row group; 16 the other way round"
